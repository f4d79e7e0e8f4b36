"""The Hopper variant of the transition's backward: what it takes; on a GPU, its gradients."""

import contextlib
import json

import pytest
import torch
from fresh_process import python_output
from gradients_of_calls import grad_of_output
from helpers import (
    assert_no_worse,
    leaves_of,
    memory_of_no_numbers,
    ran,
    reference_gradients,
    with_leaves,
)
from transitions import BIASES, NORMS, make_transition

pytest.importorskip("triton")
BF16, HALF = torch.bfloat16, torch.float16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
pytestmark = [pytest.mark.kernels_ci, pytest.mark.usefixtures("watched")]

# In a process without TRITON_INTERPRET: the launches of a step, by case, and the variants of them.
TAKEN = """
import json, torch
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
path, device, call_, rehearsal = (
    submodule(package, name)
    for name in ("triton_path", "triton_parts.device", "_call", "triton_parts.rehearsal")
)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def call_of(channels, hidden, dtype, pitch, bias):
    weights = {
        "norm_weight": empty(channels, dtype=torch.float32),
        "gate_weight": empty(hidden, channels, dtype=dtype),
        "up_weight": empty(hidden, channels, dtype=dtype),
        "down_weight": empty(channels, hidden + pitch, dtype=dtype)[:, :hidden],
        "down_bias": empty(channels, dtype=dtype) if bias else None,
    }
    names = call_.TransitionWeights._fields
    return call_.Transition(
        x=empty(1, 40, 40, channels, dtype=dtype), residual=None, eps=1e-5, precision="fp32",
        inplace=False, lengths=None,
        weights=call_.TransitionWeights(**{name: weights.get(name) for name in names}),
    )


def taken(channels=256, hidden=None, dtype=torch.bfloat16, pitch=0, bias=False, target="sm_90"):
    call = call_of(channels, hidden or 4 * channels, dtype, pitch, bias)
    with device.standing_in(device.target_of(target, "any", 132)):
        launches = [launch for launch, _ in path.transition.plan_training(call)]
    stages = [launch.stage for launch in launches]
    launches = launches[stages.index("swiglu_bwd") - ("swiglu_bwd" not in stages[:2]) :]
    return [launch.stage + (" hopper" if launch.variant else "") for launch in launches]


def unaligned_gradient():
    call = call_of(256, 1024, torch.bfloat16, 0, False)
    grad = empty(call.x.numel() + 1)[1:].view(call.x.shape)
    with rehearsal.rehearsal(device.target_of("sm_90", "any", 132)) as launches, torch.no_grad():
        fused, needs = path.transition._fused_setting(call), frozenset({"x", "down_weight"})
        path.transition._run_backward(call, grad, None, fused, needs, launches)
    return [launch.stage + (" hopper" if launch.variant else "") for launch, _ in launches.launched]


print(json.dumps({
    "wide": taken(),
    "narrow": taken(128),
    "between": taken(192),
    "float16": taken(dtype=torch.float16),
    "a bias of the output": taken(bias=True),
    "fewer hidden channels": taken(hidden=64),
    "ragged hidden channels": taken(hidden=1000),
    "unaligned": taken(pitch=4),
    "an unaligned gradient": unaligned_gradient(),
    "wider": taken(320),
    "narrower": taken(64),
    "float32": taken(dtype=torch.float32),
    "another GPU": taken(target="sm_100"),
}))
"""
TAKEN_BY = {
    "wide", "narrow", "between", "float16", "a bias of the output", "fewer hidden channels",
    "an unaligned gradient",
}  # fmt: skip


def test_what_it_takes():
    """One kernel then makes what two did; sums over rows have their variant too."""
    found = json.loads(python_output(TAKEN))
    assert {name for name, stages in found.items() if "swiglu_bwd hopper" in stages} == TAKEN_BY
    assert len(found) == 13
    for name, stages in found.items():
        assert (name in TAKEN_BY) != ("swiglu_hidden" in stages), name
    assert found["wide"].count("row_products hopper") == 2


@pytest.fixture
def gradients(kernel, submodule):
    """gradients(problem, needs=None): by name, on the GPU; by the variant, or without variants."""

    def compute(problem, needs=None, plain=False):
        problem = problem.to("cuda")
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(problem).items()}
        if needs is not None:
            leaves = {name: leaves[name] for name in needs}
        launches = submodule("triton_path.launches")._launches
        launches.clear()
        problem = with_leaves(problem, leaves)
        grad = grad_of_output(problem).to("cuda")
        hopper = submodule("hopper")
        with hopper.without_variants() if plain else contextlib.nullcontext():
            found = torch.autograd.grad(problem.run(kernel), list(leaves.values()), grad)
        assert plain != any(ran(one, "swiglu_bwd", "hopper") for one in launches.values())
        return {name: value.cpu() for name, value in zip(leaves, found, strict=True)}

    return compute


CALLS = {
    "rows": dict(shape=(300, 256), hidden=1024),
    "one row": dict(shape=(1, 128), hidden=512),
    "a step of hidden channels": dict(shape=(65, 128), hidden=64),
    "fewer blocks than programs": dict(shape=(20, 256), hidden=256),
    "biases": dict(shape=(3, 11, 13, 256), hidden=512, biases=BIASES),
    "biases before the gate": dict(shape=(40, 13, 128), hidden=512, biases=BIASES[:2]),
    "bfloat16 norms": dict(shape=(2, 70, 70, 128), hidden=256, norm_dtype=BF16),
    "many tiles": dict(shape=(230, 230, 128), hidden=512, biases=("up_bias",)),
    "many tiles, wide": dict(shape=(150, 230, 256), hidden=1024),
    "three parts": dict(shape=(1290, 192), hidden=768),
    "two sequences": dict(shape=(2, 90, 90, 256), hidden=512),
}


@on_hopper
@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("name", CALLS)
def test_no_worse_than_the_plain_kernels(gradients, name, dtype):
    problem = make_transition(dtype=dtype, **CALLS[name])
    with memory_of_no_numbers():
        got, again = gradients(problem), gradients(problem)
        plain = gradients(problem, plain=True)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert_no_worse([(got, plain, reference_gradients(problem, grad_of_output(problem)))], 1.02)


@on_hopper
@pytest.mark.parametrize("channels", [128, 192, 256])
def test_chunks(gradients, submodule, monkeypatch, channels):
    """Of rows, of whole sequences, of one with strides: sums over all of them."""
    path = submodule("triton_path.transition")
    for shape, turn in (((20_000, channels), False), ((5, 40, 70, channels), True)):
        problem = make_transition(shape, 2 * channels, dtype=BF16)
        if turn:
            problem.x = problem.x.transpose(1, 2).contiguous().transpose(1, 2)
        whole = gradients(problem)
        size = 14 * channels * 2 * 3_000
        monkeypatch.setattr(path, "_BACKWARD_CHUNK", (1e-9, size, size))
        got = gradients(problem)
        monkeypatch.undo()
        exact = reference_gradients(problem, grad_of_output(problem))
        assert_no_worse([(got, whole, exact)], 1.02)


@on_hopper
@pytest.mark.parametrize("needs", [
    ["x"], ["down_weight"], ["norm_weight"], ["x", "gate_weight"], ["x", "down_bias"],
])  # fmt: skip
def test_some_gradients_have_the_bits_of_all(gradients, needs):
    problem = make_transition((400, 256), 512, dtype=BF16, biases=BIASES)
    together = gradients(problem)
    for name, value in gradients(problem, needs).items():
        assert torch.equal(value, together[name]), name


@on_hopper
@pytest.mark.parametrize("lengths", [[70, 131], [0, 5], [1, 200]])
@pytest.mark.parametrize("channels", [128, 256])
def test_lengths(gradients, channels, lengths):
    """Padding, NaN here, has no share in the gradients, and has gradients of zero."""
    side = max(lengths)
    problem = make_transition(
        (len(lengths), side, side, channels), 2 * channels, dtype=BF16, lengths=lengths
    )
    exact = reference_gradients(problem, grad_of_output(problem))
    within = torch.arange(side) < torch.tensor(lengths)[:, None]
    within = within[:, :, None] & within[:, None, :]
    problem.x = torch.where(within[..., None], problem.x, torch.nan)
    got, plain = gradients(problem), gradients(problem, plain=True)
    assert not got["x"][~within].any()
    assert_no_worse([(got, plain, exact)], 1.02)


@on_hopper
@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_gates_that_are_open_or_shut(gradients, dtype):
    """The exponential overflows."""
    problem = make_transition((200, 128), 256, dtype=dtype)
    problem.weights["gate_weight"] = problem.weights["gate_weight"] * 60
    got = gradients(problem)
    assert all(bool(value.isfinite().all()) for value in got.values())
    plain = gradients(problem, plain=True)
    assert_no_worse([(got, plain, reference_gradients(problem, grad_of_output(problem)))], 1.02)


@on_hopper
def test_a_gradient_of_any_alignment(kernel, gradients):
    """As the backward of a concatenation gives it."""
    problem = make_transition((300, 128), 512, dtype=BF16).to("cuda")
    wanted = gradients(problem)
    leaf = problem.x.requires_grad_()
    out = torch.cat([leaf.new_zeros(1), problem.run(kernel).flatten()])
    grad = torch.cat([leaf.new_zeros(1), grad_of_output(problem).to("cuda").flatten()])
    (got,) = torch.autograd.grad(out, leaf, grad)
    assert torch.equal(got.cpu(), wanted["x"])


@on_hopper
@pytest.mark.parametrize("norm", [True, False])
def test_constant_rows_with_and_without_parameters_of_the_norm(gradients, norm):
    problem = make_transition((130, 256), 512, dtype=BF16)
    problem.x[::2] = 3.0
    if not norm:
        problem.weights |= dict.fromkeys(NORMS)
    got, plain = gradients(problem), gradients(problem, plain=True)
    assert set(got) == set(leaves_of(problem))
    assert_no_worse([(got, plain, reference_gradients(problem, grad_of_output(problem)))], 1.02)
