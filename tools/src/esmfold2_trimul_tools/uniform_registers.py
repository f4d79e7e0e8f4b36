"""Whether machine code of sm_90 reads uniform registers that nothing has written.

ptxas 12.8 (Triton 3.6 and 3.7) may make the address of a tile from a register that another branch
has written, and this one not: then wgmma reads anywhere. `descriptors` proves more, but can't
follow the indirect branch at which the warps of Hopper's kernels part. Here all code that no other
jump leads to is taken for its targets. What warps that come back to it have left there doesn't
count: no warp goes through it twice.

A register must not be read where it isn't written on every way there. A copy to another uniform
register is as what it copies; ptxas makes copies of words that no instruction reads. So a copy to
another kind of register is no reading. Whether a guarded instruction is carried out is not
followed: it counts as writing. Of what loads and stores by TMA read from one register on, the first
alone is looked at, and of a descriptor's address both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .descriptors import (
    Instruction,
    Lost,
    descriptor_registers,
    is_wgmma,
    next_ones,
    outputs,
    parse,
)

_UNIFORM = re.compile(r"\bUR(\d+)\b")
_DESCRIPTOR = re.compile(r"\bdesc\[UR(\d+)\]")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")


def unwritten(sass: Sequence[tuple[int, str]]) -> list[str]:
    """One sentence for each instruction that may read a uniform register without a value.

    Args:
        sass: (address, instruction) of the whole code of one kernel, as nvdisasm writes them.
    """
    code = [parse(address, text) for address, text in sass]
    try:
        leads = _leads(code)
        read = [_read(one) for one in code]
    except Lost as lost:
        return [str(lost)]
    written = [_written(one) for one in code]
    before: dict[int, int] = {}
    _follow(before, {0: 0}, code, leads, written, read)
    parted = [
        before[i] for i, one in enumerate(code) if one.base in _INDIRECT and i in before
    ]
    if parted:
        known = parted[0]
        for state in parted[1:]:
            known &= state
        starts = dict.fromkeys(_unreached(leads), known)
        _follow(before, starts, code, leads, written, read)
    sentences = []
    for i, known in sorted(before.items()):
        missing = 0 if _is_copy(code[i]) else read[i] & ~known
        if missing:
            names = ", ".join(f"UR{n}" for n in range(64) if missing >> n & 1)
            sentences.append(f"{code[i].base} at {code[i].address:#x} reads {names}, not written")
    return sentences


def is_indirect(sass: Sequence[tuple[int, str]]) -> bool:
    """Whether there is an indirect branch, which `descriptors.faults` can't follow."""
    return any(parse(address, text).base in _INDIRECT for address, text in sass)


def _follow(
    before: dict[int, int],
    starts: dict[int, int],
    code: list[Instruction],
    leads: list[list[int]],
    written: list[int],
    read: list[int],
) -> None:
    """Adds to what is written before each instruction, from those that are started at on."""
    before.update(starts)
    waiting = list(starts)
    while waiting:
        i = waiting.pop()
        after = before[i] | written[i]
        if _is_copy(code[i]) and read[i] & ~before[i]:
            after = before[i] & ~written[i]
        for to in leads[i]:
            merged = before[to] & after if to in before else after
            if merged != before.get(to):
                before[to] = merged
                waiting.append(to)


def _leads(code: list[Instruction]) -> list[list[int]]:
    """By instruction, the places of those that may come after it; of an indirect branch none."""
    index = {one.address: i for i, one in enumerate(code)}
    found = []
    for i, one in enumerate(code):
        if one.base in _INDIRECT:
            found.append([])
        elif one.base == "CALL":  # comes back
            found.append([i + 1, *next_ones(i, code, index)])
        elif one.base == "BSYNC":  # leads to behind the region that the BSSY ahead of it began
            begun = [o for o in code[:i] if o.base == "BSSY" and o.operands[0] == one.operands[0]]
            found.append([i + 1, *(index[int(o.operands[1], 16)] for o in begun[-1:])])
        else:
            found.append(next_ones(i, code, index))
    return [[to for to in all_to if to < len(code)] for all_to in found]


def _unreached(leads: list[list[int]]) -> list[int]:
    """The first instructions of what the others, from 0 on, don't lead to."""
    reached: set[int] = set()
    firsts = []
    for first in range(len(leads)):
        if first in reached:
            continue
        firsts.append(first)
        waiting = [first]
        while waiting:
            i = waiting.pop()
            if i not in reached:
                reached.add(i)
                waiting += leads[i]
    return firsts[1:]


def _is_copy(one: Instruction) -> bool:
    return one.base == "UMOV" and not one.guarded


def _bits(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


def _written(one: Instruction) -> int:
    """The uniform registers that an instruction writes, as bits."""
    count = 2 if "64" in one.parts or "WIDE" in one.parts else 1
    found = 0
    for name in outputs(one):
        if number := _UNIFORM.fullmatch(name):
            found |= _bits(int(number[1]), count)
    return found


def _read(one: Instruction) -> int:
    """Those that it reads."""
    if one.base == "MOV":
        return 0
    found = 0
    if is_wgmma(one):
        for _, first in descriptor_registers(one):
            if first is None:
                raise Lost(one)
            found |= _bits(first, 2)
        return found
    count = 2 if one.base.startswith("U") and "64" in one.parts else 1
    for place, operand in enumerate(one.operands[len(outputs(one)) :]):
        of_descriptor = one.base.startswith("UTMA") and place == 1
        of_descriptor = of_descriptor or _DESCRIPTOR.search(operand) is not None
        for number in _UNIFORM.findall(operand):
            found |= _bits(int(number), 2 if of_descriptor else count)
    return found
