"""What the Hopper variants compile to for sm_90, on any machine.

Those of bfloat16 calls of 128 and 256 channels are compiled in tests/tools/test_resources.py.
"""

import json
import re

import pytest
from esmfold2_trimul_tools.resources import MAX_LOOP_SPILL_BYTES, MAX_TILE_SPILL_BYTES
from fresh_process import python_output

pytest.importorskip("triton")

# In a process without TRITON_INTERPRET: each variant that the calls run, with traits of its code.
COMPILE = """
import json, sys, torch
from esmfold2_trimul_tools import resources
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
path, device = submodule(package, "triton_path"), submodule(package, "triton_parts.device")
names, binaries = [], []
for dtype, width, length, padded in json.loads(sys.argv[1]):
    case = resources.Case(getattr(torch, dtype), width, length, padded)
    with resources._compiling_for("sm_90"), device.standing_in(device.target_of("sm_90", "any")):
        plans = path.plan(resources._call_of(package, case))
        other = path.transition.plan(resources._transition_of(package, case))
        for launch, tensors in plans.launches + other.launches:
            if launch.variant:
                names.append([str(case), launch.stage])
                binaries.append(launch.compile(**tensors))
codes = resources.read_machine_code(binaries)
found = []
for name, binary, code in zip(names, binaries, codes, strict=True):
    (sass,) = resources._disassemble([binary])
    traits = {
        "code": [instruction for _, instruction in sass],
        "spill_bytes": code.spill_bytes,
        "spills_in_loop": code.spills_in_loop,
        "shared_bytes": code.shared_bytes,
    }
    found.append([*name, traits])
print(json.dumps(found))
"""
SHARED_BYTES = 232448
STAGES = {"fused_dual_gemm", "trimul_einsum", "fused_ln_residual", "transition"}
WIDE = {
    "fused_dual_gemm", "trimul_einsum", "fused_ln_residual_gates", "fused_ln_residual",
    "swiglu_hidden", "row_linear",
}  # fmt: skip
CASES = {
    "float16": [("float16", 256, 512, False)],
    "narrow float16": [("float16", 128, 512, False)],
    "padded": [("float16", 256, 512, True), ("bfloat16", 128, 512, True)],
    "three parts": [("bfloat16", 192, 512, False)],
    "short": [("bfloat16", 128, 256, False), ("float16", 128, 256, True)],
    "wide": [("bfloat16", 512, 512, False), ("float16", 512, 512, False)],
    "widths between": [("bfloat16", width, 512, False) for width in (320, 384, 448)],
}
QUICK = {"float16"}
# A whole transition has no registers for wide rows' outputs.
STAGES_OF = {
    "wide": WIDE, "widths between": WIDE, "short": {"fused_ln_residual", "transition"},
    "padded": STAGES - {"trimul_einsum"},
}
# Waits for accumulators: one for each product to a step's hidden channels would be many more.
# A product of planes has one for each part that goes out meanwhile, one in its loop and a last one.
WAITS = {"transition": 15, "row_linear": 4, "trimul_einsum": 12}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in CASES]
)
def test_products_and_copies_without_spills(name):
    output = python_output(COMPILE, json.dumps(CASES[name]))
    found = json.loads(output)
    assert {stage for _, stage, _ in found} == STAGES_OF.get(name, STAGES)
    for case, stage, traits in found:

        def count(pattern, code=traits["code"]):
            return sum(bool(re.search(pattern, instruction)) for instruction in code)

        where = f"{stage} {case}"
        assert traits["shared_bytes"] <= SHARED_BYTES, where
        # Some are read once a tile, which is the outer loop.
        wide = name in ("wide", "widths between")
        once = stage == "transition" or (stage == "fused_ln_residual" and wide)
        assert not traits["spills_in_loop"] or once, where
        most = MAX_TILE_SPILL_BYTES if once else MAX_LOOP_SPILL_BYTES
        assert traits["spill_bytes"] <= most, where
        # A wait for an accumulator a consumer, of which there are two or three: not one a product.
        assert count(r"\bHGMMA\b") >= 8, where
        assert count(r"\bWARPGROUP\.DEPBAR\b") <= WAITS.get(stage, 3), where
        assert count(r"\bUTMALDG\b") >= 4 and count(r"\bUTMASTG\b") >= 2, where
        assert count(r"\bUSETMAXREG\b") > 0, where  # registers move from the loads to the products
        if "float16" in case and "bfloat16" not in case:
            assert count(r"\bHGMMA\b(?!.*\bBF16\b)") > count(r"\bHGMMA\b.*\bBF16\b"), where
