"""Whether machine code of sm_90 reads uniform registers that nothing has written.

ptxas 12.8 (Triton 3.6 and 3.7) may make the address of a tile from a register that another branch
has written, and this one not: then wgmma reads anywhere. `descriptors` proves more, but can't
follow the indirect branch at which the warps of Hopper's kernels part. Here all code that no other
jump leads to is taken for its targets, with the registers that are written when it comes first: no
warp goes through it twice.

A register must not be read where it isn't written on every way there. A copy of such a register is
as one; ptxas makes them of the words of descriptors that no instruction reads. Whether a guarded
instruction is carried out is not followed: it counts as writing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .descriptors import Instruction, is_wgmma, next_ones, outputs, parse, width

_UNIFORM = re.compile(r"\bUR(\d+)\b")
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")


def unwritten(sass: Sequence[tuple[int, str]]) -> list[str]:
    """One sentence for each instruction that may read a uniform register without a value.

    Args:
        sass: (address, instruction) of the whole code of one kernel, as nvdisasm writes them.
    """
    code = [parse(address, text) for address, text in sass]
    written, read = [_written(one) for one in code], [_read(one) for one in code]
    leads = _leads(code)
    before: dict[int, int] = {0: 0}
    waiting = [0]
    while waiting:
        i = waiting.pop()
        after = before[i] | written[i]
        if _is_copy(code[i]) and read[i] & ~before[i]:
            after = before[i] & ~written[i]
        if code[i].base in _INDIRECT and leads[i][0] in before:
            continue
        for to in leads[i]:
            merged = before[to] & after if to in before else after
            if merged != before.get(to):
                before[to] = merged
                waiting.append(to)
    sentences = []
    for i, known in before.items():
        missing = 0 if _is_copy(code[i]) else read[i] & ~known
        if missing:
            names = ", ".join(f"UR{n}" for n in range(64) if missing >> n & 1)
            sentences.append(f"{code[i].base} at {code[i].address:#x} reads {names}, not written")
    return sentences


def is_indirect(sass: Sequence[tuple[int, str]]) -> bool:
    """Whether there is an indirect branch, which `descriptors.faults` can't follow."""
    return any(parse(address, text).base in _INDIRECT for address, text in sass)


def _leads(code: list[Instruction]) -> list[list[int]]:
    """By instruction, the places of those that may come after it."""
    index = {one.address: i for i, one in enumerate(code)}
    found = []
    for i, one in enumerate(code):
        if one.base in _INDIRECT:
            found.append([])
        elif one.base == "CALL":  # comes back
            found.append([i + 1, index[int(one.operands[-1], 16)]])
        elif one.base == "BSYNC":  # leads to behind the region that the BSSY ahead of it began
            begun = [o for o in code[:i] if o.base == "BSSY" and o.operands[0] == one.operands[0]]
            found.append([i + 1, *(index[int(o.operands[1], 16)] for o in begun[-1:])])
        else:
            found.append(next_ones(i, code, index))
    targets = _unreached(found)
    for i, one in enumerate(code):
        if one.base in _INDIRECT:
            found[i] = targets
    return found


def _unreached(leads: list[list[int]]) -> list[int]:
    """The first instructions of what the others don't lead to."""
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
    found = 0
    for name in outputs(one):
        if number := _UNIFORM.fullmatch(name):
            found |= _bits(int(number[1]), width(one))
    return found


def _read(one: Instruction) -> int:
    """Those that it reads."""
    if is_wgmma(one):
        place = 1 if one.operands[1].startswith("gdesc") else 2
        number = _UNIFORM.search(one.operands[place])
        if number is None:
            return 0
        first = int(number[1])
        return _bits(first, 4) if place == 1 else _bits(first + 2, 2)
    count = 2 if one.base.startswith("U") and "64" in one.parts else 1
    found = 0
    for operand in one.operands[len(outputs(one)) :]:
        for number in _UNIFORM.findall(operand):
            found |= _bits(int(number), count)
    return found
