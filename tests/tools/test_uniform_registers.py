"""The check of uniform registers: on ptxas' wrong code, on right code, and on its ways."""

import pytest
from esmfold2_trimul_tools.uniform_registers import is_indirect, unwritten

# What ptxas 12.8.93 makes of a consumer that multiplies a tile as it lies or transposed, without
# what has no part in it: UR56 and UR57 are written by the first branch, and read by the other.
PROLOGUE = """
ULDC.64 UR4, c[0x0][0x208]
@P0 BRA {default}
BRX R2 -0x30
"""
PRODUCT = """
UMOV UR32, UR4
UMOV UR33, 0x40000040
UMOV UR34, UR5
UMOV UR35, 0x40000040
UIADD3 UR58, UP3, UR34, 0x80, URZ
UMOV UR59, 0x40000040
@P1 BRA {turned}
UIADD3 UR56, UP1, UR32, 0x2, URZ
UMOV UR57, 0x40000040
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR32].tnspB, RZ, !UPT
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR56].tnspB, R24, gsb0
EXIT
"""
TURNED = """
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR32].tnspA.tnspB, RZ, !UPT
UIADD3.64 UR32, UR56, 0x7e, URZ
HGMMA.64x256x16.F32.BF16 R24, gdesc[UR32].tnspA.tnspB, R24, gsb0
EXIT
"""
RIGHT = TURNED.replace("UIADD3.64 UR32, UR56, 0x7e", "UIADD3.64 UR32, UR32, 0x80")


def code_of(turned):
    """The kernel at 0x0, 0x10 and so on; the default's warps exit."""
    parts = [part.strip().split("\n") for part in (PROLOGUE, PRODUCT, turned, "EXIT")]
    starts = [16 * sum(map(len, parts[:n])) for n in range(4)]
    lines = "\n".join("\n".join(part) for part in parts)
    lines = lines.format(turned=hex(starts[2]), default=hex(starts[3]))
    return [(16 * i, line) for i, line in enumerate(lines.split("\n"))]


def check(*lines):
    faults = unwritten([(16 * i, line) for i, line in enumerate(lines)])
    return [fault.split(" reads ")[-1] for fault in faults]


def test_wrong_code_of_ptxas():
    (fault,) = unwritten(code_of(TURNED))
    assert fault == "UIADD3 at 0x100 reads UR56, UR57, not written"
    assert unwritten(code_of(RIGHT)) == []
    assert is_indirect(code_of(RIGHT)) and not is_indirect(code_of(RIGHT)[3:])


def test_a_register_that_one_way_writes():
    """And the other not; or each, or before both."""
    one = "@P0 BRA 0x20", "UMOV UR4, 0x1", "UIADD3 UR6, UR4, 0x1, URZ", "EXIT"
    assert check(*one) == ["UR4, not written"]
    each = "@P0 BRA 0x30", "UMOV UR4, 0x1", "BRA 0x40", "UMOV UR4, 0x2", "STS [UR4], R0", "EXIT"
    assert check(*each) == []
    assert check("UMOV UR4, 0x1", *one[:1], "NOP", "NOP", one[2], one[3]) == []


def test_what_comes_back_to_an_indirect_branch():
    """Its warps are others; a register must be written on every way that leads there first."""
    back = "BRX R2 -0x10", "UIADD3 UR8, UR4, 0x1, URZ", "BRA 0x10", "EXIT"
    assert check("UMOV UR4, 0x1", *back) == []
    assert check("NOP", *back) == ["UR4, not written"]
    two = "@P0 BRA 0x30", "NOP", "BRX R2 -0x30", "UMOV UR4, 0x1", "BRA 0x20"
    assert check(*two, "STS [UR4], R0", "EXIT") == ["UR4, not written"]
    of_both = "UMOV UR4, 0x2", *two[1:]
    assert check(*of_both, "STS [UR4], R0", "EXIT") == []


def test_calls_and_regions():
    called = "CALL.REL.NOINC 0x30", "STS [UR4], R0", "EXIT", "UMOV UR4, 0x1", "RET.REL.NODEC R2"
    assert check(*called) == ["UR4, not written"]  # what is called isn't followed back
    assert check("UMOV UR4, 0x2", "CALL.REL.NOINC 0x40", *called[1:]) == []
    region = "BSSY B0, 0x40", "@P0 BRA 0x30", "UMOV UR4, 0x1", "BSYNC B0", "STS [UR4], R0", "EXIT"
    assert check(*region) == ["UR4, not written"]
    assert check("UMOV UR4, 0x1", "NOP", "BSYNC B0", "STS [UR4], R0", "EXIT") == []


@pytest.mark.parametrize("lost", ["CALL.ABS R20", "JMP 0x0", "HGMMA.64x64x16.F32 R24"])
def test_code_that_it_can_not_follow(lost):
    (fault,) = unwritten([(0, lost), (16, "EXIT")])
    assert fault.endswith("at 0x0 leads where the check can't follow")


def test_a_copy_is_like_what_it_copies():
    assert check("UMOV UR8, UR9", "EXIT") == []
    assert check("UMOV UR8, UR9", "R2UR UR9, R4", "STS [UR8], R0", "EXIT") == ["UR8, not written"]
    assert check("R2UR UR9, R4", "UMOV UR8, UR9", "STS [UR8], R0", "EXIT") == []
    assert check("MOV R8, UR9", "IADD3 R8, R8, UR9, RZ", "EXIT") == ["UR9, not written"]


@pytest.mark.parametrize(
    "wgmma, missing",
    [
        ("HGMMA.64x64x16.F32 R24, gdesc[UR4], R24", "UR4, UR5, UR6, UR7"),
        ("HGMMA.64x64x16.F32 R24, R88, gdesc[UR4], R24", "UR6, UR7"),
        ("HGMMA.64x64x16.F32.BF16 RZ, gdesc[URZ], RZ, !UPT", None),
    ],
)
def test_words_of_descriptors(wgmma, missing):
    assert check(wgmma, "EXIT") == ([] if missing is None else [f"{missing}, not written"])


def test_words_of_64_bits():
    assert check("UMOV UR4, 0x1", "UIADD3.64 UR8, UR4, 0x2, URZ", "EXIT") == ["UR5, not written"]
    assert check("ULDC.64 UR4, c[0x0][0x10]", "UIADD3.64 UR8, UR4, 0x2, URZ", "EXIT") == []
    one = "UMOV UR4, 0x1", "UFLO.U32 UR8, UR4"  # which writes one
    assert check(*one, "UIADD3 UR6, UR9, 0x1, URZ", "EXIT") == ["UR9, not written"]
    for load in ("LDG.E R0, desc[UR4][R2.64]", "UTMALDG.4D [UR8], [UR4]"):
        assert check(*one, load, "EXIT") == ["UR5, not written"]
