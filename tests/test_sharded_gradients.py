"""Gradients of a pair tensor over 2, 3 and 4 processes, against those of one process."""

import contextlib
import dataclasses
import functools
import itertools
import re

import pytest
import torch
import torch.distributed as dist
from gradients_of_calls import RECOMPUTE, assert_equal, fresh_leaves, grad_of_output, gradients
from helpers import DTYPES, as_call, leaves_of, make_problem, with_leaves
from mapped import mapped, packed
from peak_bytes import PeakBytes
from ranks import RANKS, Rank, report_of, reports_of
from test_sharded import (
    ABSENT,
    DIRECTIONS,
    impatient_group,
    memory_of_no_numbers,
    part_of,
    sharded,
)
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

OF_PAIRS = ("x", "mask", "residual")


@contextlib.contextmanager
def in_float64(on: Rank):
    """The functions take float64, which they refuse but the ATen path computes in."""
    modules = on.kernel.validation, on.kernel.paths, on.kernel.agreement
    before = modules[0].COMPUTE_DTYPES
    for dtypes in ((*before, torch.float64), before):
        for module in modules:
            module.COMPUTE_DTYPES = dtypes
        on.kernel.agreement._WORDS["dtype"] = dtypes
        if dtypes is not before:
            yield


@torch.enable_grad()
def gradients_of_part(on: Rank, problem, ranks: int, dim: int = 1, names=None, **options):
    """This rank's gradients of the leaves, in the shapes of the whole problem."""
    leaves = fresh_leaves(problem, "cpu")
    wanted = {name: leaves[name].requires_grad_() for name in names or leaves}
    with memory_of_no_numbers():
        out = sharded(on, with_leaves(problem, leaves), ranks, dim, **options)
        out.backward(part_of(on, problem, ranks, dim)(grad_of_output(problem)))
    return {name: leaf.grad for name, leaf in wanted.items()}


def assert_gradients(on: Rank, problem, ranks: int, dim: int = 1, **options):
    """They are those of one process, to the dtype's rounding."""
    shared = {name: value for name, value in options.items() if name in ("lengths", "recompute")}
    with torch.enable_grad():
        whole = gradients(on.kernel, problem, "cpu", **shared)
    got = gradients_of_part(on, problem, ranks, dim, **options)
    assert got.keys() == whole.keys()
    bound = of_parameters = {torch.float64: 1e-12, torch.float32: 5e-6}.get(problem.x.dtype)
    if bound is None:  # as for `same_values`
        eps = torch.finfo(problem.x.dtype).eps
        # A CPU that multiplies in 16 bits rounds each block's share, by 0.3 eps, on either side.
        bound, of_parameters = eps * 1e-3**0.5, eps
    part = part_of(on, problem, ranks, dim)
    for name, wanted in whole.items():
        mine = got[name]
        assert mine.dtype == wanted.dtype and mine.shape == wanted.shape
        if name in OF_PAIRS or (name == "drop_mask" and dim == 2):
            mine, wanted = part(mine), part(wanted)
        elif options.get("parameter_grads") == "local" and name != "drop_mask":
            dist.all_reduce(mine, group=on.groups[ranks])
        error = (mine.double() - wanted.double()).norm()
        limit = bound if name in OF_PAIRS else of_parameters
        assert error <= limit * wanted.double().norm() + 1e-30, f"{name}: {error:.1e}"


def in_double_precision(on: Rank):
    """Both axes and directions, all modes, sizes that don't divide, ranks without a part."""
    sizes = ((12, 8, 8, 1), (9, 8, 5, 2), (3, 8, 3, 1), (1, 5, 1, 2), (10, 6, 18, 1))
    with in_float64(on):
        for ranks in on.groups:
            for at, (length, channels, hidden, batch) in enumerate(sizes):
                dim = 1 + (at + ranks) % 2
                problem = make_problem(
                    length, channels, hidden, batch=batch, direction=DIRECTIONS[at // 2 % 2],
                    mask=(None, "soft", "float", "expanded", "bool")[at],
                    residual=at % 2 == 0, drop_mask=at in (0, 2), biases=at == 1,
                )  # fmt: skip
                doubles = {name: leaf.double() for name, leaf in leaves_of(problem).items()}
                assert_gradients(
                    on, with_leaves(problem, doubles), ranks, dim,
                    recompute=RECOMPUTE[(at + ranks) % 3],
                    memory=("lean", "auto")[(at + ranks) // 2 % 2],
                    parameter_grads=("sum", "local")[ranks // 2 % 2],
                )  # fmt: skip


def in_the_interpreter(on: Rank):
    """The Triton kernels: all modes, lengths, a drop mask for each row."""
    with on.on_triton():
        for ranks, dim, direction, batch, real, recompute in (
            (2, 1, "outgoing", 1, None, "none"),
            (2, 2, "outgoing", 1, [8], "product"),
            (3, 1, "incoming", 2, [9, 5], "all"),
            (3, 2, "incoming", 1, None, "product"),
        ):
            if ranks in on.groups:
                problem = make_problem(
                    9, 16, batch=batch, dtype=DTYPES[0 if real else 2], direction=direction,
                    mask="soft", residual=True, drop_mask=True,
                )  # fmt: skip
                assert_gradients(
                    on, problem, ranks, dim, recompute=recompute,
                    lengths=None if real is None else torch.tensor(real),
                )  # fmt: skip


def equal_blocks(on: Rank):
    """Blocks of positions are those of one process; equal calls give equal bits."""
    blocks = on.kernel.aten_path.blocks
    for ranks in on.groups:
        length = 64 if ranks != 3 else 48
        blocks._BLOCK_POSITIONS = blocks.LEAST_POSITIONS = 4 * length  # four rows
        for at, (direction, dim) in enumerate(itertools.product(DIRECTIONS, (1, 2))):
            problem = make_problem(
                length, 16, dtype=DTYPES[(at + ranks) % 3], direction=direction, mask="soft",
                residual=dim == 1, drop_mask=True,
            )  # fmt: skip
            options = {"recompute": RECOMPUTE[(at + ranks) % 3]}
            assert_gradients(on, problem, ranks, dim, **options)
            again = [gradients_of_part(on, problem, ranks, dim, **options) for _ in range(2)]
            assert_equal(*again)
    blocks._BLOCK_POSITIONS, blocks.LEAST_POSITIONS = 2048, 256


def of_padded_batches(on: Rank):
    for ranks in on.groups.keys() & {2, 3}:
        for dim, recompute in ((1, "none"), (2, "all")):
            problem = make_problem(13, 8, batch=3, mask="soft", residual=True, drop_mask=True)
            real = torch.tensor([13, 0, 7])
            assert_gradients(on, problem, ranks, dim, lengths=real, recompute=recompute)


@torch.enable_grad()
def of_some(on: Rank):
    """Each rank is asked for the same few, some of which need no message; then for none."""
    if 2 not in on.groups:
        return ABSENT
    problem = make_problem(6, 8, mask="soft", residual=True, drop_mask=True)
    whole = gradients(on.kernel, problem, "cpu")
    for names in (("x",), ("mask",), ("drop_mask",), ("residual",), ("g_out_weight",)):
        for recompute in RECOMPUTE:
            got = gradients_of_part(on, problem, 2, names=names, recompute=recompute)
            part = part_of(on, problem, 2, 1) if names[0] in OF_PAIRS else lambda whole: whole
            error = (part(got[names[0]]) - part(whole[names[0]])).norm()
            assert error <= 5e-6 * whole[names[0]].norm(), names
    for batch, length in ((2, 0), (0, 5)):
        x = torch.empty(batch, length, length, 8)
        problem = dataclasses.replace(make_problem(3, 8), x=x)
        got = gradients_of_part(on, problem, 2)
        assert not any([grad.any() for grad in got.values()])


def by_copies(on: Rank):
    """The forward's planes and the backward's; what is kept came into memory that both use."""
    with on.on_triton(), mapped(on) as seen:
        for ranks in on.groups.keys() & {2, RANKS}:
            for at, recompute in enumerate(RECOMPUTE):
                problem = make_problem(
                    9, 16, batch=2 - at % 2, mask="soft", residual=True,
                    direction=DIRECTIONS[at % 2],
                )  # fmt: skip
                assert_gradients(on, problem, ranks, dim=2 - at % 2, recompute=recompute)
    # What "product" makes again has one group at a time, of more planes. Behind every forward, and
    # every sequence of a backward, there is a watched sum: 1 + 2, 1 + 1 and 1 + 4 of "all".
    groups = len(on.groups.keys() & {2, RANKS})
    assert (seen.mapped, seen.watched) == (groups, 11 * groups)


def by_packed_messages(on: Rank):
    """dt, a and b; da and db."""
    with packed(on):
        for ranks, recompute in ((2, "none"), (2, "product"), (3, "all")):
            if ranks in on.groups:
                problem = make_problem(11, 8, 40, mask="soft", residual=True)
                assert_gradients(on, problem, ranks, recompute=recompute)


@torch.enable_grad()
def in_a_context(on: Rank):
    """transformers' pair stack, patched, with a backward under checkpoints and without."""
    if 2 not in on.groups:
        return ABSENT
    transformers = pytest.importorskip("transformers")
    from transformers.models.esmfold2 import modeling_esmfold2

    config = transformers.EsmFold2Config(
        pairwise_hidden_size=8, pair_transition_intermediate_size=12
    )
    torch.manual_seed(0)
    stack = modeling_esmfold2.EsmFold2PairUpdateStack(config, 2)
    problem = make_problem(9, 8, mask="bool")
    grad_out = grad_of_output(problem)

    def train(pair, mask, grad_out, **options):
        pair = pair.clone().requires_grad_()
        stack.zero_grad()
        run = functools.partial(stack, pair_attention_mask=mask)
        out = checkpoint(run, pair, use_reentrant=False) if options else run(pair)
        out.backward(grad_out)
        return {"x": pair.grad} | {name: p.grad for name, p in stack.named_parameters()}

    with on.kernel.patch(stack):
        whole = train(problem.x, problem.mask, grad_out)
        part = part_of(on, problem, 2, 2)
        with on.kernel.sharded_pairs(on.groups[2], length=9, dim=2):
            of_columns = train(*map(part, (problem.x, problem.mask, grad_out)), checkpointed=True)
    assert_shares(on, of_columns, whole, part)
    with on.kernel.patch(stack, mesh=on.groups[2], parameter_grads="sum"):
        part = part_of(on, problem, 2, 1)
        of_rows = train(*map(part, (problem.x, problem.mask, grad_out)))
    assert_shares(on, of_rows, whole, part, summed="tri_mul")


def assert_shares(on: Rank, got, whole, part, summed: str | None = None) -> None:
    """Those of parameters are shares of their sums, or, of some names, the sums."""
    for name, wanted in whole.items():
        mine, wanted = got[name], part(wanted) if name == "x" else wanted
        if name != "x" and not (summed and summed in name):
            dist.all_reduce(mine, group=on.groups[2])
        assert (mine - wanted).norm() <= 1e-5 * wanted.norm(), name


@torch.enable_grad()
def in_a_compiled_function(on: Rank):
    """In one graph, whose tracers see the ops' own shapes."""
    if 2 not in on.groups:
        return ABSENT
    for dim, recompute in ((1, "none"), (2, "product"), (1, "all")):
        problem = make_problem(5, 8, mask="soft", residual=True, drop_mask=True)
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(problem).items()}

        def run(leaves, problem=problem, dim=dim, recompute=recompute):
            return sharded(on, with_leaves(problem, leaves), 2, dim, recompute=recompute) * 2

        torch._dynamo.reset()
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        grads = [torch.autograd.grad(f(leaves).sum(), leaves.values()) for f in (run, compiled)]
        assert all(map(torch.equal, *grads))
        part = part_of(on, problem, 2, dim)(problem.x).detach().requires_grad_()
        call = as_call(on.kernel._call, problem, recompute=recompute)
        call = call._replace(x=part, mask=None, residual=None, drop_mask=None)
        torch.library.opcheck(
            on.kernel._ops.ops.sharded_trimul_fwd_saving.default,
            (*call.flat(), on.groups[2].group_name, dim, 5, "sum"),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


LONG = 96  # beside so many residues, parameters and a block of positions are small


def bytes_and_memory(on: Rank):
    """By group and mode: bytes and messages of a backward, peaks in pair tensors, `explain`."""
    found, schedule = {}, on.kernel.sharded_schedule
    batch_isend_irecv = dist.batch_isend_irecv
    on.kernel.aten_path.blocks._BLOCK_POSITIONS = LONG  # blocks of a row
    for ranks, recompute in ((4, "none"), (4, "product"), (4, "all"), (2, "product")):
        if ranks not in on.groups:
            continue
        sent, count = 0, 0

        def counted(operations):
            nonlocal sent, count
            assert len(operations) <= 256
            tensors = [of.tensor for of in operations if of.op is dist.isend]
            sent, count = sent + sum(of.nbytes for of in tensors), count + len(tensors)
            return batch_isend_irecv(operations)

        problem = make_problem(LONG, 32)
        part = part_of(on, problem, ranks, 1)(problem.x).contiguous()
        options = {"group": on.groups[ranks], "length": LONG, "recompute": recompute}
        with torch.enable_grad():
            page = on.kernel.explain(
                on.kernel.sharded_triangle_multiplicative_update, part.requires_grad_(),
                **options, **problem.weights,
            )  # fmt: skip
        call = as_call(on.kernel._call, problem, recompute=recompute)._replace(x=part.detach())
        division = schedule.Division(on.groups[ranks], 1, LONG)
        with PeakBytes(part, *problem.weights.values()) as forward:
            out, kept = schedule.run_forward(division, call, saves=True)
        dist.batch_isend_irecv = counted
        inputs = part, out, *[of for of in kept if isinstance(of, torch.Tensor)]
        with PeakBytes(*inputs, *problem.weights.values()) as backward:
            schedule.run_backward(division, call, out, kept, frozenset({"x"}))
        dist.batch_isend_irecv = batch_isend_irecv
        peaks = forward.peak / part.nbytes, backward.peak / part.nbytes
        found[f"{ranks} {recompute}"] = sent, count, *peaks, page.peak, str(page)
    on.kernel.aten_path.blocks._BLOCK_POSITIONS = 2048
    return found


@torch.enable_grad()
def disagreements(on: Rank):
    """What each of three ranks hears if the last differs, in the forward or in the backward."""
    if 3 not in on.groups:
        return ABSENT
    problem, last, found = make_problem(6, 8), on.rank == 2, {}
    leaves = {name: leaf.requires_grad_() for name, leaf in problem.weights.items()}

    def run(**options):
        return sharded(on, problem, 3, **options)

    def backward(out, *names):
        return torch.autograd.grad(out.sum(), [leaves[name] for name in names], retain_graph=True)

    def without_gradient():
        with torch.no_grad():
            run()

    asked = {
        "requires_grad": without_gradient if last else run,
        "recompute": lambda: run(recompute="all" if last else "none"),
        "parameter_grads": lambda: run(parameter_grads="local" if last else "sum"),
    }
    first, second = run(), run()
    leaves["g_out_weight"].requires_grad_(not last)
    other = run()
    leaves["g_out_weight"].requires_grad_()
    asked |= {
        "gradients": lambda: backward(other, "p_out_weight"),
        "pass": lambda: run() if last else backward(first, "p_out_weight"),
        "call": lambda: backward(second if last else first, "p_out_weight"),
    }
    for name, call in asked.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    backward(second, "p_out_weight")  # the ranks still understand each other
    return found


@torch.enable_grad()
def failures(on: Rank):
    """What two ranks hear of what there is not, and of a backward that is out of memory on one."""
    if 2 not in on.groups:
        return ABSENT
    problem, found = make_problem(6, 8, residual=True), {}
    weight = problem.weights["p_out_weight"].requires_grad_()
    schedule = on.kernel.sharded_schedule.backward

    def twice():
        (grad,) = torch.autograd.grad(sharded(on, problem, 2).sum(), weight, create_graph=True)
        grad.sum().backward()

    def forward_mode():
        with forward_ad.dual_level():
            sharded(on, problem, 2)

    def exhausted():
        out, allocate = sharded(on, problem, 2), schedule.allocate_backward

        def fail(*_):
            raise torch.OutOfMemoryError("no memory for planes")

        if on.rank == 1:
            schedule.allocate_backward = fail
        try:
            out.sum().backward()
        finally:
            schedule.allocate_backward = allocate

    asked = {
        "twice": twice,
        "forward mode": forward_mode,
        "torch.func": lambda: torch.func.grad(lambda _: sharded(on, problem, 2).sum())(weight),
        "inplace": lambda: sharded(on, problem, 2, inplace=True),
        "parameter_grads": lambda: sharded(on, problem, 2, parameter_grads="mean"),
        "exhausted": exhausted,
    }
    for name, call in asked.items():
        try:
            call()
        except (ValueError, NotImplementedError, torch.OutOfMemoryError) as error:
            found[name] = f"{type(error).__name__} {error}"
    return found


@torch.enable_grad()
def a_rank_without_a_backward(on: Rank):
    """Its output is no part of its loss: whether the others end."""
    group = impatient_group(range(3))
    if 3 not in on.groups:
        return ABSENT
    problem = make_problem(6, 8)
    problem.weights["p_out_weight"].requires_grad_()
    out = sharded(on._replace(groups={3: group}), problem, 3)
    if on.rank < 2:
        with pytest.raises(RuntimeError):
            out.sum().backward()
    return "ended"


EQUAL = [
    in_double_precision,
    equal_blocks,
    of_padded_batches,
    of_some,
    in_the_interpreter,
    by_copies,
    by_packed_messages,
    in_a_context,
    in_a_compiled_function,
]
CASES = [*EQUAL, bytes_and_memory, disagreements, failures, a_rank_without_a_backward]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return reports_of(CASES, tmp_path_factory)


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.__name__)
def test_the_gradients_are_those_of_one_process(reports, case):
    assert len(report_of(reports, case)) == RANKS


def test_bytes_and_memory(reports):
    """Exchanged are da, db and dt, and what was not kept: a and b, or t too."""
    for report in report_of(reports, bytes_and_memory).values():
        for name, (sent, count, forward, backward, planned, page) in report.items():
            ranks, recompute = name.split()
            ranks, exchanged = int(ranks), {"none": 3, "product": 5, "all": 6}[recompute]
            assert sent == exchanged * (ranks - 1) * (LONG**2 * 32 * 4) // ranks**2
            told = re.search(
                r"the backward sends ([\d,]+) messages, ([\d.]+) MiB; it holds ([\d.]+) such", page
            )
            assert told[1] == f"{count:,}" and told[2] == f"{sent / 2**20:,.1f}"
            for peak, wanted in ((forward, planned), (backward, float(told[3]) + 1)):  # and dx
                assert wanted - 0.01 <= peak <= wanted + 1, name


def test_ranks_that_disagree_raise_the_same_error(reports):
    found = report_of(reports, disagreements)
    assert found[0] == found[1] == found[2]
    every = [*make_problem(6, 8).weights]
    pattern = r"all ranks must have the same call; got (\d+) on rank 0, \1 on rank 1, \d+ on rank 2"
    assert re.fullmatch(pattern, found[0].pop("call"))
    assert found[0] == {
        name: f"all ranks must have the same {name}; got {ours} on rank 0, {ours} on rank 1, "
        f"{other} on rank 2"
        for name, ours, other in (
            ("requires_grad", True, False),
            ("recompute", "none", "all"),
            ("parameter_grads", "sum", "local"),
            ("gradients", every, [name for name in every if name != "g_out_weight"]),
            ("pass", "backward", "forward"),
        )
    }


def test_refusals_and_failures(reports):
    found = report_of(reports, failures)
    transforms = (
        "NotImplementedError a sharded call has no forward-mode AD and no transforms of "
        "torch.func; got one"
    )
    wanted = {
        "twice": "NotImplementedError the gradients of the sharded triangle multiplication can't "
        "be differentiated again; those of one process can, by the transforms of torch.func",
        "forward mode": transforms,
        "torch.func": transforms,
        "inplace": "ValueError inplace must be False where a gradient is needed; got True",
        "parameter_grads": "ValueError parameter_grads must be 'sum' or 'local'; got 'mean'",
        "exhausted": "OutOfMemoryError rank 1 of 2 is out of memory",
    }
    assert found[0] == wanted
    assert found[1] == wanted | {"exhausted": "OutOfMemoryError no memory for planes"}


def test_no_rank_waits_for_ever(reports):
    ended = report_of(reports, a_rank_without_a_backward)
    assert [ended[rank] for rank in range(3)] == ["ended"] * 3
