"""Whether each wgmma instruction of sm_90 machine code reads a descriptor that ptxas made rightly.

ptxas 12.8 (Triton 3.6 and 3.7) may take the register of an address for that of a descriptor, where
a kernel multiplies tiles that lie in shared memory in two ways. Then wgmma reads anywhere.

A descriptor of wgmma is 64 bits, in two 32-bit registers (bits that aren't named are zero):

    low   0-13 address / 16        16-29 leading byte offset / 16
    high  0-13 stride offset / 16  17-19 base offset                  30-31 swizzle

`faults` follows the values of all registers through the code, as ranges that hold for every thread
and every way to an instruction. A wgmma passes if of each of its descriptors

- the low word is 14 or 15 bits, cut from a longer number, plus a constant within the fields, and
- the high word is a constant within the fields, and not 0.

So its layout is one that the compiler wrote down. An address that wasn't cut, a number from memory
and a register without a value are refused. This doesn't prove that the bits are those of the right
tile's address, nor that the constants are those of the right tile's layout. What the analysis
doesn't know it takes for any number, so it can refuse too much. It relies on the disassembler's
text, on a call's return to behind the call, and on a warp's common registers (UR) being written
only where its threads are together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_TOP = 2**32 - 1
_FIELD = 0x3FFF  # 14 bits
_CUTS = (_FIELD, 0x7FFF)  # of the address; newer Tritons leave a bit that is always zero
# Of a loop's values: after so many visits, those that still grow may be any number.
_MAX_VISITS = 8

Range = tuple[int, int]  # of an unsigned number, both ends included
_Calls = tuple[int, ...]  # the places of the calls that an instruction is in
State = dict[str, Range]  # by register or predicate; what isn't there may be any number
_ANY: Range = (0, _TOP)
_BIT: Range = (0, 1)  # any predicate


class Instruction(NamedTuple):
    """`@P0 IADD3.X R1, R2, ...` is guarded, its base IADD3, its parts X."""

    address: int
    guarded: bool
    base: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]


def faults(sass: Sequence[tuple[int, str]]) -> list[str]:
    """One sentence for each word of a descriptor that isn't proved right.

    Args:
        sass: (address, instruction) of the whole code of one kernel, as nvdisasm writes them.
    """
    code = [parse(address, text) for address, text in sass]
    found: dict[int, dict[_Calls, list[str]]] = {one.address: {} for one in code if is_wgmma(one)}
    if not found:
        return []
    try:
        for calls, one, state in _walk(code):
            if is_wgmma(one):
                found[one.address][calls] = _faults_of(one, state)
    except Lost as lost:
        return [str(lost)]
    sentences = []
    for address, by_calls in found.items():
        whats = [what for some in by_calls.values() for what in some]
        if not by_calls:
            whats = ["no way leads there"]
        sentences += [f"wgmma at {address:#x}: {what}" for what in dict.fromkeys(whats)]
    return sentences


class Lost(Exception):
    """A jump to where the check can't follow."""

    def __init__(self, one: Instruction) -> None:
        super().__init__(f"{one.base} at {one.address:#x} leads where the check can't follow")


def _faults_of(one: Instruction, state: State) -> list[str]:
    return [
        f"the {which} word of {tile}'s descriptor {_show(word)}"
        for tile, low, high in _descriptors_of(one, state)
        for which, word, is_right in (("low", low, _is_low_word), ("high", high, _is_high_word))
        if not is_right(word)
    ]


def is_wgmma(one: Instruction) -> bool:
    return one.base.endswith("GMMA")


def _descriptors_of(one: Instruction, state: State) -> Iterator[tuple[str, Range, Range]]:
    """(tile, low word, high word), any number where the registers aren't known."""
    for tile, first in descriptor_registers(one):
        words = [_ANY] * 2 if first is None else [_read(f"UR{first + i}", state) for i in (0, 1)]
        yield tile, *words


def descriptor_registers(one: Instruction) -> Iterator[tuple[str, int | None]]:
    """(tile, the first of two registers) of wgmma: gdesc[URn] names a's in URn, b's in URn+2.

    That of a is none where a is in registers, an operand before it. Where ptxas needs an empty
    group to wait for, it multiplies descriptors of 0 into no register.
    """
    if one.operands[:2] == ("RZ", "gdesc[URZ]"):
        return
    _, first, second = (*one.operands, "", "")[:3]
    in_memory = first.startswith("gdesc")
    found = re.match(r"gdesc\[UR(\d+)\]", first if in_memory else second)
    for tile, more in (("a", 0), ("b", 2)) if in_memory else (("b", 2),):
        yield tile, int(found[1]) + more if found else None


def _is_low_word(value: Range) -> bool:
    constant = value[0]
    return value[1] - constant in _CUTS and constant & ~(_FIELD << 16 | _FIELD) == 0


def _is_high_word(value: Range) -> bool:
    constant = value[0]
    return constant == value[1] != 0 and constant & ~(3 << 30 | 7 << 17 | _FIELD) == 0


def _show(value: Range) -> str:
    if value == _ANY:
        return "may be any number"
    return f"is from {value[0]:#x} to {value[1]:#x}"


def parse(address: int, text: str) -> Instruction:
    guard, name, operands = re.match(r"(@\S+\s+)?(\S+)\s*(.*)", text).groups()
    base, *parts = name.split(".")
    operands = tuple(operand.strip() for operand in operands.split(","))
    return Instruction(address, guard is not None, base, tuple(parts), operands)


def _walk(code: list[Instruction]) -> Iterator[tuple[_Calls, Instruction, State]]:
    """Each instruction with the values before it; the last time it comes, they are final.

    What is called is followed for each call alone.
    """
    index = {one.address: i for i, one in enumerate(code)}
    leads = [next_ones(i, code, index) for i in range(len(code))]
    starts = {to for i, all_to in enumerate(leads) if all_to != [i + 1] for to in all_to}
    before: dict[tuple[int, _Calls], State] = {(0, ()): {}}
    visits: dict[tuple[int, _Calls], int] = {}
    waiting = [(0, ())]
    while waiting:
        i, calls = waiting.pop()
        state = before[i, calls].copy()
        while True:
            yield calls, code[i], state
            _run(code[i], state)
            if leads[i] != [i + 1] or i + 1 in starts:
                break
            i += 1
        for place in _places_after(i, calls, code[i], leads[i], index, state):
            if place not in before:
                before[place] = state.copy()
            else:
                merged = _merge(before[place], state, visits.get(place, 0) <= _MAX_VISITS)
                if merged == before[place]:
                    continue
                before[place] = merged
            visits[place] = visits.get(place, 0) + 1
            waiting.append(place)


def _places_after(
    i: int, calls: _Calls, one: Instruction, leads: list[int], index: dict[int, int], state: State
) -> list[tuple[int, _Calls]]:
    """Of the places that an instruction leads to, with the calls that they are in, those it may."""
    if one.base == "CALL":
        if i in calls:
            raise Lost(one)
        called = index[int(one.operands[-1], 16)]
        return [(to, (*calls, i) if to == called else calls) for to in leads]
    if one.base == "RET" and calls:
        return [*((to, calls) for to in leads), (calls[-1] + 1, calls[:-1])]
    if one.base == "BSYNC":
        low, high = _read(one.operands[0], state)
        if low == high:
            leads = [i + 1, index[low]]
    return [(to, calls) for to in leads]


def _merge(one: State, other: State, grow: bool) -> State:
    """What holds after either; without `grow`, of ranges that would grow nothing is known."""
    merged = {}
    for name in one.keys() & other.keys():
        joined = _either(one[name], other[name])
        if grow or joined == one[name]:
            merged[name] = joined
    return merged


def next_ones(i: int, code: list[Instruction], index: dict[int, int]) -> list[int]:
    """The places of the instructions that may come after this one, but for a RET's."""
    one = code[i]
    # A jump's condition may be an operand too.
    away = ("EXIT", "KILL", "RET", "CALL") + ("BRA",) * (len(one.operands) == 1)
    found = [] if one.base in away and not one.guarded else [i + 1]
    if one.base in ("BRA", "CALL", "BSSY"):
        target = re.fullmatch("0x[0-9a-f]+", one.operands[-1])
        if target is None or int(target[0], 16) not in index:
            raise Lost(one)
        if one.base != "BSSY":
            found.append(index[int(target[0], 16)])
    elif one.base in ("BRX", "BRXU", "JMP", "JMX", "JMXU", "LEPC", "RTT"):
        raise Lost(one)
    elif one.base == "WARPSYNC" and "COLLECTIVE" in one.parts:
        raise Lost(one)
    elif one.base == "BSYNC":  # or where the one BSSY says that it may belong to
        found += [
            index[int(other.operands[1], 16)]
            for other in code
            if other.base == "BSSY" and other.operands[0] == one.operands[0]
        ]
    return [to for to in dict.fromkeys(found) if to < len(code)]


# Their result is one register, or two or four if they say so; that of any other may be four.
_ONE_REGISTER = frozenset(
    """
    BREV ELECT FADD FFMA FLO FMNMX FMUL FSEL F2FP HADD2 HFMA2 HMUL2 IABS IADD3 IMAD I2FP LEA LOP3
    LDC LDG LDL LDS MOV MUFU POPC PRMT P2R REDUX R2UR SEL SGXT SHF SHFL S2R S2UR UIADD3 UIMAD ULDC
    ULEA ULOP3 UMOV UPRMT UP2UR USEL USGXT USHF VIADD VIADDMNMX VIMNMX VOTE VOTEU CS2R
    """.split()
)
_PREDICATE = re.compile(r"U?P[0-6T]")
_REGISTER = re.compile(r"(U?R)(\d+|Z)")


def _run(one: Instruction, state: State) -> None:
    """Changes the values to those after the instruction."""
    if one.base in ("BSSY", "BMOV"):
        state.pop(one.operands[0], None)
        if one.base == "BSSY" and not one.guarded:  # a barrier's value is where its BSYNC leads
            state[one.operands[0]] = _read(one.operands[1], state)
    results = outputs(one)
    values = _computed(one, one.operands[len(results) :], state)
    written: dict[str, Range] = {}
    for place, name in enumerate(results):
        if _PREDICATE.fullmatch(name):
            written[name] = values.get("carry", _BIT) if len(results) == 2 and place else _BIT
        elif name in ("PR", "UPR"):
            written |= {f"{name[:-1]}{i}": _BIT for i in range(7)}
        else:
            kind, number = _REGISTER.fullmatch(name).groups()
            for i in range(_width(one) if number != "Z" else 0):
                written[f"{kind}{int(number) + i}"] = values.get(i, _ANY)
    for name, value in written.items():
        state[name] = _either(_read(name, state), value) if one.guarded else value
        if state[name] == (_BIT if "P" in name else _ANY):
            del state[name]


def outputs(one: Instruction) -> list[str]:
    """What the instruction writes: its first operands, predicates and at most one register."""
    if one.operands[0] in ("PR", "UPR"):
        return [one.operands[0]]
    found: list[str] = []
    room = 0 if one.base.endswith("SETP") else 1
    for operand in one.operands:
        if _REGISTER.fullmatch(operand) and room:
            room = 0
        elif not _PREDICATE.fullmatch(operand):
            break
        found.append(operand)
    return found


def _width(one: Instruction) -> int:
    """How many registers the result takes, or more."""
    if is_wgmma(one):
        return int(one.parts[0].split("x")[1]) // 2
    if one.base == "LDSM":
        return int(one.parts[-1]) if one.parts[-1] in ("2", "4") else 1
    if one.base not in _ONE_REGISTER or "128" in one.parts:
        return 4
    long = "64" in one.parts or "WIDE" in one.parts
    return 2 if long or (one.base == "CS2R" and "32" not in one.parts) else 1


def _computed(one: Instruction, inputs: Sequence[str], state: State) -> dict[int | str, Range]:
    """The results that are known, by their place from the first register on, and the "carry"."""
    a, b, c, *others = [*(_read(name, state) for name in inputs), *[_ANY] * 5]
    count = len(inputs)
    shift = b[0] if b[0] == b[1] < 32 else None
    # What begins with U has uniform registers.
    match one.base.removeprefix("U"), *one.parts:
        case ["MOV" | "R2UR"] if count == 1:
            return {0: a}
        case ["SEL"] if count == 3:
            return {0: _either(a, b)}
        case ["CS2R"] if inputs == ("SRZ",):
            return {0: (0, 0), 1: (0, 0)}
        case ["VIADD"] if count == 2:
            return {0: _sum(a, b)[0]}
        case ["IADD3", *parts] if (parts, count) in (([], 3), (["X"], 5)):
            value, carry = _sum(a, b, c, *others[: count - 3])
            # Subtracting 0 carries, which no range of what is added would show.
            subtracts = any(name.startswith(("-U", "-R")) for name in inputs)
            return {0: value} if subtracts or carry[1] > 1 else {0: value, "carry": carry}
        case ["IADD3", "64"] if count == 3:
            low, carry = _sum(*(_half(name, 0, state) for name in inputs))
            high, _ = _sum(*(_half(name, 1, state) for name in inputs), carry)
            return {0: low, 1: high}
        case ["IMAD", *parts] if parts in ([], ["MOV", "U32"], ["IADD"], ["SHL", "U32"], ["U32"]):
            return {0: _sum((a[0] * b[0], a[1] * b[1]), c)[0]}
        case ["LEA"] if count == 3 and c[0] == c[1] < 32:
            return {0: _sum((a[0] << c[0], a[1] << c[0]), b)[0]}
        case ["SGXT", "U32"] if shift is not None:
            return {0: _low_bits(a, shift)}
        case ["SHF", "R", "U32", "HI"] if shift is not None:
            return {0: (c[0] >> shift, c[1] >> shift)}
        case ["SHF", "L", "U32"] if shift is not None:
            return {0: _sum((a[0] << shift, a[1] << shift))[0]}
        case ["LOP3", "LUT"] if others[0][0] == others[0][1]:
            return {0: _logic(a, b, c, others[0][0])}
    return {}


def _read(name: str, state: State) -> Range:
    """The values of an operand; of a predicate, 0 and 1."""
    name = name.removesuffix(".reuse")
    if re.fullmatch(r"-?0x[0-9a-f]+", name):
        number = int(name, 16) & _TOP
        return number, number
    if name in ("RZ", "URZ"):
        return 0, 0
    if _PREDICATE.fullmatch(name.removeprefix("!")):
        low, high = (1, 1) if name.endswith("T") else state.get(name.removeprefix("!"), _BIT)
        return (1 - high, 1 - low) if name.startswith("!") else (low, high)
    return state.get(name, _ANY)


def _half(name: str, place: int, state: State) -> Range:
    """The low or high word of an operand of 64 bits; of what is subtracted, only of constants."""
    if found := _REGISTER.fullmatch(name.removeprefix("-")):
        kind, number = found.groups()
        if number == "Z":
            return 0, 0
        words = [_read(f"{kind}{int(number) + i}", state) for i in (0, 1)]
        if not name.startswith("-"):
            return words[place]
        if all(low == high for low, high in words):
            word = -(words[0][0] | words[1][0] << 32) >> 32 * place & _TOP
            return word, word
        return _ANY
    value = _read(name, state)
    if value[1] > _TOP >> 1:  # whether its sign is extended isn't known
        return _ANY
    return value if place == 0 else (0, 0)


def _either(one: Range, other: Range) -> Range:
    return min(one[0], other[0]), max(one[1], other[1])


def _sum(*terms: Range) -> tuple[Range, Range]:
    """The sum modulo 2**32, and what is carried."""
    low, high = sum(term[0] for term in terms), sum(term[1] for term in terms)
    carry = low >> 32, high >> 32
    return ((low & _TOP, high & _TOP) if carry[0] == carry[1] else _ANY), carry


def _low_bits(value: Range, bits: int) -> Range:
    return value if value[1] < 1 << bits else (0, (1 << bits) - 1)


def _logic(a: Range, b: Range, c: Range, table: int) -> Range:
    """LOP3: the tables of a, b and c alone are 0xf0, 0xcc and 0xaa."""
    if table == 0xC0:
        return _and(a, b)
    if table == 0xFC:
        return _or(a, b)
    if table == 0xF8:
        return _or(a, _and(b, c))
    if table == 0xEA:
        return _or(_and(a, b), c)
    return _ANY


def _and(one: Range, other: Range) -> Range:
    for value, (mask, same) in (one, other), (other, one):
        if mask == same and mask & (mask + 1) == 0:
            return _low_bits(value, mask.bit_length())
    return 0, min(one[1], other[1])


def _or(one: Range, other: Range) -> Range:
    for value, (bits, same) in (one, other), (other, one):
        if bits == same and (bits == 0 or value[1] < bits & -bits):  # which is a sum
            return value[0] + bits, value[1] + bits
    return _ANY
