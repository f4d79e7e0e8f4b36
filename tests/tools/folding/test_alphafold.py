import json

import pytest
import torch
from esmfold2_trimul_tools.folding.alphafold import confidences, summary_confidences
from folding import made_up_fold


def test_confidences_are_in_alphafolds_layout():
    found = json.loads(confidences(made_up_fold("MG:X")))
    assert found["token_chain_ids"] == ["A", "A", "B"]
    assert found["token_res_ids"] == [1, 2, 1]
    assert found["token_plddts"] == [0, 50, 100]
    # Methionine has 8 heavy atoms, glycine 4, and so has what is unknown.
    assert found["atom_chain_ids"] == ["A"] * 12 + ["B"] * 4
    assert found["atom_plddts"] == [0] * 8 + [50] * 4 + [100] * 4
    assert found["pae"] == [[0, 0.1, 0.2], [1, 1.1, 1.2], [2, 2.1, 2.2]]
    assert found["pde"] == [[0, 0, 0]] * 3


def test_the_summary_is_of_a_sample_and_its_chains():
    result = made_up_fold("MG:X", samples=2)
    result.chain_iptm = torch.tensor([[[0.5, 0.1], [0.2, 0.6]], [[0.7, 0.4], [0.3, 0.8]]])
    best = summary_confidences(result, 1)
    assert best == {
        "rank": 1,
        "ranking_score": 0.48,
        "ptm": 0.8,
        "iptm": 0.4,
        "mean_plddt": 50,
        "chain_ids": ["A", "B"],
        "chain_ptm": [0.7, 0.8],
        "chain_iptm": [0.4, 0.4],
        "chain_pair_iptm": [[0.7, 0.4], [0.4, 0.8]],
        "chain_pair_pae_min": [[0, 0.2], [2, 2.2]],
    }
    other = summary_confidences(result, 0)
    assert (other["rank"], other["iptm"], other["chain_iptm"]) == (2, 0.25, [0.2, 0.2])
    assert "chain_pair_pae_min" not in other


def test_a_single_chain_has_nothing_between_chains():
    found = summary_confidences(made_up_fold("MG"), 0)
    assert found["iptm"] is found["chain_iptm"] is None
    assert found["ranking_score"] == found["ptm"] == pytest.approx(0.5)
    assert found["chain_pair_iptm"] == [found["chain_ptm"]]
