"""The confidences of a fold in the JSON layout of AlphaFold 3, which viewers and scripts read.

`..._confidences.json` has `pae`, `atom_plddts`, `atom_chain_ids`, `token_chain_ids` and
`token_res_ids`; `..._summary_confidences.json` has `ptm`, `iptm`, `chain_ptm`, `chain_iptm`,
`chain_pair_iptm`, `chain_pair_pae_min` and `ranking_score`. Beside AlphaFold's keys there are
`pde`, `token_plddts`, `mean_plddt`, `chain_ids` and `rank`. AlphaFold's `contact_probs`,
`fraction_disordered` and `has_clash` are left out. A token is a residue.
"""

import json
from typing import Any

from torch import Tensor

from .complexes import chain_starts
from .fold import Fold
from .sequences import CHAIN_NAMES


def confidences(result: Fold) -> str:
    """The best sample's values by atom, residue and pair of residues, as JSON."""
    from transformers.models.esmfold2.protein_utils import PROTEIN_1TO3, PROTEIN_HEAVY_ATOMS

    plddt = (100 * result.plddt[result.best]).tolist()
    residues = [
        (name, number, len(PROTEIN_HEAVY_ATOMS[PROTEIN_1TO3[letter]]))
        for name, chain in zip(CHAIN_NAMES, result.record.chains, strict=False)
        for number, letter in enumerate(chain, start=1)
    ]
    by_atom = [
        (name, round(confidence, 2))
        for (name, _, atoms), confidence in zip(residues, plddt, strict=True)
        for _ in range(atoms)
    ]
    return json.dumps(
        {
            "atom_chain_ids": [name for name, _ in by_atom],
            "atom_plddts": [confidence for _, confidence in by_atom],
            "pae": _rounded(result.pae),
            "pde": _rounded(result.pde),
            "token_chain_ids": [name for name, _, _ in residues],
            "token_plddts": [round(confidence, 2) for confidence in plddt],
            "token_res_ids": [number for _, number, _ in residues],
        },
        separators=(",", ":"),
    )


def summary_confidences(result: Fold, sample: int) -> dict[str, Any]:
    """A sample's values of the whole and of its chains.

    chain_pair_iptm[i][j] is symmetric, as AlphaFold's: the larger of the two directions.
    chain_pair_pae_min is of the best sample alone.
    """
    several = result.several
    of_pairs = result.chain_iptm[sample].maximum(result.chain_iptm[sample].T)
    found = {
        "rank": result.ranked.index(sample) + 1,
        "ranking_score": _value(result.ranking_scores[sample]),
        "ptm": _value(result.ptm[sample]),
        "iptm": _value(result.iptm[sample]) if several else None,
        "mean_plddt": round(100 * float(result.plddt[sample].mean()), 2),
        "chain_ids": list(CHAIN_NAMES[: len(result.record.chains)]),
        "chain_ptm": _values(of_pairs.diagonal()),
        "chain_iptm": None,
        "chain_pair_iptm": [_values(row) for row in of_pairs],
    }
    if several:
        others = of_pairs.clone().fill_diagonal_(0).sum(1) / (len(of_pairs) - 1)
        found["chain_iptm"] = _values(others)
    if sample == result.best:
        starts = [*chain_starts(result.record), result.record.length]
        spans = [slice(*ends) for ends in zip(starts, starts[1:], strict=False)]
        found["chain_pair_pae_min"] = [
            [round(float(result.pae[one, other].min()), 2) for other in spans] for one in spans
        ]
    return found


def _value(number: Tensor) -> float:
    return round(float(number), 4)


def _values(numbers: Tensor) -> list[float]:
    return [_value(number) for number in numbers]


def _rounded(matrix: Tensor) -> list[list[float]]:
    # Hundredths as whole numbers: float32 has no 0.1, and would be written with all its digits.
    return [[value / 100 for value in row] for row in (100 * matrix).round().int().tolist()]
