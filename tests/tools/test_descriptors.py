"""The check of wgmma's descriptors: on ptxas' wrong code, on right code, and on what it refuses."""

import json

import pytest
from esmfold2_trimul_tools.descriptors import faults
from fresh_process import python_output

COMPILE = """
import json
from esmfold2_trimul_tools.descriptors import faults
from esmfold2_trimul_tools.resources import _disassemble, _nvidia_tool, _run_tool
from two_dots import compile_two_dots

kernels = [compile_two_dots(one_layout=True), compile_two_dots(one_layout=False)]
right, wrong = (faults(sass) for sass in _disassemble(kernels))
print(json.dumps([right, wrong, _run_tool(_nvidia_tool("ptxas"), "--version")]))
"""

# What ptxas 12.8.93 makes of two_dots.py, without what has no part in the descriptors: UR7, which
# nothing has written, instead of UR6 and URZ.
BEGIN = """
S2UR UR5, SR_CgaCtaId
UMOV UR4, 0x400
ULEA UR5, UR5, UR4, 0x18
USHF.R.U32.HI UR6, URZ, 0x4, UR5
USGXT.U32 UR6, UR6, 0xe
UMOV UR14, UR6
UMOV UR15, 0x80000020
"""
TAKEN = """
UIADD3 UR4, UP0, UR7, 0x40, URZ
UIADD3.X UR7, UR7, -0x7fffffe0, URZ, UP0, !UPT
UMOV UR6, UR4
"""
FIRST = "HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR12].tnspB, R24"
NEXT = "HGMMA.64x32x16.F32.BF16 R24, R52, gdesc[UR4].tnspB, R24, gsb0"
END = "EXIT"


def check(*parts):
    """The faults of code at 0x0, 0x10 and so on, without their addresses."""
    lines = "\n".join(parts).split("\n")
    sass = [(16 * i, line) for i, line in enumerate(filter(None, lines))]
    return [fault.split(": ")[-1] for fault in faults(sass)]


BOTH = [f"the {word} word of b's descriptor may be any number" for word in ("low", "high")]


def test_wrong_code_of_ptxas():
    pytest.importorskip("triton")
    right, wrong, version = json.loads(python_output(COMPILE))
    assert right == []
    if "release 12.8" not in version:
        assert wrong == []
        pytest.skip("this Triton's ptxas compiles the kernel rightly: it isn't 12.8")
    assert len(wrong) == 6 and all("may be any number" in fault for fault in wrong)


def test_recorded_code():
    assert check(BEGIN, TAKEN, FIRST, NEXT, END) == BOTH
    # In the backward of stage 3 it was the address in place of the low word.
    assert check(BEGIN, TAKEN.replace("UR7, 0x40", "UR5, 0x40"), FIRST, NEXT, END) == BOTH
    right = TAKEN.replace("UR7, 0x40", "UR6, 0x40").replace("UR7, -0x7", "URZ, -0x7")
    assert check(BEGIN, right, FIRST, NEXT, END) == []


@pytest.mark.parametrize(
    "high, shown",
    [
        ("0x0", "the high word of b's descriptor is from 0x0 to 0x0"),
        ("0x400", None),
        ("0x80004000", "the high word of b's descriptor is from 0x80004000 to 0x80004000"),
        ("UR5", "the high word of b's descriptor may be any number"),
    ],
)
def test_high_words(high, shown):
    code = BEGIN.replace("0x80000020", high)
    assert check(code, FIRST, END) == ([] if shown is None else [shown])


@pytest.mark.parametrize(
    "low, shown",
    [
        ("UIADD3 UR14, UR6, 0x2000040, URZ", None),
        ("ULOP3.LUT UR14, UR5, 0x3fff, URZ, 0xc0, !UPT", None),
        ("ULOP3.LUT UR14, UR6, 0x2000000, URZ, 0xfc, !UPT", None),
        ("R2UR UR14, R3", "may be any number"),
        ("UMOV UR14, 0x40", "is from 0x40 to 0x40"),
        ("UIADD3 UR14, UR6, 0x4000, URZ", "is from 0x4000 to 0x7fff"),
        ("UIADD3 UR14, UR6, UR6, URZ", "is from 0x0 to 0x7ffe"),
        ("@P0 UMOV UR14, 0x8", None),  # or what it was, whose range this is in
        ("@P0 UMOV UR14, UR5", "may be any number"),
        ("ULDC.64 UR14, c[0x0][0x210]", "may be any number"),
        ("UNEW UR12, UR6", "may be any number"),  # which may have four registers
    ],
)
def test_low_words(low, shown):
    found = [fault for fault in check(BEGIN, low, FIRST, END) if "low" in fault]
    assert found == ([] if shown is None else [f"the low word of b's descriptor {shown}"])


def test_two_operands_in_shared_memory():
    both = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR12].tnspA, R24, gsb0"
    assert check(BEGIN, both, END) == [fault.replace("b's", "a's") for fault in BOTH]
    assert check(BEGIN, "UMOV UR12, UR14", "UMOV UR13, UR15", both, END) == []


def test_descriptors_of_other_forms():
    empty = "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0"  # a group to wait for
    assert check(BEGIN, empty, FIRST, END) == []
    assert check(BEGIN, FIRST.replace("UR12", "URZ"), END) == BOTH


def test_ways_through_the_code():
    """BEGIN is 0x0 to 0x60; a value holds where each way to the wgmma brings it."""
    spoil = "UMOV UR15, UR5"
    assert check(BEGIN, "@P0 BRA 0x90", FIRST, END) == []
    assert check(BEGIN, "@!P0 BRA 0x90", spoil, FIRST, END) == BOTH[1:]  # at 0x90
    assert check(BEGIN, "BRA 0x90", spoil, FIRST, END) == []
    assert check(BEGIN, FIRST, "@P0 BRA 0x70", END) == []  # a loop
    assert check(BEGIN, FIRST, spoil, "@P0 BRA 0x70", END) == BOTH[1:]
    add = "UIADD3 UR14, UR14, 0x2, URZ"
    assert "low word" in check(BEGIN, FIRST, add, "@P0 BRA 0x70", END)[0]
    calls = ("CALL.REL.NOINC 0xa0", FIRST, END, spoil, "RET.REL.NODEC R2 0x0")
    assert check(BEGIN, *calls) == BOTH[1:]
    call = "CALL.REL.NOINC 0xb0"  # twice, and each leads back to its own place alone
    assert check(call, BEGIN, call, FIRST, END, "NOP", "RET.REL.NODEC R2 0x0") == []
    # A barrier's ends are told apart, though each BSYNC alone might lead to both.
    ends = ("BSSY B0, 0x20", "BSYNC B0", BEGIN, "BSSY B0, 0xb0", "BSYNC B0", FIRST)
    assert check(*ends, END) == []
    assert check(BEGIN, "BRX R2 -0x80", FIRST) == ["BRX at 0x70 leads where the check can't follow"]
    assert check(BEGIN, END, FIRST) == ["no way leads there"]
    assert check(BEGIN, END) == []
