import torch
from esmfold2_trimul_tools.folding.complexes import chain_starts, features_of
from esmfold2_trimul_tools.folding.fold import Settings, compare, fold
from esmfold2_trimul_tools.folding.sequences import Record
from folding import CPU, SHORT, tiny_model
from transformers.models.esmfold2.protein_utils import prepare_protein_features


def test_one_chain_has_transformers_own_features():
    expected = prepare_protein_features(SHORT.sequence)
    features = features_of(SHORT, CPU)
    assert features.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(features[name], tensor) and features[name].dtype == tensor.dtype, name


def test_chains_are_numbered_as_in_biohubs_own_code():
    record = Record("complex", "MQI:TG:MQI:TG:MQI")
    features = features_of(record, CPU)
    assert features["asym_id"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]]
    assert features["entity_id"].tolist() == [[1, 1, 1, 2, 2, 1, 1, 1, 2, 2, 1, 1, 1]]
    assert features["sym_id"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]]
    assert features["residue_index"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert features["token_index"].tolist() == [list(range(13))]
    together = prepare_protein_features("MQITGMQITGMQI")
    assert torch.equal(features["input_ids"], together["input_ids"])
    assert {tensor.shape[0] for tensor in features.values()} == {1}
    assert chain_starts(record) == [0, 3, 5, 8, 10]


def test_a_complex_is_no_longer_chain():
    model = tiny_model()
    settings = Settings(loops=0, samples=1, steps=2)
    apart = fold(model, Record("pair", "MQIFVK:TLTGK"), settings)
    joined = fold(model, Record("pair", "MQIFVKTLTGK"), settings)
    assert joined.coords.shape == apart.coords.shape
    assert compare(apart, joined).distogram_max > 1e-3
    assert joined.iptm.tolist() == [0] and 0 < float(apart.iptm) < 1
    pairs = apart.chain_iptm[0]
    assert pairs.shape == (2, 2)
    assert float(apart.iptm) == float(pairs.fill_diagonal_(0).max())
