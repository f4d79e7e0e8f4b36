"""A pair tensor over 2, 3 and 4 processes, against the call of one process."""

import contextlib
import dataclasses
import gc
import itertools
import os
import time
import weakref
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import DTYPES, as_call, make_problem
from mapped import exchange_by, mapped, packed
from ranks import RANKS, Rank, report_of, reports_of, same_values

DIRECTIONS = ("outgoing", "incoming")
ABSENT = None  # the report of a rank without a part in a case


def part_of(on: Rank, problem, ranks: int, dim: int):
    """A function that cuts a rank's part from a tensor [B, L, L, ...]."""
    rows = on.kernel.exchange.Layout(ranks, problem.x.shape[1], 1).rows(on.rank)
    return lambda tensor: tensor if tensor is None else tensor.narrow(
        dim, rows.start, rows.stop - rows.start
    )


def sharded(on: Rank, problem, ranks: int, dim: int = 1, **changes) -> torch.Tensor:
    """The sharded function that takes these arguments, on this rank's part."""
    cut, drop_mask = part_of(on, problem, ranks, dim), problem.drop_mask

    def part(tensor):
        return None if tensor is None else cut(tensor).contiguous()

    pair = part(problem.x)
    residual = pair if problem.residual is problem.x else part(problem.residual)
    named = {
        "group": on.groups[ranks], "dim": dim, "length": problem.x.shape[1],
        "mask": part(problem.mask), "eps": problem.eps, **problem.weights, **changes,
    }  # fmt: skip
    if problem.biases:
        return on.kernel.sharded_triangle_multiplicative_update(
            pair, problem.direction, **named, **problem.biases
        )
    got = on.kernel.sharded_triangle_multiplicative_update_with_residual(
        pair, problem.direction, residual, part(drop_mask) if dim == 2 else drop_mask, **named
    )
    assert got.is_contiguous() and (not changes.get("inplace") or got is residual)
    return got


@contextlib.contextmanager
def memory_of_no_numbers():
    """A context in which torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_equals_one_process(on: Rank, problem, ranks, dim=1, exact=False, **others):
    lengths = others.get("lengths")
    others["lengths"] = None if lengths is None else torch.as_tensor(lengths)
    whole = problem.run(on.kernel, lengths=others["lengths"])
    with memory_of_no_numbers():
        got = sharded(on, problem, ranks, dim, **others)
    wanted = part_of(on, problem, ranks, dim)(whole)
    if exact:
        assert torch.equal(got, wanted)
    same_values(got, wanted)


def equal_blocks(on: Rank):
    """Blocks of positions, and so the shapes of all operations, are those of one process."""
    blocks = on.kernel.aten_path.blocks
    for ranks in on.groups:
        length = 64 if ranks != 3 else 48
        blocks._BLOCK_POSITIONS = blocks.LEAST_POSITIONS = 4 * length  # four rows
        for at, (direction, dim) in enumerate(itertools.product(DIRECTIONS, (1, 2))):
            problem = make_problem(
                length, 16, 12, dtype=DTYPES[(at + ranks) % 3], direction=direction,
                mask=("bool", "soft", "float")[at % 3], residual=dim == 1, drop_mask=True,
                batch=1 + at // 3,
            )  # fmt: skip
            assert_equals_one_process(on, problem, ranks, dim)
    blocks._BLOCK_POSITIONS, blocks.LEAST_POSITIONS = 2048, 256


def any_lengths_and_widths(on: Rank):
    """Ragged lengths, fewer residues than ranks, uneven channels, fewer channels than ranks."""
    for ranks in on.groups:
        for at, (length, channels, hidden, batch) in enumerate(
            ((50, 16, 10, 1), (9, 8, 5, 3), (3, 8, 3, 1), (1, 5, 1, 2), (23, 6, 18, 1))
        ):
            problem = make_problem(
                length, channels, hidden, batch=batch, direction=DIRECTIONS[at % 2],
                dtype=DTYPES[at % 3], mask=(None, "bool", "expanded", "soft", "float")[at],
                residual=at % 2 == 0, drop_mask=at % 3 == 0, biases=at == 1,
            )  # fmt: skip
            memory = ("lean", "auto")[(at + ranks) // 2 % 2]
            assert_equals_one_process(on, problem, ranks, dim=1 + (at + ranks) % 2, memory=memory)


def packed_messages(on: Rank):
    """As NCCL has them where they are short: one of a and one of b, of all channels of a group."""
    batch_isend_irecv, most = dist.batch_isend_irecv, []

    def counted(operations):
        most.append(len(operations))
        return batch_isend_irecv(operations)

    with packed(on), mock.patch.object(dist, "batch_isend_irecv", counted):
        any_lengths_and_widths(on)
        over_the_residual(on)
        most.clear()
        if 2 in on.groups:  # groups of four channels of each rank
            assert_equals_one_process(on, make_problem(12, 8, 64), 2)
            assert set(most) == {4, 2}


def lengths(on: Rank):
    for ranks in on.groups.keys() & {2, 3}:
        for dim, direction in ((1, "outgoing"), (2, "outgoing"), (1, "incoming")):
            problem = make_problem(21, 8, batch=3, direction=direction, residual=dim == 1)
            real = torch.tensor([21, 0, 13])
            assert_equals_one_process(on, problem, ranks, dim, lengths=real)


def over_the_residual(on: Rank):
    for ranks in on.groups.keys() & {2, 3}:
        for at, dim in ((0, 1), (1, 2), (2, 1)):
            problem = make_problem(13, 8, batch=2, direction=DIRECTIONS[at % 2], drop_mask=True)
            problem.residual = problem.x if at < 2 else problem.x.flip(1)
            real = None if at == 0 else torch.tensor([13, 7])
            memory = ("lean", "default", "lean")[at]
            assert_equals_one_process(
                on, problem, ranks, dim, inplace=True, lengths=real, memory=memory
            )


def any_leading_axes(on: Rank):
    problem = make_problem(7, 6, batch=6, mask="soft")
    weights = problem.weights
    x, whole = problem.x.view(2, 3, 7, 7, 6), problem.mask
    for mask in (whole.view(2, 3, 7, 7), whole[:3], whole[0]):
        for pair in (x, x[:1], x[0, 0]):
            wanted = on.kernel.triangle_multiplicative_update(pair, "outgoing", mask, **weights)
            dim, rows = mask.ndim % 2 + 1, on.kernel.exchange.Layout(RANKS, 7, 1).rows(on.rank)
            own = (..., rows, *[slice(None)] * (3 - dim))
            got = on.kernel.sharded_triangle_multiplicative_update(
                pair[own], "outgoing", mask[own[:-1]], group=on.groups[RANKS], dim=dim, length=7,
                **weights,
            )  # fmt: skip
            same_values(got, wanted[own])


def in_a_compiled_function(on: Rank):
    """In one graph."""
    if 2 not in on.groups:
        return ABSENT
    for dim, inplace in ((1, False), (2, True)):
        problem = make_problem(5, 8, residual=True)

        def run(problem, dim=dim, inplace=inplace):
            problem = dataclasses.replace(problem, residual=problem.residual * 2)
            return sharded(on, problem, 2, dim, inplace=inplace) * 2

        wanted = run(problem)
        torch._dynamo.reset()
        same_values(torch.compile(run, backend="aot_eager", fullgraph=True)(problem), wanted)


def a_pair_stack(on: Rank):
    """transformers' own, patched, on the rows or columns of two ranks."""
    if 2 not in on.groups:
        return ABSENT
    transformers = pytest.importorskip("transformers")
    from transformers.models.esmfold2 import modeling_esmfold2

    config = transformers.EsmFold2Config(
        pairwise_hidden_size=8, pair_transition_intermediate_size=12
    )
    torch.manual_seed(0)
    stack = modeling_esmfold2.EsmFold2PairUpdateStack(config, 2).eval()
    problem = make_problem(9, 8, mask="bool")
    with on.kernel.patch(stack) as report:
        assert len(report.swapped) == 8 and not report.left
        whole = stack(problem.x, pair_attention_mask=problem.mask)
        for dim in (1, 2):
            part = part_of(on, problem, 2, dim)
            with on.kernel.sharded_pairs(on.groups[2], length=9, dim=dim):
                got = stack(part(problem.x), pair_attention_mask=part(problem.mask))
            same_values(got, part(whole))
    with on.kernel.patch(stack, mesh=on.groups[2]):
        with pytest.raises(ValueError, match="as torch.chunk divides them"):
            stack(problem.x, pair_attention_mask=problem.mask)  # a whole pair tensor
        part = part_of(on, problem, 2, 1)
        same_values(stack(part(problem.x), pair_attention_mask=part(problem.mask)), part(whole))
    same_values(stack(problem.x, pair_attention_mask=problem.mask), whole)


def no_residues(on: Rank):
    for batch, length in ((2, 0), (0, 5)):
        x = torch.empty(batch, length, length, 8)
        problem = dataclasses.replace(make_problem(3, 8), x=x)
        got = [sharded(on, problem, ranks) for ranks in on.groups]
        assert all(some.numel() == 0 and some.shape[0] == batch for some in got)


def in_the_interpreter(on: Rank):
    """The Triton kernels: rows and columns, lengths, a drop mask for each row.

    numpy multiplies a transposed operand in another order.
    """
    with on.on_triton():
        for ranks, dim, direction, batch, real in (
            (2, 1, "outgoing", 1, None),
            (2, 2, "outgoing", 1, [8]),
            (3, 1, "incoming", 2, [9, 5]),
            (3, 2, "incoming", 1, None),
        ):
            if ranks in on.groups:
                problem = make_problem(
                    9, 16, batch=batch, dtype=torch.bfloat16, direction=direction,
                    mask="soft", residual=True, drop_mask=True,
                )  # fmt: skip
                turned, memory = (direction == "incoming") != (dim == 2), "lean" if real else "auto"
                assert_equals_one_process(
                    on, problem, ranks, dim, not turned, lengths=real, memory=memory
                )
        if 2 in on.groups:
            problem = make_problem(9, 16)
            page = on.kernel.explain(
                on.kernel.sharded_triangle_multiplicative_update,
                part_of(on, problem, 2, 1)(problem.x), group=on.groups[2], length=9,
                precision="fp16x3", **problem.weights,
            )  # fmt: skip
            assert "'fp16x3' is run as TF32x3" in str(page)


def by_copies(on: Rank):
    """As in the interpreter above, but processes write to each other's memory."""
    calls = (
        (1, "outgoing", 1, 48, None, "default"),
        (2, "incoming", 2, 16, None, "auto"),
        (1, "outgoing", 1, 16, [8], "lean"),
        (1, "outgoing", 1, 7, None, "default"),
    )
    found = {}
    with on.on_triton(), mapped(on) as seen:
        for ranks in on.groups.keys() & {2, RANKS}:
            for dim, direction, batch, hidden, real, memory in calls:
                problem = make_problem(
                    9, 16, hidden, batch=batch, dtype=torch.bfloat16, direction=direction,
                    mask="soft", residual=True, drop_mask=True,
                )  # fmt: skip
                assert_equals_one_process(
                    on, problem, ranks, dim, exact=True, lengths=real, memory=memory,
                    inplace=hidden == 7,
                )  # fmt: skip
            problem, group = make_problem(9, 16, 48, dtype=torch.bfloat16), on.groups[ranks]
            page = on.kernel.explain(
                on.kernel.sharded_triangle_multiplicative_update,
                part_of(on, problem, ranks, 1)(problem.x), group=group, length=9,
                memory="default", **problem.weights,
            )  # fmt: skip
            kept = on.kernel.carriers.memory.known_memory_of(group)
            found[ranks] = [str(page), page.peak_bytes, kept.bytes(problem.x.device)]
    assert seen.mapped == len(found) and seen.watched == len(found) * (1 + len(calls))
    return found


def memory_that_some_lack(on: Rank):
    """Ranks that lack memory, or can't map it, or have freed it alone, and what each one hears."""
    problem, found = make_problem(9, 16, 24, dtype=torch.bfloat16), []
    larger, memory = make_problem(9, 16, 48, dtype=torch.bfloat16), on.kernel.carriers.memory

    def run(of=problem, **options):
        assert_equals_one_process(on, of, RANKS, exact=True, **options)
        found.append([seen.mapped, len(seen.taken)])

    with on.on_triton(), mapped(on) as seen:
        run()
        seen.short = (1,)
        run(larger)  # by messages: there is no more memory
        run(larger)  # which isn't tried again
        run(memory="lean")  # there is none of less either, as the larger took its place
        seen.short = ()
        on.kernel.free_exchange_memory()
        run(larger)
        if on.rank == 1:
            on.kernel.free_exchange_memory()
        with pytest.raises(ValueError) as raised:
            run(larger)
        found.append(str(raised.value))
        on.kernel.free_exchange_memory()
        with exchange_by("messages"):
            run(larger)
        with exchange_by("messages" if on.rank == 1 else "copies"):
            with pytest.raises(ValueError, match="the same mapped; got .*, 0 on rank 1, "):
                run(larger)
        schedule = on.kernel.sharded_schedule.forward
        allocate = schedule.allocate

        def exhausted(call, stages, exchange, way, saves):
            if way.mapped:
                raise torch.OutOfMemoryError("no memory for planes")
            return allocate(call, stages, exchange, way, saves)

        if on.rank == 1:
            schedule.allocate = exhausted
        run(larger)  # by messages: there is too little memory beside what is mapped
        schedule.allocate = allocate
        run(larger)  # nor is it tried again
        on.kernel.free_exchange_memory()
        seen.lost = (2,)
        run(larger)  # by messages: it can't be mapped
        run()  # nor is it tried again
        assert not memory.known_memory_of(on.groups[RANKS]).possible
    return found


def bytes_sent(on: Rank):
    """By rank and group: bytes and messages sent in two calls, and the most messages of a batch."""
    found = {}
    batch_isend_irecv = dist.batch_isend_irecv
    for ranks in on.groups:
        sent, count, most = 0, 0, 0

        def counted(operations):
            nonlocal sent, count, most
            tensors = [of.tensor for of in operations if of.op is dist.isend]
            sent, count = sent + sum(of.nbytes for of in tensors), count + len(tensors)
            most = max(most, len(operations))
            return batch_isend_irecv(operations)

        dist.batch_isend_irecv = counted
        for direction in DIRECTIONS:
            sharded(on, make_problem(24, 8, 24, direction=direction), ranks)
        dist.batch_isend_irecv = batch_isend_irecv
        problem = make_problem(24, 8, 24)
        part = part_of(on, problem, ranks, 1)(problem.x)
        explanation = on.kernel.explain(
            on.kernel.sharded_triangle_multiplicative_update, part, group=on.groups[ranks],
            length=24, memory="lean", **problem.weights,
        )  # fmt: skip
        found[ranks] = sent, count, most, str(explanation)
    return found


DISAGREEMENTS = {
    "B": {"batch": 2},
    "C": {"channels": 9},
    "D": {"hidden": 9},
    "dtype": {"dtype": torch.bfloat16},
    "direction": {"direction": "incoming"},
}


def disagreements(on: Rank):
    """What each rank hears if the last of three differs."""
    found = {}
    if 3 not in on.groups:
        return ABSENT
    arguments = {"length": 6, "channels": 8, "hidden": 8, "direction": "outgoing"}
    problem = make_problem(**arguments)
    last = on.rank == 2
    calls = {
        name: (make_problem(**arguments | changes) if last else problem, {})
        for name, changes in DISAGREEMENTS.items()
    }
    calls["dim"] = problem, {"dim": 2 if last else 1}
    calls["precision"] = problem, {"precision": "IEEE" if last else "TF32"}
    calls["memory"] = problem, {"memory": "lean" if last else "auto"}
    calls["lengths"] = problem, {"lengths": torch.tensor([3]) if last else None}
    longer = make_problem(7, 8, 8) if last else problem
    calls["L"] = longer, {}
    for name, (mine, options) in calls.items():
        try:
            sharded(on, mine, 3, **options)
        except ValueError as error:
            found[name] = str(error)
    sharded(on, problem, 3)  # the ranks still understand each other
    return found


def failures(on: Rank):
    """What each rank hears if one refuses its arguments, or is out of memory."""
    if 3 not in on.groups:
        return ABSENT
    found, problem = {}, make_problem(6, 8, residual=True)
    schedule = on.kernel.sharded_schedule.forward
    allocate = schedule.allocate

    def exhausted(call, stages, exchange, way, saves):
        if name == "out of memory" or not way.lean:
            raise torch.OutOfMemoryError("no memory for planes")
        modes.append("lean")
        return allocate(call, stages, exchange, way, saves)

    modes = []
    for name in ("refused", "out of memory", "short of memory"):
        wrong = problem
        if on.rank == 1 and name == "refused":
            wrong = dataclasses.replace(problem, residual=problem.residual[..., :7])
        if on.rank == 1 and name != "refused":
            schedule.allocate = exhausted
        try:
            assert_equals_one_process(on, wrong, 3) if wrong is problem else sharded(on, wrong, 3)
        except Exception as error:
            found[name] = type(error).__name__, str(error)
        schedule.allocate = allocate
    sharded(on, problem, 3)
    assert modes == (["lean"] if on.rank == 1 else [])
    return found


def refusals(on: Rank):
    """Both of two ranks ask for what there is not."""
    if 2 not in on.groups:
        return ABSENT
    problem, found = make_problem(6, 8), {}
    asked = {
        "memory": {"memory": "little"},
        "dim": {"dim": 3},
        "length": {"length": 7},
        "no length": {"length": 6.0},
        "long": {"length": 46_337},
        "mask": {"mask": torch.ones(6, 6)},
        "group": {"group": dist.GroupMember.NON_GROUP_MEMBER},
    }
    for name, options in asked.items():
        try:
            sharded(on, problem, 2, **{"dim": 1} | options)
        except (ValueError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__} {error}"
    return found


def a_rank_that_does_not_call(on: Rank):
    """Whether the others end, and within some seconds."""
    group = impatient_group(range(3))
    if on.rank >= 2:
        return ABSENT
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        sharded(on._replace(groups={3: group}), make_problem(6, 8), 3)
    return time.monotonic() - start


def impatient_group(ranks) -> dist.ProcessGroup:
    """A group of a short timeout, which begins when all ranks have joined."""
    group = dist.new_group(ranks)
    dist.barrier()
    if group != dist.GroupMember.NON_GROUP_MEMBER:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)
    return group


def a_killed_rank(on: Rank):
    """It dies amid the exchange."""
    group = impatient_group(range(RANKS))
    if on.rank == 3:
        dist.batch_isend_irecv = lambda _: os._exit(1)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        sharded(on._replace(groups={RANKS: group}), make_problem(24, 8), RANKS)
    return time.monotonic() - start


EQUAL = [
    equal_blocks,
    any_lengths_and_widths,
    any_leading_axes,
    packed_messages,
    lengths,
    over_the_residual,
    no_residues,
    in_the_interpreter,
    by_copies,
    in_a_compiled_function,
    a_pair_stack,
]
CASES = [
    *EQUAL,
    memory_that_some_lack,
    bytes_sent,
    disagreements,
    failures,
    refusals,
    a_rank_that_does_not_call,
    a_killed_rank,
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return reports_of(CASES, tmp_path_factory)


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.__name__)
def test_the_parts_are_those_of_one_process(reports, case):
    assert len(report_of(reports, case)) == RANKS


def test_bytes_are_those_of_the_formula(reports):
    """3 (N - 1) / N^2 pair tensors a call; there were two calls, and one rank sends nothing."""
    for report in report_of(reports, bytes_sent).values():
        for ranks, (sent, _, most, _) in report.items():
            ranks = int(ranks)
            assert sent == 2 * 3 * (ranks - 1) * (24 * 24 * 24 * 4) // ranks**2
            assert most <= 256


def test_explain(reports):
    """What a rank's call would send is what it sent."""
    for rank, report in report_of(reports, bytes_sent).items():
        for ranks, (sent, count, _, page) in report.items():
            rows = 24 // int(ranks)
            assert f"outgoing, pair tensor 1x{rows}x24x8 float32 on cpu, D = 24\n" in page
            assert (
                f"  note     rank {rank} of {ranks} has residues {rank * rows} to "
                f"{(rank + 1) * rows} of 24 along axis 1, and multiplies {rows} of 24 channels, in "
            ) in page
            assert (
                f"  note     for each sequence it sends {count // 2:,} messages, "
                f"{sent / 2 / 2**20:,.1f} MiB"
            ) in page
            assert "  memory   lean\n" in page and "  buffer   product: 3.00 such" in page


@pytest.mark.parametrize("lean, inplace", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("batch, ranks, rank", [(1, 2, 0), (2, 8, 3), (1, 5, 4), (1, 3, 2)])
def test_memory(submodule, batch, ranks, rank, lean, inplace):
    """a and b are 2 shares, or 1 / 4 in lean mode and then t is 1; the output is 1.

    The planes that are multiplied, 3 / 8, lie in the output where they fit.
    """
    length, hidden = 64 if ranks != 3 else 4, 64
    layout = submodule("exchange").Layout(ranks, length, hidden)
    rows = layout.rows(rank)
    problem = make_problem(length, hidden, batch=batch)
    x = problem.x[:, rows].to("meta")
    call = as_call(submodule("_call"), problem, inplace=inplace)._replace(x=x, residual=x)
    call = call._replace(memory="lean" if lean else "default")
    stages, schedule = SimpleNamespace(slots=3, pitch=length), submodule("sharded_schedule.forward")
    (way,) = schedule.ways_of(call, stages, layout, None)
    exchange = submodule("exchange").Exchange(None, rank, layout)
    planes, product, slots, _, out = schedule.allocate(call, stages, exchange, way)
    of_rows = length * (rows.stop - rows.start) * hidden
    planes_of_group = 3, layout.size, length, length
    room = length * layout.rows(0).stop * hidden
    twice = not lean and not inplace and 6 * layout.size * length**2 <= room
    assert slots.shape == (1 + twice, *planes_of_group) and out.shape == x.shape
    assert product[0].numel() == of_rows and product.shape[0] == batch
    if lean:
        assert planes.numel() <= of_rows * 2 * ranks * layout.size / hidden
    else:
        assert planes.numel() == 2 * of_rows
    fits = not inplace and slots.numel() <= of_rows
    memories = {tensor.untyped_storage()._cdata for tensor in (planes, product, slots, out)}
    assert len(memories) == 4 - fits - (not lean) and (not inplace or out is x)
    if fits:  # in the sequence that is written last
        assert slots.storage_offset() == (batch - 1) * of_rows


@pytest.mark.parametrize("length, hidden, ranks, size", [
    (512, 128, 2, 64), (1024, 256, 2, 64), (2048, 256, 2, 16), (4096, 256, 2, 16),
    (2048, 128, 2, 16), (2048, 256, 8, 16), (8192, 256, 8, 4), (256, 12, 8, 2), (0, 8, 2, 1),
])  # fmt: skip
def test_groups_on_a_gpu(submodule, length, hidden, ranks, size):
    """An eighth of a rank's channels, or 128 MiB of planes in bfloat16, or all; at most 64."""
    layout, shapes = submodule("exchange").Layout, (length, hidden)
    x = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    assert layout.of(ranks, *shapes, x).size == size
    x.is_cuda = False
    assert layout.of(ranks, *shapes, x) == layout(ranks, *shapes)


@pytest.mark.parametrize("length, is_cuda, packed", [
    (4096, True, False), (4000, True, True), (64, True, True), (64, False, False),
])  # fmt: skip
def test_short_messages_among_gpus_are_packed(submodule, length, is_cuda, packed):
    """Those of less than 16 MiB: of two ranks 2048 rows of 4096 in bfloat16."""
    parts = submodule("exchange")
    x = SimpleNamespace(is_cuda=is_cuda, element_size=lambda: 2)
    exchange = parts.Exchange(None, 0, parts.Layout(2, length, 8))
    assert exchange.packs(x, length) == packed


def test_memory_that_all_ranks_map(reports):
    """In the default mode twice a, b and t of a group, and words; explain counts all of it."""
    for rank, report in report_of(reports, by_copies).items():
        for ranks, (page, peak, kept) in report.items():
            size = -(-48 // int(ranks) // 8)  # channels of a rank in a group
            assert kept == 256 + 2 * 3 * size * 9 * 16 * 2
            if rank != 3:  # which has no rows: nothing is told
                rows = -(-9 // int(ranks))
                rows = min(rows, 9 - rank * rows)
                own = rows * (2 * 48 * 16 * 2 + 9 * 16 * 2 + 8 * 16)  # a and b, output, moments
                assert peak == own + kept
                assert f"planes that all ranks map, which are kept: {kept / 288 / rows:.2f}" in page
                assert "a group's planes travel during stage 2 of another" in page


def test_without_memory_that_all_can_map_there_are_messages(reports):
    """What was mapped, and asked for, after each call."""
    found = report_of(reports, memory_that_some_lack)
    unequal = "all ranks must have the same exchange_memory; got "
    for rank in range(RANKS):
        *before, refused, without, full, still, last, again = found[rank]
        assert before == [[1, 1], [1, 2], [1, 2], [1, 3], [2, 4]]
        assert refused.startswith(unequal) and ", 0 on rank 1, " in refused
        assert without == [2, 4] and full == still == [3, 5]
        assert last == again == [3 if rank == 2 else 4, 6]


def test_ranks_that_disagree_raise_the_same_error(reports):
    found = report_of(reports, disagreements)
    assert found[0] == found[1] == found[2]
    assert found[0].keys() == {*DISAGREEMENTS, "dim", "precision", "memory", "lengths", "L"}
    for name, message in found[0].items():
        assert message.startswith(f"all ranks must have the same {name}; got "), message
        assert message.endswith(" on rank 2")
    assert found[0]["dtype"].endswith(
        "got torch.float32 on rank 0, torch.float32 on rank 1, torch.bfloat16 on rank 2"
    )


def test_a_failure_on_one_rank_is_known_to_all(reports):
    found = report_of(reports, failures)
    assert found[0] == found[2]
    assert found[0]["refused"] == [
        "ValueError",
        "every rank's arguments must fit; rank 1 of 3 refused its own, and raises why",
    ]
    assert found[1]["refused"][1].startswith("residual must have the shape of pair_local")
    assert found[0].keys() == {"refused", "out of memory"}  # a lean call went well
    assert found[0]["out of memory"] == ["OutOfMemoryError", "rank 1 of 3 is out of memory"]
    assert found[1]["out of memory"] == ["OutOfMemoryError", "no memory for planes"]


def test_refusals(reports):
    found = report_of(reports, refusals)
    wanted = {
        "memory": "ValueError memory must be 'auto', 'default' or 'lean'; got 'little'",
        "dim": "ValueError dim must be 1 or 2, an axis of residues; got 3",
        "length": "ValueError pair_local must be [B, 3, 7, C] with C of at least 1, residues 4 to "
        "7 of L = 7 along dim 1, as torch.chunk divides them; got (1, 3, 6, 8)",
        "no length": "ValueError length must be L, an integer of at least 0; got 6.0",
        "long": "NotImplementedError length may be at most 46336, as one plane of L * L elements "
        "is indexed in 32 bits; got 46337",
        "mask": "ValueError mask must be [..., 3, 6], a number for each pair of pair_local; "
        "got (6, 6)",
        "group": "ValueError group must have the rank that calls; got a group without it",
    }
    assert found[1] == wanted and found[0].keys() == wanted.keys()


def test_no_rank_waits_for_ever(reports):
    late = report_of(reports, a_rank_that_does_not_call)
    assert set(late) == set(range(RANKS)) and late[0] is not ABSENT
    assert set(report_of(reports, a_killed_rank)) == {0, 1, 2}


class Plan:
    """The messages of one call, by rank, as the exchange would post them."""

    def __init__(self, schedule, monkeypatch, layout, pitch):
        self.batches = {rank: [] for rank in range(layout.ranks)}
        monkeypatch.setattr(schedule.dist, "P2POp", lambda *of: of)
        shape = layout.hidden, layout.length, pitch
        whole = torch.empty(2, *shape, device="meta")
        for rank in range(layout.ranks):
            monkeypatch.setattr(
                schedule.dist, "batch_isend_irecv",
                lambda operations, mine=self.batches[rank]: mine.append(operations) or [],
            )  # fmt: skip
            planes = whole[:, :, layout.rows(rank)]
            exchange = schedule.Exchange(None, rank, layout)
            for group in range(layout.groups):
                channels, of_group = layout.channels(rank, group), planes[:, layout.group(group)]
                slots = torch.empty(2, channels.stop - channels.start, *shape[1:], device="meta")
                pairs = [*zip(of_group, slots, strict=True)]
                exchange.begin(group, pairs, to_channels=True)
                exchange.begin(group, pairs[:1], to_channels=False)


@pytest.mark.parametrize(
    "ranks, length, hidden",
    [(64, 64, 128), (64, 100, 128), (48, 96, 128), (256, 256, 256), (3, 7, 1000)],
)
def test_plans_of_many_ranks(submodule, monkeypatch, ranks, length, hidden):
    """Bytes are the formula's, and each message is posted in the same batch on both its ends."""
    schedule = submodule("exchange")
    layout = schedule.Layout(ranks, length, hidden)
    sent = {rank: layout.sent(rank)[1] for rank in range(ranks)}
    batches = {}
    if ranks <= 64:  # the messages of more would take a minute to write down
        batches = Plan(schedule, monkeypatch, layout, length).batches
        for rank, mine in batches.items():
            messages = [of[1] for operations in mine for of in operations if of[0] is dist.isend]
            rows = sum(message.numel() for message in messages) // length
            assert layout.sent(rank) == (len(messages), rows)
    rows = [i for rank in range(ranks) for i in range(length)[layout.rows(rank)]]
    assert rows == list(range(length))
    assert sum(layout.channel_count(rank) for rank in range(ranks)) == hidden
    if length % ranks == hidden % ranks == 0:
        assert set(sent.values()) == {3 * (ranks - 1) * length * hidden // ranks**2}
    else:
        total = sum(sent.values())
        own = sum(
            (layout.rows(rank).stop - layout.rows(rank).start) * layout.channel_count(rank)
            for rank in range(ranks)
        )
        assert total == 3 * (length * hidden - own)
    for rank, mine in batches.items():
        assert all(len(operations) <= 256 for operations in mine)
        for at, operations in enumerate(mine):
            for peer in {to for _, _, to, _ in operations}:
                out, back = (
                    [tuple(m.shape) for op, m, to, _ in of if op is kind and to == end]
                    for of, kind, end in (
                        (operations, dist.isend, peer), (batches[peer][at], dist.irecv, rank)
                    )
                )  # fmt: skip
                assert out == back


def alone_in_a_group_of(backends: str, schedule, monkeypatch) -> None:
    """The one rank of a group with such backends, without processes."""
    for name, value in {
        "get_backend_config": lambda _: backends,
        "get_world_size": lambda _: 1,
        "get_rank": lambda _: 0,
        "all_gather": lambda of_all, mine, _: of_all[0].copy_(mine),
    }.items():
        monkeypatch.setattr(schedule.dist, name, value, raising=False)


@pytest.mark.parametrize(
    "backends, device", [("cuda:nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo", "cpu")]
)
def test_ranks_compare_on_a_cpu_if_their_group_can(submodule, monkeypatch, backends, device):
    """NCCL takes no tensors of a CPU, and the host would wait for a GPU's."""
    agreement, seen = submodule("agreement"), []
    alone_in_a_group_of(backends, agreement, monkeypatch)
    original = torch.tensor

    def tensor(values, device):
        seen.append(device.type)
        return original(values)

    monkeypatch.setattr(agreement.torch, "tensor", tensor)
    assert agreement.compare(None, {}, None, last=True)
    assert seen == [device]


def test_gloo_sends_tensors_of_a_cpu_alone(submodule, monkeypatch):
    schedule, problem = submodule("sharded"), make_problem(6, 8)
    alone_in_a_group_of("cpu:gloo,meta:gloo", schedule, monkeypatch)
    with pytest.raises(ValueError, match="group must .* tensors of meta, .*; got cpu:gloo,meta:"):
        schedule.sharded_triangle_multiplicative_update(
            problem.x.to("meta"), "outgoing", group=None, length=6, **problem.weights
        )


def test_a_failure_leaves_no_memory_behind(submodule, monkeypatch):
    """Its traceback holds the frames: if one held it too, planes would wait for the collector."""
    schedule = submodule("sharded_schedule.forward")
    alone_in_a_group_of("cpu:gloo", submodule("sharded"), monkeypatch)
    kept = []
    allocate = schedule.allocate

    def allocated(*arguments):
        buffers = allocate(*arguments)
        kept.append(weakref.ref(buffers.planes))
        return buffers

    def fails(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(schedule, "allocate", allocated)
    monkeypatch.setattr(schedule, "project", fails)
    problem = make_problem(6, 8)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            submodule("sharded").sharded_triangle_multiplicative_update(
                problem.x, "outgoing", group=None, length=6, memory="default", **problem.weights
            )
        assert [of() for of in kept] == [None]
    finally:
        gc.enable()


def test_a_group_is_a_group_or_a_mesh_in_its_order(submodule):
    schedule = submodule("sharded")
    with pytest.raises(TypeError, match="mesh must be a process group, a DeviceMesh.*; got 'foo'"):
        schedule.checked_group("mesh", "foo")
    mesh = SimpleNamespace(ndim=1, get_group=lambda *_: "its group", get_coordinate=lambda: [1])
    mesh.mesh = torch.tensor([0, 1, 2])
    assert schedule.checked_group("group", mesh) == "its group"
    mesh.mesh = torch.tensor([2, 1, 0])  # also where a rank's place is its own
    with pytest.raises(ValueError, match="group must be a DeviceMesh with ascending ranks"):
        schedule.checked_group("group", mesh)
    mesh.ndim = 2
    with pytest.raises(ValueError, match="group must be a DeviceMesh of one dimension; got 2"):
        schedule.checked_group("group", mesh)


def test_who_exchanges_by_copies(submodule, monkeypatch):
    memory = submodule("carriers.memory")
    monkeypatch.delenv(memory.EXCHANGE_VARIABLE, raising=False)
    group = memory.GroupMemory(SimpleNamespace, possible=True)
    assert group.takes(1, torch.device("cuda")) and not group.takes(1, torch.device("cpu"))
    monkeypatch.setenv(memory.EXCHANGE_VARIABLE, "messages")
    assert not group.takes(1, torch.device("cuda"))
    monkeypatch.setenv(memory.EXCHANGE_VARIABLE, "nccl")
    with pytest.raises(ValueError, match="ESMFOLD2_TRIMUL_EXCHANGE must be one of .*; got 'nccl'"):
        group.takes(1, torch.device("cuda"))


def test_a_mesh_leaves_no_triangle_to_its_own_formula(kernel, submodule, monkeypatch):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.esmfold2.modeling_esmfold2")
    monkeypatch.setattr(submodule("models.patching"), "checked_group", lambda name, group: group)
    layer = modeling.EsmFold2PairUpdateLayer(
        transformers.EsmFold2Config(pairwise_hidden_size=8, pair_transition_intermediate_size=12)
    )
    with kernel.patch(layer, mesh="mesh") as report:
        assert len(report.swapped) == 4
        # A transition's pairs are each alone, and need no division.
        layer.pair_transition(torch.randn(3, 8))
    layer.tri_mul_out.norm_start.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="every triangle multiplication .* must be swapped.*hook"):
        kernel.patch(layer, mesh="mesh")
    assert kernel.unpatch(layer) == []
    with pytest.raises(ValueError, match="parts must have 'triangle' where there is a mesh"):
        kernel.patch(layer, parts=("transition",), mesh="mesh")
