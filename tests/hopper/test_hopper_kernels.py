"""The Hopper variants beside the plain kernels and float64, on a GPU that runs them.

Nothing interprets Gluon, so that without such a GPU these are skipped; what the variants compile to
is looked at in tests/tools/test_resources.py.
"""

import copy
import dataclasses
import functools
import os
import random

import pytest
import torch
from gradients_of_calls import grad_of_output, gradients
from helpers import (
    SEED,
    as_call,
    assert_no_worse,
    make_problem,
    memory_of_no_numbers,
    reference,
    reference_gradients,
    relative_error,
    run,
    seeded,
)
from transitions import BIASES, make_transition

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)
pytestmark = [pytest.mark.kernels_ci, pytest.mark.usefixtures("watched")]
BF16, HALF = torch.bfloat16, torch.float16
BITS = {BF16: 8, HALF: 11}
STAGES = ("fused_dual_gemm", "fused_ln_residual", "swiglu_hidden", "fused_dual_gemm_bwd")


@pytest.fixture
def everywhere(submodule, monkeypatch, request):
    """The variants run whatever the length, where they take the call.

    With 128 channels stage 3 has three consumers, or the parameter `consumers` of the test.
    """
    called = getattr(request.node, "callspec", None)  # of a test with parameters
    narrow = 64 * (called.params.get("consumers", 3) if called else 3)
    settings = submodule("triton_parts.settings")
    launches = submodule("triton_path.launches")._launches
    original, table = settings._table, copy.deepcopy(settings._table("sm_90"))
    for stage in STAGES:
        entries = table[stage]["2"]
        entries.sort(key=lambda entry: entry.get("kernel", "") != "hopper")
        if stage == "fused_dual_gemm":  # the setting with three consumers
            assert entries[0]["block_m"] == 192
        if stage == "fused_ln_residual":
            entries.sort(key=lambda entry: entry["block_m"] != narrow or "kernel" not in entry)
            assert entries[0]["max_width"] == 128 and entries[0]["block_m"] == narrow
    monkeypatch.setattr(
        settings, "_table", lambda name: table if name == "sm_90" else original(name)
    )
    settings.pick_config.cache_clear()
    launches.clear()
    yield
    settings.pick_config.cache_clear()
    launches.clear()


@pytest.fixture
def hopper(submodule):
    return submodule("hopper")


def both_settings(calls):
    """(name, consumers of stage 3) of all calls: of those with 128 channels both."""
    return [
        (name, consumers)
        for name, call in calls.items()
        for consumers in ((2, 3) if "128" in str(call) else (3,))
    ]


CALLS = {
    "whole tiles": dict(length=64, channels=256, mask="bool", residual=True),
    "one pair": dict(length=1, channels=256, residual=True),
    "a tile and a pair": dict(length=65, channels=128, mask="soft", residual=True),
    "fewer than a tile": dict(length=17, channels=256, batch=3, direction="incoming", mask="soft"),
    "rows of padding": dict(length=100, channels=128, batch=2, mask="float", drop_mask=True),
    "biases": dict(length=77, channels=256, biases=True, direction="incoming"),
    "drop mask": dict(length=96, channels=256, residual=True, drop_mask=True, mask="expanded"),
    "incoming": dict(length=128, channels=128, direction="incoming", residual=True),
    "fewer hidden channels": dict(length=49, channels=256, hidden=128, mask="soft"),
    "more hidden channels": dict(length=66, channels=128, hidden=256, mask="bool", biases=True),
    "bfloat16 norms": dict(length=48, channels=256, norm_dtype=BF16, residual=True),
}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name, consumers", both_settings(CALLS))
def test_no_worse_than_the_plain_kernels(kernel, hopper, everywhere, name, consumers, dtype):
    problem = make_problem(dtype=dtype, **CALLS[name])
    got = run(kernel, problem, "cuda")
    assert torch.equal(got, run(kernel, problem, "cuda"))
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda")
    assert not torch.equal(got, plain) or got.numel() < 1000  # a variant ran
    assert_no_worse([(got, plain, reference(problem))], 1.0)


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("length, consumers", [(200, 2), (800, 3)])
def test_settings_of_128_channels(kernel, submodule, hopper, length, consumers, dtype):
    """As they are shipped, on both sides of the length where stage 3 has one consumer more."""
    problem = make_problem(length, 128, dtype=dtype, residual=True, mask="bool").to("cuda")
    config = submodule("triton_parts.launch").setting_of(
        "fused_ln_residual", problem.x, 128, length, 1, frozenset({"hopper"})
    )
    assert config.kernel == "hopper" and config.block_m == 64 * consumers
    got = run(kernel, problem, "cuda")
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda")
    assert_no_worse([(got, plain, problem.formula(torch.float64).cpu())], 1.0)


WIDE = {
    "three parts": dict(length=70, channels=192, mask="soft", residual=True),
    "two large parts": dict(length=65, channels=512, batch=2, mask="bool", direction="incoming"),
    "parts of 128": dict(length=33, channels=384, biases=True),
    "five parts": dict(length=64, channels=320, residual=True),
    "seven parts, few hidden": dict(length=50, channels=448, hidden=128),
    "many hidden": dict(length=40, channels=128, hidden=512, residual=True),
    "rows apart": dict(length=71, channels=384, batch=2, residual=True, drop_mask=True),
    "drop mask": dict(length=128, channels=512, residual=True, drop_mask=True, biases=True),
    "one pair": dict(length=1, channels=448, residual=True),
}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", WIDE)
def test_other_widths(kernel, hopper, everywhere, name, dtype):
    problem = make_problem(dtype=dtype, **WIDE[name])
    got = run(kernel, problem, "cuda")
    assert torch.equal(got, run(kernel, problem, "cuda"))
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda")
    assert not torch.equal(got, plain)
    assert_no_worse([(got, plain, reference(problem))], 1.0)


@pytest.mark.parametrize("channels", [192, 384, 512])
@pytest.mark.parametrize("dtype", BITS)
def test_constant_rows_of_other_widths_are_zeros(kernel, everywhere, channels, dtype):
    """Whose mean is not a sum times a power of two."""
    problem = make_problem(3, channels, dtype=dtype, mask="soft")
    problem.x = torch.zeros_like(problem.x)
    wanted = run(kernel, problem, "cuda")
    constants = torch.tensor(CONSTANTS[dtype]).to(dtype)
    problem.x = constants.view(1, 3, 3, 1).expand_as(problem.x).contiguous()
    assert torch.equal(run(kernel, problem, "cuda"), wanted)


@pytest.mark.parametrize("channels, dtype", [(512, BF16), (320, HALF)])
def test_lengths_of_wide_rows(kernel, submodule, hopper, everywhere, channels, dtype):
    problem = make_problem(140, channels, batch=2, dtype=dtype, residual=True)
    lengths = torch.tensor([140, 67])
    within = submodule("validation").pairs_within(lengths, 140)
    wanted = reference(dataclasses.replace(problem, mask=within))
    got = run(kernel, problem, "cuda", lengths=lengths.cuda()).cpu()
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda", lengths=lengths.cuda()).cpu()
    assert torch.equal(got[~within], plain[~within])
    assert_no_worse([(got[within], plain[within], wanted[within])], 1.0)


@pytest.mark.parametrize("layout", ["channels apart", "axes exchanged", "rows apart"])
def test_strides(kernel, hopper, everywhere, layout):
    problem = make_problem(70, 128, batch=2, dtype=BF16, mask="soft", residual=True).to("cuda")
    wanted = run(kernel, problem, "cuda")
    x, residual = problem.x, problem.residual
    lay = {
        "channels apart": lambda t: torch.cat([t, t], dim=-1)[..., :128],
        "axes exchanged": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "rows apart": lambda t: torch.cat([t, t], dim=2)[:, :, :70],
    }[layout]
    problem.x, problem.residual = lay(x), lay(residual)
    assert torch.equal(run(kernel, problem, "cuda"), wanted)


@pytest.mark.parametrize("own, dtype, channels, consumers", [
    (False, BF16, 256, 3), (True, BF16, 256, 3), (False, HALF, 256, 3), (False, BF16, 512, 3),
    (True, HALF, 320, 3), (False, BF16, 128, 2), (True, BF16, 128, 3),
])  # fmt: skip
def test_in_place(kernel, everywhere, own, dtype, channels, consumers):
    problem = make_problem(90, channels, dtype=dtype, mask="bool", residual=True).to("cuda")
    if not own:
        problem.residual = problem.x
    wanted = run(kernel, problem, "cuda")
    problem.residual = problem.residual.clone()
    if not own:
        problem.x = problem.residual
    got = run(kernel, problem, "cuda", inplace=True)
    assert got.data_ptr() == problem.residual.data_ptr() and torch.equal(got, wanted)


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("channels, length, dtype", [
    (128, 75, BF16), (256, 64, BF16), (128, 64, HALF), (256, 75, HALF)
])  # fmt: skip
def test_stage_1_writes_all_of_its_planes(
    submodule, hopper, everywhere, channels, length, dtype, direction
):
    """And the moments; padding columns are zeros."""
    problem = make_problem(length, channels, batch=2, dtype=dtype, mask="soft", direction=direction)
    call = as_call(submodule("_call"), problem.to("cuda"))
    stage, tiles = submodule("fused_dual_gemm"), submodule("triton_parts.tiles")
    make = submodule("triton_parts.launch").Launches
    shape = (2, 2, channels, length, tiles.padded_pitch(length))
    found = []
    for _ in range(2):
        planes = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
        launches = make()
        moments = stage.fused_dual_gemm_fwd(call, launches, planes.unbind(1))
        found.append((planes, moments, {launch.variant for launch in launches.values()}))
        if len(found) == 1:
            with hopper.without_variants():
                plain = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
                plain_moments = stage.fused_dual_gemm_fwd(call, make(), plain.unbind(1))
    (planes, moments, variants), (again, *_) = found
    assert "hopper" in variants and torch.equal(planes, again)
    assert not planes[..., length:].any()
    # Each has two roundings on the way, of an operand and of the result.
    assert relative_error(planes, plain.cpu().double()) <= 4 * 2 ** (-1 - BITS[dtype])
    inside = moments[..., :length], plain_moments[..., :length]
    torch.testing.assert_close(*inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("inplace", [False, True])
def test_lean_mode(kernel, hopper, everywhere, direction, inplace):
    """Stage 3 in steps, whose moments, incoming, begin at any address."""
    problem = make_problem(101, 128, batch=2, dtype=BF16, mask="soft", residual=True)
    problem.direction = direction

    def lean():
        mine = copy.copy(problem)
        mine.residual = problem.residual.clone()
        return run(kernel, mine, "cuda", memory="lean", inplace=inplace)

    problem = problem.to("cuda")
    got = lean()
    assert torch.equal(got, lean())
    with hopper.without_variants():
        plain = lean()
    assert not torch.equal(got, plain)
    assert_no_worse([(got, plain, reference(problem.to("cpu")))], 1.0)


def test_groups_of_a_batch(kernel, everywhere):
    """They share their launches, and the mask of each begins at another address."""
    problem = make_problem(257, 128, batch=8, dtype=BF16, mask="soft", residual=True).to("cuda")
    problem.mask = problem.mask.bfloat16()
    got = run(kernel, problem, "cuda")
    for entry in range(8):
        one = copy.copy(problem)
        one.x, one.mask, one.residual = (
            t[entry : entry + 1].clone() for t in (problem.x, problem.mask, problem.residual)
        )
        assert torch.equal(got[entry], run(kernel, one, "cuda")[0])


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_groups_of_channels(submodule, everywhere, direction):
    """Their planes have the bits that they have among all channels; the moments are made anew."""
    problem = make_problem(70, 256, dtype=BF16, mask="soft", direction=direction, biases=True)
    call = as_call(submodule("_call"), problem.to("cuda"))
    stage, make = submodule("fused_dual_gemm"), submodule("triton_parts.launch").Launches
    pitch = submodule("triton_parts.tiles").padded_pitch(70)
    poison = torch.full((1, 2, 256, 70, pitch), torch.nan, dtype=BF16, device="cuda")
    whole, part = poison.clone(), poison[:, :, :64].clone()
    moments = stage.fused_dual_gemm_fwd(call, make(), whole.unbind(1))
    for first in range(0, 256, 64):
        launches, group = make(), (first, 64)
        again = stage.fused_dual_gemm_fwd(
            call, launches, part.fill_(torch.nan).unbind(1), group, moments.clone()
        )
        assert "hopper" in {launch.variant for launch in launches.values()}
        assert torch.equal(part[..., :70], whole[:, :, first : first + 64, :, :70])
        assert torch.equal(again[..., :70], moments[..., :70])


CONSTANTS = {
    BF16: [1.0, 1000.0, -3e4, 1e30, 3e38, -1.0, 0.1, 0.0515, -3e38],
    HALF: [1.0, 1000.0, -3e4, 65504.0, 0.3334, -1.0, 12.34, 0.103, -65504.0],
}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("channels", [128, 256])
def test_constant_rows_are_zeros(kernel, everywhere, channels, dtype):
    """Bit for bit, from 16 sqrt(eps) on, which is 0.0506, in float16 from twice that."""
    problem = make_problem(3, channels, dtype=dtype, mask="soft")
    problem.x = torch.zeros_like(problem.x)
    wanted = run(kernel, problem, "cuda")
    constants = torch.tensor(CONSTANTS[dtype])
    problem.x = constants.to(dtype).view(1, 3, 3, 1).expand_as(problem.x).contiguous()
    assert torch.equal(run(kernel, problem, "cuda"), wanted)


@pytest.mark.parametrize("channels, length, dtype", [
    (128, 70, BF16), (256, 64, BF16), (128, 64, HALF), (256, 70, HALF),
    (320, 70, BF16), (512, 64, BF16), (384, 70, HALF),
])  # fmt: skip
def test_constant_rows_of_the_product_are_zeros(submodule, everywhere, channels, length, dtype):
    problem = make_problem(length, channels, dtype=dtype).to("cuda")
    call = as_call(submodule("_call"), problem)
    stage, make = submodule("fused_ln_residual"), submodule("triton_parts.launch").Launches
    pitch = submodule("triton_parts.tiles").padded_pitch(length)
    planes = torch.zeros(1, 2, channels, length, pitch, dtype=dtype, device="cuda")
    moments = submodule("fused_dual_gemm").fused_dual_gemm_fwd(call, make(), planes.unbind(1))
    launches, found = make(), []
    for constants in (torch.zeros(4), torch.tensor(CONSTANTS[dtype][:4])):
        product = torch.zeros(1, channels, length, pitch, dtype=dtype, device="cuda")
        product[..., :length:3] = constants.repeat(length)[: -(-length // 3)].to("cuda", dtype)
        found.append(torch.full_like(call.x, torch.nan))
        stage.fused_ln_residual_fwd(call, launches, product, moments, found[-1])
    assert launches["fused_ln_residual", 0].variant == "hopper" and torch.equal(*found)


def test_a_masked_pair_contributes_nothing(kernel, everywhere):
    """Whatever finite value it has: a variance that overflows, and products that would."""
    problem = make_problem(70, 256, dtype=BF16, mask="bool").to("cuda")
    wanted = run(kernel, problem, "cuda")
    signs = torch.ones(256, device="cuda").index_fill_(0, torch.arange(0, 256, 2).cuda(), -1.0)
    for size in (1e10, 1e25, 1e38):
        values = (size * signs).to(BF16)
        problem.x = torch.where(problem.mask[..., None], problem.x, values)
        got = run(kernel, problem, "cuda")
        assert torch.equal(got[problem.mask], wanted[problem.mask])


@pytest.mark.parametrize("far, dtype", [
    (0.0, BF16), (1.0, BF16), (1e3, BF16), (1e20, BF16),
    (1.0, HALF), (30.0, HALF), (70.0, HALF), (1e3, HALF), (6e4, HALF),
])  # fmt: skip
def test_constant_rows_and_rows_far_from_zero(kernel, hopper, everywhere, far, dtype):
    problem = make_problem(64, 256, dtype=dtype)
    problem.x = (problem.x.float() + far).to(dtype)
    problem.x[:, :, ::2] = far
    got = run(kernel, problem, "cuda")
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda")
    # Where values of a row differ in their last bits alone, sums of products lose some.
    assert_no_worse([(got, plain, reference(problem))], 1.1)


def test_outliers_in_float16(kernel, hopper, everywhere):
    """Of rows far from zero, in a channel the other end of the range."""
    problem = make_problem(64, 256, dtype=HALF, residual=True)
    problem.x = (problem.x.float() * 100 + 4e4).to(HALF)
    problem.x[..., 17] = -65504.0
    problem.x[..., ::2, 99] = 65504.0
    got = run(kernel, problem, "cuda")
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda")
    assert_no_worse([(got, plain, reference(problem))], 1.1)


@pytest.mark.parametrize("size", [1e-4, 1e3])
def test_norm_weights_of_any_size_in_float16(kernel, hopper, everywhere, size):
    """What they are folded into keeps its bits."""
    problem = make_problem(64, 256, dtype=HALF, mask="soft")
    for name, weight in problem.weights.items():
        scaled = weight.double() * (size if name.startswith("norm") else 1 / size)
        problem.weights[name] = scaled.to(weight.dtype)
    got = run(kernel, problem, "cuda")
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda")
    assert_no_worse([(got, plain, reference(problem))], 1.0)


def test_what_overflows_in_float16(kernel, hopper, everywhere):
    """Infinity, as from the plain kernels: nothing is clamped."""
    problem = make_problem(64, 256, dtype=HALF, residual=True)
    problem.residual *= 2e4
    problem.weights["p_out_weight"] *= 2e4
    got = run(kernel, problem, "cuda")
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda")
    differ = got.isinf() != plain.isinf()
    assert got.isinf().any() and not got.isnan().any()
    # Where they differ one of the two lies beside the greatest number.
    assert got[differ].abs().ge(65000).all() and plain[differ].abs().ge(65000).all()


TRANSITIONS = {
    "rows": dict(shape=(300, 256), hidden=1024, residual="own"),
    "one row": dict(shape=(1, 128), hidden=512, residual="own"),
    "biases": dict(shape=(3, 11, 13, 256), hidden=512, biases=BIASES),
    "narrow": dict(shape=(130, 128), hidden=448),
    "wide": dict(shape=(200, 512), hidden=2048, residual="own"),
    "between": dict(shape=(129, 384), hidden=1536),
}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions(kernel, hopper, everywhere, name, dtype):
    problem = make_transition(dtype=dtype, **TRANSITIONS[name])
    got = run(kernel, problem, "cuda")
    assert torch.equal(got, run(kernel, problem, "cuda"))
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda")
    assert_no_worse([(got, plain, reference(problem))], 1.0)


def test_a_transition_of_rows_apart(kernel, everywhere):
    problem = make_transition((3, 40, 30, 256), 512, dtype=BF16).to("cuda")
    wanted = run(kernel, problem, "cuda")
    problem.x = problem.x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(kernel, problem, "cuda"), wanted)


LENGTHS = {
    "whole, a part, one and none": (
        dict(length=200, channels=256, batch=4, residual=True), [200, 129, 1, 0],
    ),
    "ragged": (dict(length=150, channels=128, batch=3, mask="soft"), [64, 149, 65]),
    "incoming": (
        dict(length=140, channels=256, batch=2, direction="incoming", mask="bool", residual=True,
             drop_mask=True), [77, 128],
    ),
    "incoming, narrow": (dict(length=260, channels=128, direction="incoming", biases=True), [131]),
    "many": (dict(length=70, channels=128, batch=40, residual=True), [*range(1, 81, 2)]),
}  # fmt: skip


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name, consumers", both_settings(LENGTHS))
def test_lengths(kernel, submodule, hopper, everywhere, name, consumers, dtype):
    """Padding, which is NaN here, has the residual or zeros; memory that isn't written is NaN."""
    options, lengths = LENGTHS[name]
    problem, lengths = make_problem(dtype=dtype, **options), torch.tensor(lengths)
    within = submodule("validation").pairs_within(lengths, options["length"])
    mask = within if problem.mask is None else problem.mask * within
    wanted = reference(dataclasses.replace(problem, mask=mask))
    problem.x = torch.where(within[..., None], problem.x, torch.nan)
    lengths = lengths.cuda()
    with memory_of_no_numbers():
        got, again = (run(kernel, problem, "cuda", lengths=lengths).cpu() for _ in range(2))
        with hopper.without_variants():
            plain = run(kernel, problem, "cuda", lengths=lengths).cpu()
    assert torch.equal(got, again) and not torch.equal(got[within], plain[within])
    assert torch.equal(got[~within], plain[~within])
    assert_no_worse([(got[within], plain[within], wanted[within])], 1.0)
    if problem.residual is not None:
        over = problem.to("cuda")
        out = run(kernel, over, "cuda", lengths=lengths, inplace=True)
        assert out.data_ptr() == over.residual.data_ptr() and torch.equal(out.cpu(), got)


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_zeros_behind_a_length(submodule, everywhere, direction):
    """Stage 1 writes what stage 2 reads: as far as the next multiple of 128, in both axes."""
    problem = make_problem(300, 128, batch=2, dtype=HALF, direction=direction).to("cuda")
    lengths = torch.tensor([130, 65], dtype=torch.int32, device="cuda")
    call = as_call(submodule("_call"), problem, lengths=lengths)
    planes = torch.full((2, 2, 128, 300, 304), torch.nan, dtype=HALF, device="cuda")
    launches = submodule("triton_parts.launch").Launches()
    submodule("fused_dual_gemm").fused_dual_gemm_fwd(call, launches, planes.unbind(1))
    assert "hopper" in {launch.variant for launch in launches.values()}
    for of_entry, length, end in zip(planes, (130, 65), (256, 128), strict=True):
        written = of_entry[..., :end, :end]
        assert written.isfinite().all() and written[..., :length, :length].all(0).any()
        assert not written[..., length:, :].any() and not written[..., length:].any()
        assert of_entry[..., end:, :].isnan().all()  # skipped


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_lengths_in_lean_mode(kernel, submodule, everywhere, direction):
    """Stage 3 in steps of rows."""
    problem = make_problem(190, 256, batch=2, dtype=BF16, residual=True, direction=direction)
    problem, lengths = problem.to("cuda"), torch.tensor([190, 70], device="cuda")
    within = submodule("validation").pairs_within(lengths, 190)
    got = run(kernel, problem, "cuda", lengths=lengths, memory="lean")
    assert torch.equal(got[~within], problem.residual[~within])
    wanted = run(kernel, problem, "cuda", lengths=lengths)
    # Stage 1 is the plain one, of groups of channels.
    assert relative_error(got, wanted.cpu().double()) <= 4 * 2**-9


@pytest.mark.parametrize("dtype", BITS)
def test_lengths_of_a_transition(kernel, submodule, hopper, everywhere, dtype):
    """In two chunks of rows, of which the second begins within the lengths."""
    problem = make_transition(
        (2, 200, 200, 256), 1024, dtype=dtype, residual="own", lengths=[200, 131]
    )  # fmt: skip
    within = submodule("validation").pairs_within(problem.lengths, 200)
    wanted = reference(problem)
    problem.x = torch.where(within[..., None], problem.x, torch.nan)
    with memory_of_no_numbers():
        got, again = (run(kernel, problem, "cuda").cpu() for _ in range(2))
        with hopper.without_variants():
            plain = run(kernel, problem, "cuda").cpu()
    assert torch.equal(got, again) and not torch.equal(got[within], plain[within])
    assert torch.equal(got[~within], problem.residual[~within])
    assert_no_worse([(got[within], plain[within], wanted[within])], 1.0)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_a_rank(submodule, everywhere, padded):
    """Stages 1 and 3 on rows of a sequence have the bits of those on all rows."""
    problem = make_problem(150, 256, dtype=BF16, mask="soft", residual=True).to("cuda")
    lengths = torch.tensor([140], dtype=torch.int32, device="cuda") if padded else None
    call = as_call(submodule("_call"), problem, lengths=lengths)
    rows = submodule("triton_path.rows")
    launches = submodule("triton_path.launches")._launches
    made, product = [], torch.randn(256, 150, 160, device="cuda").to(BF16)
    for parts in ([slice(0, 150)], [slice(0, 60), slice(60, 150)]):
        planes = torch.zeros(2, 256, 150, 160, dtype=BF16, device="cuda")
        out = torch.full_like(problem.x, torch.nan)[0]
        for part in parts:
            size = part.stop - part.start
            some = call._replace(
                x=call.x[:, part], mask=call.mask[:, part], residual=call.residual[:, part]
            )
            own = torch.zeros(2, 256, size, 160, dtype=BF16, device="cuda")
            with rows.stages(some, part.start) as stages:
                stages.project(0, own)
                stages.emit(0, product[:, part].contiguous(), out[part])
            planes[:, :, part] = own
        made.append((planes, out))
    assert all(map(torch.equal, *made))
    variants = [launch.variant for of in launches.values() for launch in of.values()]
    assert variants.count("hopper") == 6


@pytest.mark.parametrize("dtype", BITS)
def test_gradients_after_a_variant(kernel, hopper, everywhere, dtype):
    """The backward reads the moments and the product that the variants left."""
    problem = make_problem(66, 128, dtype=dtype, mask="soft").to("cuda")
    grad = torch.randn(problem.x.shape, generator=seeded(5)).to("cuda", dtype)

    def gradients():
        x = problem.x.clone().requires_grad_()
        weights = {n: w.clone().requires_grad_() for n, w in problem.weights.items()}
        out = kernel.triangle_multiplicative_update(x, "outgoing", problem.mask, **weights)
        return torch.autograd.grad(out, [x, *weights.values()], grad)

    got = gradients()
    with hopper.without_variants():
        plain = gradients()
    for mine, its in zip(got, plain, strict=True):
        # The product alone differs, by its roundings.
        assert relative_error(mine, its.cpu().double()) <= 4 * 2 ** -BITS[dtype]


BACKWARDS = {
    "whole tiles": dict(length=64, channels=256, mask="bool"),
    "a tile and a pair": dict(length=65, channels=128, mask="soft"),
    "fewer than a tile": dict(length=17, channels=256, direction="incoming"),
    "rows of padding": dict(length=100, channels=256, mask="float", direction="incoming"),
    "biases": dict(length=128, channels=128, biases=True, mask="expanded"),
    "more hidden channels": dict(length=72, channels=128, hidden=256, mask="bool"),
}


@pytest.mark.parametrize("name", BACKWARDS)
@pytest.mark.parametrize("beyond", [0, 32])
@pytest.mark.parametrize("parameters", [False, True])
def test_stage_1_backward(submodule, hopper, everywhere, name, beyond, parameters):
    """Of some rows of a sequence, in memory of NaN, as are the padding columns of the planes."""
    problem = make_problem(dtype=BF16, **BACKWARDS[name])
    call = as_call(submodule("_call"), problem.to("cuda"))
    stage, forward = submodule("triton_path.fused_dual_gemm_backward"), submodule("fused_dual_gemm")
    make = submodule("triton_parts.launch").Launches
    length, channels, hidden = call.x.shape[1], call.x.shape[3], call.hidden
    pitch = submodule("triton_parts.tiles").padded_pitch(length)

    def nan(*shape, dtype=BF16):
        return torch.full(shape, torch.nan, dtype=dtype, device="cuda")

    scratch = nan(1, 2, hidden, length, pitch)
    moments = forward.fused_dual_gemm_fwd(call, make(), scratch.unbind(1))
    moments = forward.with_axes_of_x(moments, call.direction)[0, :, :length, :length]
    rows = slice(length // 3, length - length // 4)
    grad = torch.randn(2, hidden, length, length, generator=seeded(3)).to(BF16)
    planes = nan(2, hidden + beyond, length, pitch)  # those of a and of b, not one behind the other
    planes[:, :hidden, :, :length] = grad.cuda()
    planes = planes.flatten(0, 1)
    x, mask = call.x[0, rows], None if call.mask is None else call.mask[0, rows]
    given = x, mask, moments[:, rows], planes[:, rows]
    wanted = frozenset({"grads", "hat_x", "sums"} if parameters else {"grads"})
    pairs = x.shape[0] * length

    def gradients():
        prepared = stage.prepare_dual_gemm_bwd(call, *given, hidden + beyond, wanted)
        out = stage.Stage1Gradients(
            nan(pairs, 4 * hidden),
            nan(pairs, channels) if parameters else None,
            None,
            nan(stage.rows_of_sums(prepared), 4 * hidden, dtype=torch.float32)
            if parameters else None,
        )  # fmt: skip
        folds = stage.Folds(make(), call.weights)
        stage.fused_dual_gemm_bwd(call, *given, prepared, out, folds)
        found = [out.grads] + ([out.hat_x, out.sums.sum(0)] if parameters else [])
        return [tensor.cpu() for tensor in found], prepared.variant

    got, variant = gradients()
    again, _ = gradients()
    assert variant == "hopper" and all(map(torch.equal, got, again))
    with hopper.without_variants():
        plain, variant = gradients()
    assert variant == ""

    w = {key: v.double().cpu() for key, v in (problem.weights | problem.biases).items()}
    x, grad = problem.x[0, rows].double().cpu(), grad[:, :, rows].double()
    hat = torch.nn.functional.layer_norm(x, (channels,), eps=1e-5)
    z = hat * w["norm_in_weight"] + w["norm_in_bias"]
    p = torch.nn.functional.linear(z, w["p_in_weight"], w.get("p_in_bias"))
    s = torch.nn.functional.linear(z, w["g_in_weight"], w.get("g_in_bias")).sigmoid()
    dp = grad.permute(2, 3, 0, 1).flatten(2) * s
    if problem.mask is not None:
        dp = dp * problem.mask[0, rows].double().cpu()[..., None]
    made = torch.cat([dp, dp * p * (1 - s)], -1).flatten(0, 1)
    oracle = [made] + ([hat.flatten(0, 1), made.sum(0)] if parameters else [])
    for mine, its, exact in zip(got, plain, oracle, strict=True):
        assert_no_worse([(mine, its, exact)], 1.0)


def test_in_a_cuda_graph(kernel, everywhere):
    problem = make_problem(80, 256, dtype=BF16, mask="bool", residual=True).to("cuda")
    wanted = run(kernel, problem, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(kernel, problem, "cuda")
    got.fill_(torch.nan)
    graph.replay()
    assert torch.equal(got, wanted)


WIDTHS = [(128, 128), (256, 256), (192, 192), (384, 384), (512, 512), (256, 128), (128, 256)]
FORMS = 5  # of a width's calls: each compiles anew


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("channels, hidden", WIDTHS)
def test_any_calls(kernel, submodule, hopper, everywhere, channels, hidden, dtype):
    """FUZZ_CASES random calls in all, 280 by default; a fifth of them has gradients.

    A call's error is at most twice the plain kernels', and all calls' together at most 1.1 times.
    """
    draw = random.Random(f"{SEED} {channels} {hidden} {dtype}")
    forms = [
        dict(
            direction=draw.choice(("outgoing", "incoming")),
            mask=draw.choice((None, "bool", "float", "soft", "expanded")),
            residual=draw.random() < 0.7, drop_mask=draw.random() < 0.3,
            norm_dtype=draw.choice((torch.float32, dtype)),
        )
        for _ in range(FORMS)
    ]  # fmt: skip
    forms[1] |= dict(biases=True, residual=False, drop_mask=False)
    number, calls = int(os.environ.get("FUZZ_CASES", 280)) // (len(WIDTHS) * len(BITS)), []
    for seed in range(number):
        form = seed % FORMS
        longest = 60 if form == 2 else draw.choice((40, 70, 130, 200))
        problem = make_problem(
            draw.randint(1, longest), channels, hidden, dtype=dtype, seed=1000 + seed,
            batch=draw.randint(1, 3), **forms[form],
        )  # fmt: skip
        run_form = _gradients if form == 2 else functools.partial(_outputs, draw, form == 3)
        got, plain, exact = run_form(kernel, submodule, hopper, problem)
        for name in [name for name, of in exact.items() if not of.any()]:
            assert not got.pop(name).any(), (seed, name)
            del exact[name]
        calls.append((got, plain, exact))
        try:
            assert_no_worse(calls[-1:], 2.0)
        except AssertionError as error:
            raise AssertionError(f"call {seed} of {tuple(problem.x.shape)}: {error}") from error
    assert_no_worse(calls, 1.1)


def _outputs(draw, with_lengths, kernel, submodule, hopper, problem):
    """Of the variants, of the plain kernels, and in float64."""
    problem = problem.to("cuda")
    batch, length = problem.x.shape[:2]
    options, wanted = {"memory": draw.choice(("default", "lean"))}, problem
    within = torch.ones(batch, length, length, dtype=torch.bool, device="cuda")
    if with_lengths:
        lengths = torch.tensor([draw.randint(0, length) for _ in range(batch)], device="cuda")
        options["lengths"] = lengths
        within = submodule("validation").pairs_within(lengths, length)
        mask = within if problem.mask is None else within * problem.mask
        wanted = dataclasses.replace(problem, mask=mask)
    with memory_of_no_numbers():
        got, again = (run(kernel, problem, "cuda", **options) for _ in range(2))
    assert torch.equal(got, again)
    with hopper.without_variants():
        plain = run(kernel, problem, "cuda", **options)
    return [{"": of[within].cpu()} for of in (got, plain, wanted.formula(torch.float64))]


def _gradients(kernel, submodule, hopper, problem):
    got = gradients(kernel, problem, "cuda")
    with hopper.without_variants():
        plain = gradients(kernel, problem, "cuda")
    return got, plain, reference_gradients(problem, grad_of_output(problem))
