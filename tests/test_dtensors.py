"""The public functions on DTensors, over 4 processes, against the call on the whole tensors."""

from contextlib import nullcontext

import pytest
import torch
from gradients_of_calls import grad_of_output, gradients
from helpers import leaves_of, make_problem, with_leaves
from ranks import RANKS, Rank, report_of, reports_of, same_values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

LINE, SQUARE = (RANKS,), (2, 2)
LAYOUTS = [
    (LINE, [Shard(0)]),
    (LINE, [Shard(1)]),
    (LINE, [Shard(2)]),
    (LINE, [Replicate()]),
    (SQUARE, [Shard(0), Shard(1)]),
    (SQUARE, [Shard(2), Replicate()]),
    (SQUARE, [Shard(2), Shard(0)]),
    (SQUARE, [Shard(0), Shard(0)]),
]


def distribute(tensor, mesh, placements):
    """A DTensor of what each rank has whole."""
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)
    return whole.redistribute(placements=placements)


def as_a_whole(on: Rank):
    """Each layout, with masks, residual, drop mask and weights that are DTensors or not."""
    for at, (shape, placements) in enumerate(LAYOUTS):
        mesh = init_device_mesh("cpu", shape)
        for batch, length in ((3, 9), (1, 3)):
            problem = make_problem(
                length, 8, 5, batch=batch, mask=("bool", "soft", None)[at % 3],
                residual=at % 2 == 0, drop_mask=True, direction=("outgoing", "incoming")[at % 2],
            )  # fmt: skip
            wanted = problem.run(on.kernel)
            if problem.mask is not None and at % 2:
                problem.mask = distribute(problem.mask, mesh, placements)
            if problem.residual is not None:
                problem.residual = distribute(problem.residual, mesh, placements)
            if at % 3 == 0:
                whole = [Replicate()] * mesh.ndim
                problem.weights = {
                    name: distribute(value, mesh, whole) for name, value in problem.weights.items()
                }
                problem.drop_mask = distribute(problem.drop_mask, mesh, whole)
            problem.x = distribute(problem.x, mesh, placements)
            got = problem.run(on.kernel)
            assert got.placements == tuple(placements) and got.device_mesh == mesh
            assert got.shape == wanted.shape
            same_values(got.to_local(), distribute(wanted, mesh, placements).to_local())
            same_values(
                (got + problem.x).to_local(), got.to_local() + problem.x.to_local()
            )  # the next operation takes it, too


def of_any_rank(on: Rank):
    """Leading axes, masks with fewer of them, lengths, biases."""
    mesh = init_device_mesh("cpu", SQUARE)
    problem = make_problem(7, 6, 8, batch=6, mask="soft", biases=True)
    lengths = torch.tensor([7, 4, 0])
    for placements in ([Shard(2), Shard(1)], [Shard(0), Shard(3)], [Shard(1), Shard(0)]):
        for mask in (problem.mask.view(2, 3, 7, 7), problem.mask[:3], problem.mask[0]):
            x, weights = problem.x.view(2, 3, 7, 7, 6), problem.weights | problem.biases
            run = on.kernel.triangle_multiplicative_update
            wanted = run(x, "incoming", mask, **weights, lengths=lengths)
            x = distribute(x, mesh, placements)
            got = run(x, "incoming", mask, **weights, lengths=lengths)
            assert got.placements == tuple(placements)
            same_values(got.to_local(), distribute(wanted, mesh, placements).to_local())
    line = init_device_mesh("cpu", LINE)
    wanted = run(problem.x[0], "outgoing", **weights)
    got = run(distribute(problem.x[0], line, [Shard(1)]), "outgoing", **weights)
    same_values(got.full_tensor(), wanted)


def refusals(on: Rank):
    mesh, line = (init_device_mesh("cpu", shape) for shape in (SQUARE, LINE))
    problem, found = make_problem(6, 8, residual=True), {}
    x = problem.x

    def refused(name, pair, **others):
        try:
            on.kernel.triangle_multiplicative_update_with_residual(
                pair, "outgoing", None, others.pop("drop_mask", None), **problem.weights | others
            )
        except (ValueError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__} {error}"

    for name, placements in (
        ("both", [Shard(1), Shard(2)]),
        ("twice", [Shard(1), Shard(1)]),
        ("channels", [Replicate(), Shard(3)]),
    ):
        refused(name, distribute(x, mesh, placements))
    refused("partial", DTensor.from_local(x, line, [Partial()]))
    rows = distribute(x, line, [Shard(1)])
    refused("mask", rows, mask=distribute(x[..., 0], line, [Shard(2)]))
    refused("leading", rows, mask=torch.ones(2, 6, 6))
    refused("weight", rows, g_out_weight=distribute(torch.ones(8, 8), line, [Shard(0)]))
    refused("drop_mask", rows, drop_mask=torch.ones(6, 8))
    refused("inplace", rows, inplace=True)
    refused("memory", rows, memory="little")
    refused("one rank", rows, mask=torch.ones(2, 6, 6) if on.rank == 1 else None)
    refused("projection", rows, p_out_weight=None)
    for name, explained in (("explain", rows), ("explain inside", x)):
        inside = on.kernel.sharded_pairs(None, length=6) if explained is x else nullcontext()
        with inside, pytest.raises(NotImplementedError) as caught:
            on.kernel.explain(
                on.kernel.triangle_multiplicative_update, explained, **problem.weights
            )
        found[name] = str(caught.value)
    return found


@torch.enable_grad()
def gradients_as_a_whole(on: Rank):
    """Each layout: of DTensors with their placements, of tensors that all ranks have whole."""
    for at, (shape, placements) in enumerate(LAYOUTS):
        mesh = init_device_mesh("cpu", shape)
        for batch, length in ((3, 9), (1, 3)):
            problem = make_problem(
                length, 8, 5, batch=batch, mask="soft", residual=at % 2 == 0, drop_mask=True,
                direction=("outgoing", "incoming")[at % 2],
            )  # fmt: skip
            if at % 2 and batch > 1:
                problem.mask = problem.mask[:1]  # shared by the sequences
            wanted = gradients(on.kernel, problem, "cpu")
            leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(problem).items()}
            given = {}
            for name, leaf in leaves.items():
                if name in ("x", "residual") or (at + len(name)) % 2:
                    like = placements if name in ("x", "residual") else [Replicate()] * mesh.ndim
                    leaf = distribute(leaf.detach(), mesh, like).requires_grad_()
                given[name] = leaf
            out = with_leaves(problem, given).run(on.kernel)
            out.backward(distribute(grad_of_output(problem), mesh, placements))
            for name, leaf in given.items():
                grad = leaf.grad
                if isinstance(leaf, DTensor):
                    assert grad.placements == leaf.placements
                    grad = grad.full_tensor()
                error = (grad - wanted[name]).norm()
                assert error <= 5e-6 * wanted[name].norm(), f"{name} {placements}: {error}"


CASES = [as_a_whole, of_any_rank, gradients_as_a_whole, refusals]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return reports_of(CASES, tmp_path_factory)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.__name__)
def test_a_call_is_that_on_the_whole(reports, case):
    assert len(report_of(reports, case)) == RANKS


def test_refusals(reports):
    found = report_of(reports, refusals)
    others = (
        "ValueError every rank's arguments must fit; rank 1 of 4 refused its own, and raises why"
    )
    of_one = [found[rank].pop("one rank") for rank in range(RANKS)]
    assert of_one.pop(1).startswith("ValueError mask must broadcast to the leading axes of pair")
    assert of_one == [others] * 3
    assert found[0] == found[1] == found[2] == found[3]
    placements = (
        "ValueError pair must be a DTensor of placements Replicate() or Shard() of an axis before "
        "the channels, at most one of them of a residue axis; got "
    )
    of_mesh = "must be a tensor, or a DTensor on the mesh of pair with placements"
    wanted = {
        "both": placements + "(Shard(dim=1), Shard(dim=2))",
        "twice": placements + "(Shard(dim=1), Shard(dim=1))",
        "channels": placements + "(Replicate(), Shard(dim=3))",
        "partial": placements + "(Partial(sum),)",
        "mask": f"ValueError mask {of_mesh} [Shard(dim=1)], each of which may be Replicate(); got "
        "(Shard(dim=2),) on DeviceMesh",
        "leading": "ValueError mask must broadcast to the leading axes of pair, [1], where that is "
        "a DTensor; got (2, 6, 6)",
        "weight": f"ValueError g_out_weight {of_mesh} [Replicate()], each of which may be "
        "Replicate(); got (Shard(dim=0),) on DeviceMesh",
        "drop_mask": "ValueError drop_mask must be [B, 1, L, C] where pair is a DTensor; "
        "got (6, 8)",
        "inplace": "ValueError inplace must be False where pair is a DTensor; got True",
        "memory": "ValueError memory must be 'auto', 'default' or 'lean'; got 'little'",
        "explain": "x must be a whole pair tensor: explain the sharded function for a rank's part; "
        "got a DTensor",
        "explain inside": "x must be a whole pair tensor: explain the sharded function for a "
        "rank's part; got a call inside sharded_pairs",
        "projection": "ValueError p_out_weight must be a tensor where pair is a DTensor; got None",
    }
    assert found[0].keys() == wanted.keys()
    for name, message in wanted.items():
        assert found[0][name].startswith(message), found[0][name]
