"""A training step on several short sequences at once, as rows of one."""

import dataclasses

import pytest
import torch
from gradients_of_calls import LIMIT, grad_of_output
from helpers import as_call, leaves_of, make_problem, reference_gradients, relative_error

BUDGETS = {torch.float32: LIMIT, torch.float16: 4e-3}
SPLIT_BUDGET = 2e-6  # as in `test_split_gradients`


@pytest.fixture
def step(submodule, on_triton):
    """step(problem, grad_out, ...): the output and the gradients by name."""
    path = submodule("triton_path")

    def run(problem, grad_out=None, lengths=None, precision="fp32", **fields):
        call = as_call(submodule("_call"), problem.to(on_triton), precision=precision, **fields)
        call = call._replace(lengths=lengths)
        out, *saved = path.forward_saving(call)
        assert [tuple(t.shape) for t in saved] == [*path.saved_shapes(call)]
        grad_out = grad_of_output(problem) if grad_out is None else grad_out
        found = path.backward(call, grad_out.to(on_triton), *saved, frozenset(leaves_of(problem)))
        return out, found

    return run


@pytest.fixture
def merged(submodule):
    """merged(problem): how many of its sequences run as one."""

    def count(problem, lengths=None, **fields):
        call = as_call(submodule("_call"), problem, **fields)
        return submodule("triton_path.launches").sequences_merged(call._replace(lengths=lengths))

    return count


def entry_of(problem, entry):
    part = slice(entry, entry + 1)
    mask = None if problem.mask is None else problem.mask[part]
    return dataclasses.replace(problem, x=problem.x[part], mask=mask)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", BUDGETS)
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("length, batch", [(5, 3), (16, 2), (1, 4), (35, 2)])
def test_gradients_of_a_batch(step, merged, length, batch, direction, dtype):
    # Of one residue the mask scales t, which the LayerNorm undoes: its gradient is but rounding.
    mask = "bool" if length == 1 else "soft"
    problem = make_problem(
        length, 16, 24, batch=batch, dtype=dtype, mask=mask, biases=True, direction=direction
    )
    assert merged(problem) == batch
    _, got = step(problem)
    wanted = reference_gradients(problem, grad_of_output(problem))
    assert set(got) == set(leaves_of(problem))
    errors = {name: relative_error(got[name], wanted[name]) for name in got}
    assert all(error <= BUDGETS[dtype] for error in errors.values()), errors


@pytest.mark.kernels_ci
@pytest.mark.parametrize("mask", ["bool", None])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("length, batch", [(5, 3), (16, 2), (35, 2)])
def test_split_operands_of_a_batch(
    step, merged, on_split, length, batch, direction, mask
):
    """Each sequence as exact as alone, where its gradients are 2^-60 of another's too."""
    problem = make_problem(
        length, 16, 32, batch=batch, mask=mask, biases=True, direction=direction
    )
    assert merged(problem, precision="fp16x3") == batch
    sizes = 2.0 ** -torch.linspace(0, 60, batch)[:, None, None, None]
    grad_out = grad_of_output(problem) * sizes
    out, got = step(problem, grad_out, precision="fp16x3")
    wanted = reference_gradients(problem, grad_out)
    for entry in range(batch):
        assert relative_error(got["x"][entry], wanted["x"][entry]) <= SPLIT_BUDGET, entry
    errors = {name: relative_error(got[name], wanted[name]) for name in got}
    assert all(error <= SPLIT_BUDGET for error in errors.values()), errors
    whole, _ = step(problem, grad_out)
    assert relative_error(out, whole.cpu().double()) <= SPLIT_BUDGET


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_batch_has_the_bits_of_its_sequences(
    step, merged, submodule, on_triton, monkeypatch, groups, direction
):
    """Output and gradients of pairs, whatever part of the batch runs at once.

    In the interpreter BLAS may round a row in another way, depending on its place in a tile.
    """
    exact = groups == 4 or on_triton == "cuda"
    problem = make_problem(7, 16, batch=4, mask="soft", direction=direction)
    size = 4 // groups * 16 * 7 * 16 * 4 + 1  # planes have rows of 16
    monkeypatch.setattr(submodule("triton_path.launches"), "SMALL_PLANES", size)
    submodule("triton_path.launches")._launches.clear()
    assert merged(problem) == 4 // groups
    grad_out = grad_of_output(problem)
    out, got = step(problem, grad_out)
    for entry in range(4):
        alone, of_alone = step(entry_of(problem, entry), grad_out[entry : entry + 1])
        pairs = {"out": (out, alone)}
        pairs |= {name: (got[name], of_alone[name]) for name in ("x", "mask")}
        for name, (of_batch, of_one) in pairs.items():
            if exact:
                assert torch.equal(of_batch[entry], of_one[0]), name
            else:
                assert relative_error(of_batch[entry], of_one[0].double()) <= 1e-6, name
    submodule("triton_path.launches")._launches.clear()


def test_any_strides(step, merged, on_triton):
    """Rows that are not those of one sequence are copied."""
    problem = make_problem(6, 16, batch=2, mask="soft", residual=True)
    problem.mask[1] = problem.mask[0]
    grad_out, wide = grad_of_output(problem), torch.zeros(2, 2, 8, 8, 16)
    x, grad = wide[:, :, 1:7, 1:7]
    x.copy_(problem.x)
    grad.copy_(grad_out)
    others = dataclasses.replace(
        problem,
        x=x,
        mask=problem.mask[:1].expand(2, -1, -1),
        residual=problem.residual.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert merged(others) == 2
    wanted, by_name = step(problem, grad_out)
    made, got = step(others, grad)
    assert torch.equal(made, wanted)
    for name, gradient in by_name.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize(
    "why",
    [dict(lengths=torch.tensor([5, 3])), dict(drop_mask=True), dict(recompute="product"),
     dict(recompute="all"), dict(batch=1)],
)  # fmt: skip
def test_what_runs_alone(merged, why):
    made = {name: why[name] for name in ("drop_mask", "batch") if name in why}
    problem = make_problem(5, 16, **{"batch": 2, **made})
    others = {name: value for name, value in why.items() if name not in made}
    assert merged(problem, **others) == 1


def test_split_operands_beside_a_mask_run_alone(merged, submodule):
    """Its rows would have other scales in each sequence."""
    problem = make_problem(5, 16, batch=2, mask="soft")
    with submodule("triton_parts.device").standing_in(
        submodule("triton_parts.device").target_of("sm_90", "any")
    ):
        of_meta = dataclasses.replace(problem, x=problem.x.to("meta"))
        assert merged(of_meta, precision="fp16x3") == 1
        assert merged(of_meta, precision="tf32x3") == 2


@pytest.mark.parametrize(
    "channels, batch, length, chunks, size",
    [(128, 8, 64, 1, 8), (128, 2, 256, 1, 2), (128, 4, 256, 2, 4), (128, 2, 512, 2, 2),
     (256, 8, 64, 1, 8), (256, 2, 256, 2, 2), (256, 2, 384, 2, 2), (256, 6, 256, 2, 3),
     (256, 7, 256, 1, 1)],
)  # fmt: skip
def test_launches_of_a_batch(
    submodule, meta_call, monkeypatch, channels, batch, length, chunks, size
):
    """A backward has those of one sequence with as many pairs, on an H200."""
    path, device, launched = submodule("triton_path"), submodule("triton_parts.device"), []
    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "launch", lambda one, **tensors: launched.append(one.stage))

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    call = meta_call(channels, meta(batch, length, length, channels))
    assert submodule("triton_path.launches").sequences_merged(call) == size
    product, moments, planes = path.saved_shapes(call)
    needs = {"x", *[name for name, of in call.weights._asdict().items() if of is not None]}
    with device.standing_in(device.target_of("sm_90", "NVIDIA H200", 132)):
        submodule("triton_path.gradients").run_backward(
            call, call.x, meta(*product), meta(*moments, dtype=torch.float32), meta(*planes),
            frozenset(needs), submodule("triton_parts.launch").Launches(),
        )  # fmt: skip
    groups, of_all = batch // size, 3  # folded norms, and two for the parameters
    assert len(launched) == of_all + groups * (4 + 2 * chunks)


def test_a_broadcast_mask_is_recorded(step, submodule, on_triton):
    """What a step copies first, a mask and a gradient here, is no part of its schedule."""
    launches = submodule("triton_path.launches")._launches
    launches.clear()
    problem = make_problem(6, 16, batch=2)
    mask = make_problem(6, 16, mask="soft").mask
    problem.mask = mask.expand(2, -1, -1)
    grad_out = torch.ones(1, 6, 6, 16).expand(2, -1, -1, -1)
    _, got = step(problem, grad_out)
    kinds = [found.recording for found in launches.values()]
    assert len(kinds) == 2 and not any(kind is None or isinstance(kind, str) for kind in kinds)
    wanted = reference_gradients(problem, grad_out)
    assert all(relative_error(got[name], wanted[name]) <= LIMIT for name in ("x", "p_in_weight"))
    launches.clear()
