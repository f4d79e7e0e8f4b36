import json

import pytest
from esmfold2_trimul_tools.errors import BrokenFoldError, UserError
from esmfold2_trimul_tools.folding.fold import Settings, compare, fold
from esmfold2_trimul_tools.folding.model import restore_stock, swap_in
from esmfold2_trimul_tools.folding.sequences import Record
from esmfold2_trimul_tools.folding.validate import DECIDING, shipped_proteins, validate
from esmfold2_trimul_tools.repository import find_root
from folding import (
    NAN_LAYER,
    SHORT,
    TINY_SITES,
    ZERO_LAYER,
    tiny_model,
    write_kernel_repository,
)

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Settings(loops=1, samples=1, steps=2, seed=4)
RECORDS = [SHORT, Record("other", "GGMQWYPKDE")]


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def test_ubiquitin_and_gb1_are_shipped():
    ubiquitin, gb1 = shipped_proteins()
    assert (ubiquitin.name, gb1.name) == ("ubiquitin", "gb1")
    assert ubiquitin.sequence.startswith("MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIF")
    assert ubiquitin.sequence.endswith("AGKQLEDGRTLSDYNIQKESTLHLVLRLRGG")
    assert gb1.sequence == "MTYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
    assert (len(ubiquitin.sequence), len(gb1.sequence)) == (76, 56)


def test_our_kernel_passes(tiny):
    labels = []
    result = validate(
        tiny, "ours", find_root(), QUICK, RECORDS, lambda label, done, total: labels.append(label)
    )
    assert result.passed
    assert result.swap == (TINY_SITES, TINY_SITES)
    for verdict in result.verdicts:
        for name in DECIDING:
            assert verdict.worst(name) < 0.01 * getattr(verdict.spread, name)
        # A comparison of the stock path with itself would be exactly zero.
        assert verdict.worst("distogram_mean") > 0
    assert list(dict.fromkeys(labels)) == [
        "short, stock, seed 4", "short, stock, seed 5",
        "other, stock, seed 4", "other, stock, seed 5",
        "short, ours, seed 4", "short, ours, seed 5",
        "other, ours, seed 4", "other, ours, seed 5",
    ]  # fmt: skip


def test_stock_folds_are_of_the_stock_path_even_if_a_kernel_was_swapped_in_before(tiny, tmp_path):
    restore_stock(tiny)
    expected = fold(tiny, SHORT, QUICK)
    root = write_kernel_repository(tmp_path, ZERO_LAYER)
    swap_in(tiny, "ours", root)
    (verdict,) = validate(tiny, "ours", root, QUICK, [SHORT]).verdicts
    assert not any(compare(verdict.stock[0], expected)[:-1])
    assert verdict.spread == compare(*verdict.stock)
    assert verdict.differences[1] == compare(verdict.stock[1], verdict.kernel[1])


def test_a_wrong_kernel_fails(tiny, tmp_path):
    root = write_kernel_repository(tmp_path, ZERO_LAYER)
    result = validate(tiny, "ours", root, QUICK, RECORDS)
    assert not result.passed
    for verdict in result.verdicts:
        assert not verdict.passed
        assert not verdict.within_spread("plddt_mean")


def test_a_kernel_that_gives_nan_is_an_error(tiny, tmp_path):
    root = write_kernel_repository(tmp_path, NAN_LAYER)
    with pytest.raises(BrokenFoldError, match="short: the fold gave numbers that are not finite"):
        validate(tiny, "ours", root, QUICK, RECORDS)


def test_one_failing_protein_is_enough(tiny):
    result = validate(tiny, "ours", find_root(), QUICK, [SHORT])
    (passed,) = result.verdicts
    one, other = passed.differences
    failed = passed._replace(differences=(one, other._replace(ptm=0.9)))
    assert failed.within_spread("plddt_mean") and not failed.within_spread("ptm")
    assert not result._replace(verdicts=[passed, failed]).passed


def test_summary_is_json(tiny):
    (verdict,) = validate(tiny, "ours", find_root(), QUICK, [SHORT]).verdicts
    summary = json.loads(json.dumps(verdict.summary()))
    assert summary["name"] == "short" and summary["residues"] == 12
    assert summary["passed"] is True
    assert [len(summary[name]) for name in ("stock", "kernel", "differences")] == [2, 2, 2]
    assert summary["within_spread"] == dict.fromkeys(DECIDING, True)
    assert summary["spread"]["ptm"] > summary["differences"][0]["ptm"]


def test_bad_settings_are_refused_before_any_fold(tiny):
    with pytest.raises(UserError, match="--steps must be at least 1"):
        validate(tiny, "ours", find_root(), Settings(steps=0), [SHORT])
