"""The public functions on DTensors, over 4 processes, against the call on the whole tensors."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from gradients_of_calls import grad_of_output, gradients
from helpers import leaves_of, make_problem, with_leaves
from ranks import RANKS, Rank, report_of, reports_of, same_values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

LINE, SQUARE = (RANKS,), (2, 2)
GRID, PAIRS = (1, 2, 2), (2, 2, 1)  # the second's blocks are of two ranks each
LAYOUTS = [
    (LINE, [Shard(0)]),
    (LINE, [Shard(1)]),
    (LINE, [Shard(2)]),
    (LINE, [Replicate()]),
    (SQUARE, [Shard(0), Shard(1)]),
    (SQUARE, [Shard(2), Replicate()]),
    (SQUARE, [Shard(2), Shard(0)]),
    (SQUARE, [Shard(0), Shard(0)]),
    (SQUARE, [Shard(1), Shard(2)]),
    (SQUARE, [Shard(2), Shard(1)]),
    (SQUARE, [Shard(1), Shard(1)]),
    (GRID, [Shard(0), Shard(1), Shard(2)]),
    (PAIRS, [Shard(0), Shard(2), Shard(1)]),
    (PAIRS, [Replicate(), Shard(2), Shard(2)]),
]


def distribute(tensor, mesh, placements):
    """A DTensor of what each rank has whole."""
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim)
    return whole.redistribute(placements=placements)


def as_a_whole(on: Rank):
    """Each layout, with masks, residual, drop mask and weights that are DTensors or not."""
    for at, (shape, placements) in enumerate(LAYOUTS):
        mesh = init_device_mesh("cpu", shape)
        for batch, length in ((3, 9), (1, 3)) if at < 10 else ((2, 7),):
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
    for placements in (
        [Shard(2), Shard(1)], [Shard(0), Shard(3)], [Shard(1), Shard(0)], [Shard(2), Shard(3)],
        [Shard(3), Shard(2)],
    ):  # fmt: skip
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
                pair, "outgoing", others.pop("residual", None), others.pop("drop_mask", None),
                **problem.weights | others,
            )  # fmt: skip
        except (ValueError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__} {error}"

    refused("channels", distribute(x, mesh, [Replicate(), Shard(3)]))
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
    blocks = distribute(x, mesh, [Shard(1), Shard(2)])
    refused("mask of blocks", blocks, mask=torch.ones(6, 5))
    refused("residual of blocks", blocks, residual=torch.ones(1, 6, 6, 7))
    refused("one rank's block", blocks, mask=torch.ones(2, 6, 6) if on.rank == 1 else None)
    refused("a mask on one rank", blocks, mask=torch.ones(6, 6) if on.rank == 2 else None)
    for name, explained in (("explain", rows), ("explain inside", x)):
        inside = on.kernel.sharded_pairs(None, length=6) if explained is x else nullcontext()
        with inside, pytest.raises(NotImplementedError) as caught:
            on.kernel.explain(
                on.kernel.triangle_multiplicative_update, explained, **problem.weights
            )
        found[name] = str(caught.value)
    with torch.enable_grad():
        refused("one rank's gradient", blocks.detach().requires_grad_(on.rank == 2))
        of_one = problem.residual.requires_grad_(on.rank == 1)
        refused("one residual's", blocks.detach().requires_grad_(), residual=of_one)
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


def bits_of_blocks(on: Rank):
    """Those of the rows, or columns, for which they are exchanged."""
    square, line = (init_device_mesh("cpu", shape) for shape in (SQUARE, LINE))
    for length, dtype in ((8, torch.bfloat16), (9, torch.float32)):
        for axis, direction in ((1, "outgoing"), (2, "incoming")):
            problem = make_problem(
                length, 8, batch=2, dtype=dtype, direction=direction, mask="soft", residual=True,
                drop_mask=True,
            )  # fmt: skip
            whole, made = problem.x, []
            for mesh, placements in (
                (line, [Shard(axis)]), (square, [Shard(axis), Shard(3 - axis)])
            ):  # fmt: skip
                problem.x = distribute(whole, mesh, placements)
                made.append(problem.run(on.kernel).full_tensor())
            assert torch.equal(*made)


def bytes_of_blocks(on: Rank):
    """What this rank sends in two calls on blocks, in pair tensors; by the mesh's layout."""
    found, sent = [], 0
    batch_isend_irecv, all_to_all_single = dist.batch_isend_irecv, dist.all_to_all_single

    def counted_batch(operations):
        nonlocal sent
        sent += sum(of.tensor.nbytes for of in operations if of.op is dist.isend)
        return batch_isend_irecv(operations)

    def counted_single(received, given, out_sizes, in_sizes, group):
        nonlocal sent
        sent += sum(size for rank, size in enumerate(in_sizes) if rank != dist.get_rank(group))
        return all_to_all_single(received, given, out_sizes, in_sizes, group=group)

    dist.batch_isend_irecv, dist.all_to_all_single = counted_batch, counted_single
    for placements in ([Shard(1), Shard(2)], [Shard(2), Shard(1)]):
        problem, sent = make_problem(24, 8, 8, residual=True), 0
        problem.x = distribute(problem.x, init_device_mesh("cpu", SQUARE), placements)
        problem.residual = problem.x
        for problem.direction in ("outgoing", "incoming"):
            problem.run(on.kernel)
        found.append(sent / (24 * 24 * 8 * 4))
    dist.batch_isend_irecv, dist.all_to_all_single = batch_isend_irecv, all_to_all_single
    return found


def gradients_through(run, weights, whole, mesh, placements):
    """This rank's parts of run(x), and of the gradients of x and of the output projection."""
    x, weight = distribute(whole, mesh, placements).requires_grad_(), weights["p_out_weight"]
    out = run(x)
    grads = torch.autograd.grad(out.to_local().square().sum(), [x, weight])
    return out.to_local(), grads[0].to_local(), grads[1]


@torch.enable_grad()
def in_a_compiled_function(on: Rank):
    """One graph, forward and backward, with eager bits; blocks break it."""
    problem = make_problem(8, 8, batch=2, mask="soft", drop_mask=True)
    problem.weights["p_out_weight"].requires_grad_()

    def run(x):
        return on.kernel.triangle_multiplicative_update_with_residual(
            x * 2, "incoming", x, problem.drop_mask, mask=problem.mask, **problem.weights
        ) + x  # fmt: skip

    for shape, placements, fullgraph in (
        (LINE, [Shard(1)], True), (SQUARE, [Shard(0), Shard(2)], True),
        (SQUARE, [Shard(1), Shard(2)], False),
    ):  # fmt: skip
        given = problem.weights, problem.x, init_device_mesh("cpu", shape), placements
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=fullgraph, backend="aot_eager")
        wanted = gradients_through(run, *given)
        assert all(map(torch.equal, gradients_through(compiled, *given), wanted))


CASES = [
    as_a_whole, of_any_rank, gradients_as_a_whole, in_a_compiled_function, bits_of_blocks,
    bytes_of_blocks, refusals,
]  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return reports_of(CASES, tmp_path_factory)


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.__name__)
def test_a_call_is_that_on_the_whole(reports, case):
    assert len(report_of(reports, case)) == RANKS


def test_blocks_send_what_is_said(reports):
    """Three quarters of two operands and the product of a rank's share, and half of two shares."""
    share = 1 / RANKS
    wanted = 2 * (3 * (RANKS - 1) / RANKS + 2 * 1 / 2) * share
    for found in report_of(reports, bytes_of_blocks).values():
        assert found == [pytest.approx(wanted)] * 2


def test_refusals(reports):
    found = report_of(reports, refusals)
    others = (
        "ValueError every rank's arguments must fit; rank 1 of 4 refused its own, and raises why"
    )
    for name in ("one rank", "one rank's block"):
        of_one = [found[rank].pop(name) for rank in range(RANKS)]
        assert of_one.pop(1).startswith("ValueError mask must broadcast to the leading axes of pa")
        assert of_one == [others] * 3
    assert found[0] == found[1] == found[2] == found[3]
    placements = (
        "ValueError pair must be a DTensor of placements Replicate() or Shard() of an axis before "
        "the channels; got "
    )
    of_mesh = "must be a tensor, or a DTensor on the mesh of pair with placements"
    wanted = {
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
        "one residual's": "ValueError all ranks must have the same exchanged_gradients; got "
        "('pair',) on rank 0, ('pair', 'residual') on rank 1, ('pair',) on rank 2",
        "one rank's gradient": "ValueError all ranks must have the same requires_grad; got False "
        "on rank 0, False on rank 1, True on rank 2, False on rank 3",
        "mask of blocks": "ValueError mask must be [..., L, L] with L = 6, a number for each pair",
        "residual of blocks": "ValueError residual must have the shape of pair, [1, 6, 6, 8]; got "
        "(1, 6, 6, 7)",
        "a mask on one rank": "ValueError all ranks must have the same mask; got None on rank 0, "
        "None on rank 1, torch.float32 on rank 2, None on rank 3",
    }
    assert found[0].keys() == wanted.keys()
    for name, message in wanted.items():
        assert found[0][name].startswith(message), found[0][name]
