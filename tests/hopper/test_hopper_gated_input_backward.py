"""The Hopper kernel for stage 1's whole backward: what it takes, its steps, and on a GPU gradients.

The steps run in `gluon_emulator`.
"""

import contextlib
import json

import pytest
import torch
from esmfold2_trimul_tools.resources import MAX_TILE_SPILL_BYTES
from fresh_process import python_output
from gradients_of_calls import grad_of_output, gradients
from helpers import (
    SEED,
    assert_no_worse,
    leaves_of,
    make_problem,
    memory_of_no_numbers,
    ran,
    reference_gradients,
)

pytest.importorskip("triton")
BF16 = torch.bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
pytestmark = [pytest.mark.kernels_ci, pytest.mark.usefixtures("watched")]

# In a process without TRITON_INTERPRET: the variants of the launches of stage 1's backward, and how
# many launches there are for dx and in all, by case.
TAKEN = """
import json, sys, torch
from esmfold2_trimul_tools import resources
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
path, device, call_, rehearsal, settings, whole = (
    submodule(package, name) for name in (
        "triton_path", "triton_parts.device", "_call", "triton_parts.rehearsal",
        "triton_parts.settings", "hopper.gated_input_backward",
    )
)
ALL = {"x", *[name for name in call_.Weights._fields if not name.endswith("bias")]}


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def call_of(
    channels=256, hidden=None, length=512, dtype=torch.bfloat16, lengths=False, pitch=0, batch=1,
    first=0, gap=0, **others
):
    hidden = hidden or channels
    norms = [empty(width, dtype=torch.float32) for width in (channels, hidden)]
    shapes = dict(p_in=(2 * hidden, channels), g_in=(2 * hidden, channels),
                  p_out=(channels, hidden), g_out=(channels, channels))
    weights = {
        name + "_weight": empty(rows, width + pitch, dtype=dtype)[:, :width]
        for name, (rows, width) in shapes.items()
    }
    weights |= dict(norm_in_weight=norms[0], norm_out_weight=norms[1])
    mask = empty(batch, length, length, dtype=torch.float32)
    size = length**2 * channels
    x = empty(batch, size + gap + first, dtype=dtype)[:, first : first + size]
    given = dict(
        x=x.view(batch, length, length, channels), direction="outgoing", mask=mask,
        residual=None, drop_mask=None, eps_in=1e-5, eps_out=1e-5, precision="fp32",
        memory="default", recompute="none", inplace=False,
        lengths=empty(batch, dtype=torch.int32) if lengths else None,
        weights=call_.Weights(**{name: weights.get(name) for name in call_.Weights._fields}),
    )
    return call_.Call(**given | others)


def launched(needs=ALL, target="sm_90", **others):
    call = call_of(**others)
    shapes, keeps = path.saved_shapes(call), call.keeps_planes
    with rehearsal.rehearsal(device.target_of(target, "any", 132)) as launches, torch.no_grad():
        product, moments, planes = (
            empty(*shape, dtype=kind)
            for shape, kind in zip(shapes, (call.x.dtype, torch.float32, call.x.dtype))
        )
        planes = planes if keeps else None
        needs = frozenset(needs)
        path.run_backward(call, call.x, product, moments, planes, needs, launches)
    return launches.launched


def taken(*given, **others):
    made = [launch for launch, _ in launched(*given, **others)]
    of_stage = [one.variant for one in made if one.stage == "fused_dual_gemm_bwd"]
    scaled = [one.constants["SCALED"] for one in made if "SCALED" in one.constants]
    return [of_stage, sum(one.stage == "input_bwd" for one in made), len(made), scaled]


if sys.argv[1:]:  # what one compiles to
    case = dict(json.loads(sys.argv[1]))
    found = launched(ALL - {"x"} if case.pop("parameters") else {"x"}, **case)
    (launch, tensors), *_ = [one for one in found if one[0].stage == "fused_dual_gemm_bwd"]
    with resources._compiling_for("sm_90"):
        (code,) = resources.read_machine_code([launch.compile(**tensors)])
    print(json.dumps([launch.variant, code.spill_bytes, code.shared_bytes, code.pipelined]))
    sys.exit()
refused = []
for stages, split in ((3, 3), (8, 1)):
    rows = empty(64, 64, 256)
    config = settings.LaunchConfig(128, 64, 64, 4, stages, split=split, kernel="whole")
    try:
        whole.prepare(
            call_of(), rows, None, empty(2, 64, 64), empty(512, 64, 64), 256, True, config
        )
    except ValueError as error:
        refused.append(str(error))
print(json.dumps({
    "wide": taken(),
    "narrow": taken(channels=128),
    "one chunk": taken(length=256),
    "ragged": taken(length=383),
    "incoming": taken(direction="incoming"),
    "a and b again": taken(recompute="product"),
    "x alone": taken(needs={"x"}),
    "parameters alone": taken(needs=ALL - {"x"}),
    "a mask's gradient": taken(needs=ALL | {"mask"}),
    "other hidden channels": taken(hidden=128),
    "padded": taken(lengths=True),
    "float16": taken(dtype=torch.float16),
    "float32": taken(dtype=torch.float32),
    "another width": taken(channels=192),
    "another GPU": taken(target="sm_100"),
    "rows of weights apart": taken(pitch=8),
    "weights anywhere": taken(pitch=4),
    "x anywhere": taken(first=4),
    "sequences anywhere": taken(batch=2, gap=4, recompute="product"),
    "refused": refused,
}))
"""
# Stage 1's launches, and all of the backward; chunks of one size share theirs.
TAKEN_BY = {
    "wide": (2, 11), "narrow": (2, 11), "one chunk": (1, 9), "ragged": (2, 11),
    "incoming": (2, 11), "a and b again": (2, None), "x alone": (1, None),
    "rows of weights apart": (2, 11),
}  # fmt: skip


def test_what_it_takes():
    """There dx has no launch of its own; without gradients of parameters there is one chunk."""
    found = json.loads(python_output(TAKEN))
    refused = found.pop("refused")
    assert len(refused) == 2 and all("got LaunchConfig" in of for of in refused)
    assert len(found) == 19
    for name, (of_stage, for_x, launches, scaled) in found.items():
        assert scaled == ([] if name == "x alone" else [name in TAKEN_BY]), name
        if name in TAKEN_BY:
            count, total = TAKEN_BY[name]
            assert of_stage == ["whole"] * count and for_x == 0, (name, of_stage)
            assert launches == total or total is None, (name, launches)
        else:
            assert of_stage and "whole" not in of_stage, name
            assert for_x == (0 if name == "parameters alone" else len(of_stage)), name


# In a process whose Gluon is the emulator's.
EMULATED = """
import gluon_emulator

gluon_emulator.install()
import whole_stage_1_backward

whole_stage_1_backward.main()
"""
# Tiles that end in a row, in several, or beyond the last pair.
STEPS = {
    "whole tiles": dict(length=16, channels=128, mask="bool", split=5),
    "a tile and a pair": dict(length=65, channels=128, mask="soft", stages=4, split=2, programs=2),
    "rows of padding": dict(length=21, channels=256, mask="bool", direction="incoming"),
    "planes apart": dict(length=24, channels=256, beyond=64, biases=True, split=2),
    "dx alone": dict(length=24, channels=128, parameters=False, programs=2),
    "a norm of zeros": dict(length=17, channels=256, zero_norm=True, stages=5),
    "rows without a norm": dict(length=18, channels=128, overflow=True),
    "an outlier": dict(length=18, channels=256, outlier=300.0, mask="soft"),
}
EARLY = "    mbarrier.arrive(x_empty.index(ME)); _to_grad_x("
# Frees that come too early, and waits that are left out: what is replaced in the kernel's text.
CHANGES = {
    "a half's memory": ("tma.store_wait(0)  # the half before has left its memory", "pass"),
    "a step's memory": ("tma.store_wait(0)  # so has the second half", "pass"),
    "dq's memory": ("tma.store_wait(0)\n            grad_z", "pass\n            grad_z"),
    "dx's memory": ("tma.store_wait(0)\n        mbarrier", "mbarrier"),
    "x^ g1": ("    _to_grad_x(", EARLY),
    "weights": ("mbarrier.wait(full.index(stage), phase)\n            added", "added"),
    "x": ("mbarrier.wait(x_full.index(ME), tile_phase)", "pass"),
}


def test_steps_in_an_emulator():
    """Roundings alone are left: two of them at most in dg and dx; and it sees what is too early."""
    arguments = json.dumps(STEPS), json.dumps(CHANGES)
    found, seen = json.loads(python_output(EMULATED, *arguments))
    assert set(found) == set(STEPS) and set(seen) == set(CHANGES)
    for name, errors in found.items():
        assert errors["x"] <= 2**-8 and errors["channels"] <= 2**-7, name
        if STEPS[name].get("parameters", True):
            of_one = "outlier" in STEPS[name]  # whose rounding is that of nearly all of a row
            assert errors["dq"] == 0.0 and errors["normal"] <= (2**-8 if of_one else 2**-9), name
            assert errors["dp"] <= 2**-8 and errors["dg"] <= 2**-8, name
    for name, error in seen.items():
        assert isinstance(error, str) or not error <= 0.1, name


@pytest.mark.parametrize("channels, parameters, variant", [
    (256, False, "whole"), (256, True, "hopper"), (128, True, "hopper"),
])  # fmt: skip
def test_what_the_others_compile_to(channels, parameters, variant):
    """dx alone, and the kernel of dp and dg: what is no part of a step with all gradients."""
    case = json.dumps({"channels": channels, "parameters": parameters})
    found = json.loads(python_output(TAKEN, case))
    made, spills, shared, pipelined = found
    assert made == variant and shared <= 232448 and pipelined
    assert spills <= (MAX_TILE_SPILL_BYTES if variant == "whole" else 0)


@pytest.fixture
def both(kernel, submodule):
    """both(problem, names=None, **options): the gradients, and the plain kernels'.

    Of all but the mask, whose gradient has another kernel, or of `names`.
    """

    def compute(problem, names=None, **options):
        found, names = [], names or [name for name in leaves_of(problem) if name != "mask"]
        for plain in (False, True):
            launches = submodule("triton_path.launches")._launches
            launches.clear()
            context = submodule("hopper").without_variants() if plain else contextlib.nullcontext()
            with context:
                made = gradients(kernel, problem, "cuda", names, **options)
            whole = [ran(one, "fused_dual_gemm_bwd", "whole") for one in launches.values()]
            assert plain != any(whole)
            found.append({name: value.cpu() for name, value in made.items()})
        return found

    return compute


CALLS = {
    "whole tiles": dict(length=64, channels=256, mask="bool"),
    "one pair": dict(length=1, channels=256),
    "a tile and a pair": dict(length=65, channels=128, mask="soft"),
    "fewer than a tile": dict(length=17, channels=256, batch=3, direction="incoming", mask="float"),
    "rows of padding": dict(length=100, channels=256, mask="expanded", direction="incoming"),
    "biases": dict(length=77, channels=256, biases=True),
    "bfloat16 norms": dict(length=48, channels=128, norm_dtype=BF16, residual=True),
    "many tiles": dict(length=300, channels=128, mask="bool"),
    "many tiles, wide": dict(length=261, channels=256, mask="bool", direction="incoming"),
    "several sequences": dict(length=70, channels=128, batch=4, drop_mask=True),
}


@on_hopper
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("name", CALLS)
def test_no_worse_than_the_plain_kernels(both, name, recompute):
    problem = make_problem(dtype=BF16, **CALLS[name])
    with memory_of_no_numbers():
        got, plain = both(problem, recompute=recompute)
    # One pair's roundings are of few numbers, and by chance larger or smaller.
    factor = 1.02 if problem.x[..., 0].numel() > 1 else 1.25
    assert_no_worse([(got, plain, exact_of(problem, got))], factor)


def exact_of(problem, names):
    exact = reference_gradients(problem, grad_of_output(problem))
    return {name: exact[name] for name in names}


@on_hopper
@pytest.mark.parametrize("channels, length", [(128, 512), (256, 384)])
def test_equal_calls_give_equal_bits(kernel, channels, length):
    """Over programs with many tiles, whose loads run ahead of the products."""
    problem = make_problem(length, channels, dtype=BF16, mask="bool", seed=SEED).to("cuda")
    wanted = gradients(kernel, problem, "cuda")
    for _ in range(20):
        got = gradients(kernel, problem, "cuda")
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@on_hopper
@pytest.mark.parametrize("channels", [128, 256])
def test_dx_alone_has_the_bits_of_all(both, channels):
    problem = make_problem(130, channels, dtype=BF16, mask="soft")
    (together, _), (alone, _) = both(problem), both(problem, ("x",))
    assert torch.equal(alone["x"], together["x"])


@on_hopper
@pytest.mark.parametrize("channels", [128, 256])
def test_constant_rows(both, channels):
    problem = make_problem(70, channels, dtype=BF16)
    problem.x[:, ::3] = 3.0
    got, plain = both(problem)
    assert_no_worse([(got, plain, exact_of(problem, got))], 1.1)


@on_hopper
@pytest.mark.parametrize("channels", [128, 256])
def test_norms_with_zeros(both, channels):
    """x^ is made of x^ g1 again; where g1 is 0, or all of it, no gradient is lost or made up."""
    problem = make_problem(70, channels, dtype=BF16, mask="bool")
    weight = problem.weights["norm_in_weight"]
    weight[::5], weight[1::5] = 0.0, -1e-30
    got, plain = both(problem)
    assert_no_worse([(got, plain, exact_of(problem, got))], 1.1)
    weight.zero_()
    got, plain = both(problem)
    exact = exact_of(problem, got)
    for name in [name for name, of in exact.items() if not of.any()]:
        assert not plain.pop(name).any() and got.pop(name).abs().max() < 1e-18, name
        del exact[name]
    assert_no_worse([(got, plain, exact)], 1.1)
