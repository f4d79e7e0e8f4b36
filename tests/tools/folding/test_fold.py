import gc
import math
import weakref

import pytest
import torch
from esmfold2_trimul_tools.errors import BrokenFoldError, UserError
from esmfold2_trimul_tools.folding import fold as subject
from esmfold2_trimul_tools.folding.fold import Settings, compare, fold, fold_records
from esmfold2_trimul_tools.folding.model import (
    random_model,
    restore_stock,
    swap_in,
    triangle_modules,
)
from esmfold2_trimul_tools.folding.sequences import Record
from esmfold2_trimul_tools.repository import find_root
from folding import (
    CPU,
    NAN_LAYER,
    SHORT,
    TINY_SITES,
    ZERO_LAYER,
    tiny_config,
    tiny_model,
    write_kernel_repository,
)
from transformers import EsmFold2Config, EsmFold2Model

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Settings(loops=1, samples=1, steps=2)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture(autouse=True)
def _stock_before_each_test(tiny):
    restore_stock(tiny)


@pytest.mark.parametrize(("loops", "samples"), [(0, 1), (2, 1), (1, 3)])
def test_progress_counts_every_site_call_that_was_promised(tiny, loops, samples):
    seen = []
    settings = Settings(loops, samples, steps=2)
    fold(tiny, SHORT, settings, lambda done, total: seen.append((done, total)))
    # Six of the ten sites run in every pass; those of the coda and the confidence head run once.
    total = 6 * (loops + 1) + 4
    assert subject.site_calls(tiny, loops) == total
    assert seen == [(done, total) for done in range(1, total + 1)]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("full"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_no_hook_stays_behind(tiny, monkeypatch, error):
    def fail(*_, **__):
        raise error

    fold(tiny, SHORT, QUICK, lambda *_: None)
    monkeypatch.setattr(EsmFold2Model, "fold", fail)
    with pytest.raises(UserError, match="short: 12 residues and 1 samples do not fit into the mem"):
        fold(tiny, SHORT, QUICK, lambda *_: None)
    assert not any(site._forward_hooks for site in triangle_modules(tiny).values())


def test_another_fault_is_not_taken_for_a_lack_of_memory(tiny, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(EsmFold2Model, "fold", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        fold(tiny, SHORT, QUICK)


def test_a_failure_keeps_nothing_of_the_fold(tiny, monkeypatch):
    held = []

    def fail(*_, **__):
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise RuntimeError("shapes differ") if len(held) > 1 else torch.OutOfMemoryError("full")

    monkeypatch.setattr(EsmFold2Model, "fold", fail)
    failures = fold_records(tiny, [SHORT, SHORT], QUICK, "off")
    for failure, words in zip(failures, ("do not fit", "RuntimeError: shapes differ"), strict=True):
        assert words in failure.message
        gc.collect()
        assert held[-1]() is None


def test_equal_seeds_give_equal_folds_and_other_seeds_do_not(tiny):
    record = Record("complex", "MQIFVKT:GKX")
    one, same, other = (fold(tiny, record, Settings(1, 1, 2, seed)) for seed in (3, 3, 4))
    assert not any(compare(one, same)[:-1])
    assert compare(one, same).coords_rmsd < 1e-6
    assert all(number > 0 for number in compare(one, other))


def test_outputs_follow_the_triangle_multiplications(tiny, tmp_path):
    stock = fold(tiny, SHORT, QUICK)
    swap_in(tiny, "ours", write_kernel_repository(tmp_path, ZERO_LAYER))
    without = compare(stock, fold(tiny, SHORT, QUICK))
    assert without.plddt_mean > 1e-3
    assert without.ptm > 1e-4
    assert without.distogram_max > 1e-2
    assert without.coords_rmsd > 1e-3


def test_numbers_that_are_not_finite_are_an_error(tiny, monkeypatch, tmp_path):
    swap_in(tiny, "ours", write_kernel_repository(tmp_path, NAN_LAYER))
    with pytest.raises(BrokenFoldError, match="short: the fold gave numbers that are not finite$"):
        fold(tiny, SHORT, QUICK)
    restore_stock(tiny)

    # Where the linear algebra swallows them, the outputs are looked at.
    intact = EsmFold2Model.fold

    def fold_with_infinity(model, **features):
        output = intact(model, **features)
        output.ptm[0] = float("inf")
        return output

    monkeypatch.setattr(EsmFold2Model, "fold", fold_with_infinity)
    half = tiny_model(dtype=torch.float16)
    with pytest.raises(BrokenFoldError, match="finite; float16 overflows where bfloat16 does not"):
        fold(half, SHORT, QUICK)


def test_result_has_the_shapes_and_ranges_that_it_promises(tiny):
    result = fold(tiny, SHORT, Settings(loops=0, samples=3, steps=2))
    length, atoms = len(SHORT.sequence), 91
    assert result.plddt.shape == (3, length)
    assert result.ptm.shape == (3,)
    assert result.coords.shape == (3, atoms, 3)
    assert result.distogram.shape == (length, length, 128)
    torch.testing.assert_close(result.distogram.sum(-1), torch.ones(length, length))
    assert result.iptm.tolist() == [0, 0, 0] and result.chain_iptm.shape == (3, 1, 1)
    assert result.pae.shape == result.pde.shape == (length, length)
    assert 0 < result.pae.min() < result.pae.max() < 32
    assert result.settings == Settings(0, 3, 2)
    assert result.best == result.ranked[0] == int(result.ptm.argmax())
    assert sorted(result.ranked, key=lambda sample: -result.ptm[sample]) == result.ranked
    assert result.mean_plddt == pytest.approx(float(result.plddt[result.best].mean()))
    assert 0 < result.plddt.min() < result.plddt.max() < 1
    assert 1.5 < result.expected_distances.min() < result.expected_distances.max() < 54.5
    assert result.seconds > 0
    assert set(result.summary()) == {
        "seconds", "peak_memory_bytes", "added_memory_bytes", "memory_meaning", "mean_plddt", "ptm",
        "iptm",
    }  # fmt: skip


def test_settings_left_open_are_the_models_own():
    config = EsmFold2Config()
    assert Settings(seed=7).resolved(config) == Settings(
        config.num_loops,
        config.structure_head.num_diffusion_samples,
        config.structure_head.inference_num_steps,
        7,
    )
    assert Settings(0, 1, 2, 3).resolved(config) == Settings(0, 1, 2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(loops=-1), "--loops must be at least 0; got -1"),
        (Settings(samples=0), "--samples must be at least 1; got 0"),
        (Settings(steps=0), "--steps must be at least 1; got 0"),
        (Settings(seed=-1), "--seed must be at least 0; got -1"),
    ],
)
def test_numbers_that_no_fold_can_use_are_refused(tiny, settings, message):
    with pytest.raises(UserError, match=message):
        fold(tiny, SHORT, settings)


def test_the_best_samples_errors_are_kept(tiny, monkeypatch):
    intact, outputs = EsmFold2Model.fold, []

    def keep(model, **features):
        outputs.append(intact(model, **features))
        return outputs[-1]

    monkeypatch.setattr(EsmFold2Model, "fold", keep)
    result = fold(tiny, Record("complex", "MQIFVKT:GKX"), Settings(0, 4, 2))
    (output,) = outputs
    scores = 0.8 * output.iptm + 0.2 * output.ptm
    assert result.best == int(scores.argmax())
    torch.testing.assert_close(result.ranking_scores, scores)
    assert torch.equal(result.pae, output.pae[result.best])
    assert torch.equal(result.pde, output.pde[result.best])
    assert torch.equal(result.chain_iptm, output.pair_chains_iptm)


def test_samples_of_a_complex_are_ranked_by_what_is_between_its_chains():
    ptm, iptm = torch.tensor([0.9, 0.5]), torch.tensor([0.1, 0.4])
    assert subject.ranking_scores(ptm, iptm, 1).tolist() == ptm.tolist()
    torch.testing.assert_close(subject.ranking_scores(ptm, iptm, 2), torch.tensor([0.26, 0.42]))


def test_bins_are_those_that_the_models_authors_use():
    centres = subject.distogram_bin_centres(EsmFold2Config())
    assert centres.shape == (128,)
    assert centres[[0, -1]].tolist() == [1.5, 54.5]
    width = 50 / 126
    torch.testing.assert_close(centres[1:-1], 2 + width * (torch.arange(126) + 0.5))


def test_rmsd_ignores_rotation_and_shift_but_not_reflection():
    torch.manual_seed(0)
    fixed = torch.randn(40, 3) * 10
    angle = 2.2
    rotation = torch.tensor(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
    )
    moved = fixed @ rotation[:, [2, 0, 1]] + torch.tensor([5.0, -3.0, 80.0])
    assert torch.linalg.det(rotation[:, [2, 0, 1]]) > 0
    assert subject.superposed_rmsd(moved, fixed) < 1e-4
    assert subject.superposed_rmsd(moved * torch.tensor([1.0, 1.0, -1.0]), fixed) > 1
    # Two points 2 apart against two points 4 apart: each is 1 off.
    pair = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    assert subject.superposed_rmsd(pair, 2 * pair) == pytest.approx(1.0)


def test_compare_measures_what_it_says(tiny):
    one, other = fold(tiny, SHORT, QUICK), fold(tiny, SHORT, QUICK)
    other.plddt = one.plddt + torch.tensor([0.1] * 6 + [-0.1] * 6)
    other.ptm = one.ptm - 0.25
    other.distogram = one.distogram.clone()
    other.distogram[2, 3, 5] += 0.5
    differences = compare(one, other)
    assert differences.plddt_of_means == pytest.approx(0, abs=1e-6)
    assert differences.plddt_mean == pytest.approx(0.1, rel=1e-5)
    assert differences.plddt_max == pytest.approx(0.1, rel=1e-5)
    assert differences.ptm == pytest.approx(0.25, rel=1e-5)
    assert differences.distogram_max == pytest.approx(0.5, rel=1e-5)
    assert differences.distogram_mean == pytest.approx(0.5 / one.distogram.numel(), rel=1e-5)
    assert differences.coords_rmsd < 1e-6


def test_our_layer_folds_as_the_stock_path_does(tiny):
    seen = []
    records = [SHORT, Record("other", "GGMQWYP")]
    outcomes = list(
        fold_records(
            tiny, records, QUICK, "ours", find_root(), compare_with_stock=True,
            progress=lambda label, done, total: seen.append((label, total)),
        )
    )  # fmt: skip
    assert [outcome.fold.record for outcome in outcomes] == records
    for outcome in outcomes:
        assert outcome.swap == (TINY_SITES, TINY_SITES)
        assert outcome.stock is not None
        differences = outcome.differences
        assert max(differences[:-1]) < 1e-4
        assert differences.coords_rmsd < 1e-2
        # A comparison of the stock path with itself would be exactly zero.
        assert differences.distogram_max > 0
    assert list(dict.fromkeys(seen)) == [
        ("short, warming up", 10),
        ("short, ours", 16),
        ("short, stock path", 16),
        ("other, ours", 16),
        ("other, stock path", 16),
    ]
    summary = outcomes[0].summary()
    assert summary["sites"] == {"swapped": TINY_SITES, "total": TINY_SITES}
    assert summary["stock"]["ptm"] == pytest.approx(summary["ptm"], abs=1e-4)


def test_without_a_comparison_each_protein_is_folded_once(tiny):
    (outcome,) = fold_records(tiny, [SHORT], QUICK, "off")
    assert outcome.swap == (0, TINY_SITES)
    assert outcome.stock is outcome.differences is None
    assert outcome.summary()["stock"] is None


def test_bf16_differences_stay_within_bf16s_own():
    # In bf16 the two paths round at different places; both are a rounding away from float32.
    model = random_model(CPU, torch.bfloat16, 0, tiny_config())
    (outcome,) = fold_records(model, [SHORT], QUICK, "ours", find_root(), compare_with_stock=True)
    assert 0 < outcome.differences.plddt_mean < 0.02
    assert outcome.differences.distogram_mean < 2e-3


@pytest.mark.kernels_ci
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "plddt"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_our_layer_folds_on_a_gpu_as_the_stock_path_does(dtype, plddt):
    model = random_model(torch.device("cuda", 0), dtype, 0, tiny_config())
    (outcome,) = fold_records(model, [SHORT], QUICK, "ours", find_root(), compare_with_stock=True)
    assert outcome.swap == (TINY_SITES, TINY_SITES)
    assert 0 < outcome.differences.plddt_mean < plddt
    assert outcome.fold.memory.meaning == "torch's cuda allocations"
    assert 0 < outcome.fold.memory.added_bytes < outcome.fold.memory.peak_bytes
