"""Ahead-of-time compilation for every target: what each kernel needs, and that no length matters.

Compiling takes real JIT functions, so these run in processes without TRITON_INTERPRET.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from esmfold2_trimul_tools.resources import BACKWARD_CASES, CASES, problems
from fresh_process import ROOT, python_output

pytest.importorskip("triton")

# Where a fault shows first: sm_90, which has the measured settings and most of them, and of NVIDIA
# and AMD the targets with the least shared memory (sm_89's table is that of sm_86 and sm_120 too),
# with the model's width.
WIDE = tuple(case for case in CASES if case.width == 256 and case.length == 512 and not case.padded)
QUICK = {
    "sm_90": tuple(case for case in CASES if case.dtype == torch.bfloat16 or case in WIDE),
    "sm_89": WIDE,
    # The compiler takes longest for it, so without a backward.
    "gfx942": tuple(case for case in CASES if str(case) == "bfloat16 C=256 L=256"),
}
TARGETS = sorted(
    path.stem
    for path in ROOT.glob("torch-ext/*/triton_parts/configs/*.json")
    if "shared_bytes" in path.read_text()
)
OTHERS = {
    target: tuple(case for case in CASES if case not in QUICK.get(target, ())) for target in TARGETS
}
NEWEST_TRITON = Path(sys.prefix, "newest-triton")  # `make test-all` installs it

FORWARD = {
    "fused_dual_gemm", "trimul_einsum", "fused_ln_residual", "swiglu_hidden", "row_linear",
}  # fmt: skip
BACKWARD = {
    "fused_ln_residual_bwd", "norm_out_bwd", "trimul_einsum_bwd_a", "trimul_einsum_bwd_b",
    "trimul_einsum_bwd_ab", "fused_dual_gemm_bwd", "input_bwd",
    "row_products_in", "row_products_out", "swiglu_hidden_bwd", "swiglu_bwd",
    "transition_row_products_in", "transition_row_products_out", "transition_input_bwd",
    "emit_means", "projection_gradients", "norm_gradients",
}  # fmt: skip

WITHOUT_PRODUCT = {
    "fold_norms", "fold_norms_bwd", "padding", "split_weights", "split_transition",
    "mask_exponents", "split_planes",
    "emit_means",
    "projection_gradients", "norm_gradients",
}  # fmt: skip
# Those of which stages have variants for Hopper GPUs.
HOPPER = [
    case
    for case in CASES
    if case.dtype == torch.bfloat16
    and case.length > 160
]  # fmt: skip
# Those whose forward splits its operands, on sm_90.
SPLIT = [
    case
    for case in CASES
    if case.precision == "fp16x3" and case.width <= 256
]  # fmt: skip
# On sm_90, with the model's width.
BY_DESCRIPTORS = FORWARD | {
    "fused_dual_gemm_bwd", "swiglu_hidden_bwd", "input_bwd",
}  # fmt: skip

COLLECT = """
import json, sys
from esmfold2_trimul_tools.resources import CASES, collect
target, *cases = sys.argv[1:]
cases = [case for case in CASES if str(case) in cases]
print(json.dumps(collect([target], cases=cases, check_descriptors=target == "sm_90")))
"""

COUNT = """
import json, sys, torch
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule
from esmfold2_trimul_tools.resources import Case, compile_case

package = load_kernel(find_root())
kernels = [
    submodule(package, "fused_dual_gemm")._fused_dual_gemm_fwd_kernel,
    submodule(package, "trimul_einsum_triton")._trimul_einsum_fwd_kernel,
    submodule(package, "fused_ln_residual")._fused_ln_residual_fwd_kernel,
]
variants = [
    submodule(package, "hopper.gated_rows")._gated_rows_hopper_kernel,
    submodule(package, "hopper.plane_products")._plane_products_hopper_kernel,
    submodule(package, "hopper.ln_residual")._ln_residual_hopper_kernel,
    submodule(package, "hopper.transition")._transition_hopper_kernel,
]
counts = []
for lengths in json.loads(sys.argv[1]):
    for kernel in kernels + variants:
        kernel.device_caches.clear()
    for length in lengths:
        compile_case(package, "sm_90", Case(torch.bfloat16, 256, length))
    counts.append([
        sum(len(cache[0]) for cache in kernel.device_caches.values())
        for kernel in kernels + variants
    ])
print(json.dumps(counts))
"""


def run_fresh(script: str, *arguments: str, first_on_path: Path = ROOT / "tests") -> str:
    path = f"{first_on_path}:{ROOT / 'tools' / 'src'}"
    return python_output(script, *arguments, PYTHONPATH=path)


def assert_settings_fit(target, cases, **options):
    rows = json.loads(run_fresh(COLLECT, target, *map(str, cases), **options))
    assert problems(rows) == []
    widest = 128 if options else 256  # of a whole transition; less with the newest Triton
    for case in cases:
        kernels = [row["kernel"] for row in rows if row["case"] == str(case)]
        wanted = FORWARD | BACKWARD if case in BACKWARD_CASES else FORWARD
        if target == "sm_90" and case in HOPPER:
            wanted = wanted | {"fold_norms"} | ({"padding"} if case.padded else set())
            if case.width > 256 and not options:
                wanted = wanted | {"fused_ln_residual_gates"}
            if case in BACKWARD_CASES and case.width <= 256:
                wanted = wanted - {"swiglu_hidden_bwd"}
                if not case.padded:
                    wanted = wanted - {"emit_means"} | {"fold_norms_bwd"}
                    if case.width <= widest:  # one kernel makes dx too
                        wanted = wanted - {"input_bwd"}
        in_one = target == "sm_90" and case.dtype != torch.float32 and not case.padded
        if in_one and case in BACKWARD_CASES:
            wanted = wanted - {f"trimul_einsum_bwd_{turned}" for turned in ("a", "b", "ab")}
            wanted = wanted | {"trimul_einsum_bwd_outgoing", "trimul_einsum_bwd_incoming"}
        if target == "sm_90" and case.dtype == torch.bfloat16 and case.width <= widest:
            wanted = wanted - {"swiglu_hidden", "row_linear"} | {"transition"}
        if target == "sm_90" and case in SPLIT:
            wanted = wanted | {"split_weights", "split_transition", "mask_exponents"}
            if case in BACKWARD_CASES:
                wanted = wanted | {"split_planes"}
        assert set(kernels) == wanted and len(kernels) == len(wanted)
    for row in rows:
        assert row["registers"] > 0
        if row["kernel"] in WITHOUT_PRODUCT:
            continue
        assert row["shared_bytes"] > 0
        assert row["matrix_instructions"] > 0, f"{row['kernel']} {row['case']}: no matrix units"
        if "VARIANT" in row["config"]:
            # Few waits for accumulators, and nothing leaves the registers in a loop: of a whole
            # transition, its backward, the triangle's, and stage 3 with wide rows, in the loop
            # within that over tiles.
            assert row["pipelined"] and row["bulk_copies"] > 0, row
            # The newest Triton may spill what `problems` allows.
            wide = row["kernel"] == "fused_ln_residual" and "C=512" in row["case"]
            backward = row["kernel"] in ("swiglu_bwd", "fused_dual_gemm_bwd")
            backward = backward and "C=256" in row["case"]
            both = row["kernel"].startswith("trimul_einsum_bwd")  # once, ahead of all tiles
            once = row["kernel"] == "transition" or backward or wide or both
            assert not row["spills_in_loop"] or once or options, row
        elif target == "sm_90" and row["kernel"] in BY_DESCRIPTORS and not options:
            assert row["config"]["DESCRIPTORS"] or "bfloat16 C=256 L=512" not in row["case"], row
        if target == "sm_90" and row["config"].get("DESCRIPTORS"):
            assert row["bulk_copies"] > 0, row
            # Wider rows than 256 are read in blocks, between whose products there is other work.
            # Tiles of 32 rows are too few for a warp group's products, which are waited for.
            few = row["config"].get("BLOCK_M", 64) < 64
            assert row["pipelined"] or "C=512" in row["case"] or few, row
        assert row["descriptor_faults"] == ([] if target == "sm_90" else None)


@pytest.mark.parametrize("target", QUICK)
def test_shipped_settings_fit_their_target(target):
    assert_settings_fit(target, QUICK[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", OTHERS)
def test_all_other_settings_fit_their_target(target):
    assert_settings_fit(target, OTHERS[target])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_settings_fit_with_the_newest_triton(target):
    if not NEWEST_TRITON.is_dir():
        pytest.skip("the newest Triton is not installed; make test-all installs it")
    assert_settings_fit(target, CASES, first_on_path=NEWEST_TRITON)


def test_problems_name_what_is_over_a_limit():
    fine = {
        "kernel": "k", "target": "sm_86", "case": "c", "shared_bytes": 99 * 1024,
        "spill_bytes": 512, "spills_in_loop": False, "shared_limit": 99 * 1024,
    }  # fmt: skip
    assert problems([fine]) == []
    assert problems([{"kernel": "k", "target": "sm_86", "case": "c", "error": "E()"}]) == [
        "k on sm_86 (c): can't be compiled: E()"
    ]
    assert problems([{**fine, "shared_bytes": 99 * 1024 + 1}]) == [
        "k on sm_86 (c): 101377 bytes of shared memory, of 101376"
    ]
    assert problems([{**fine, "spill_bytes": 513}]) == [
        "k on sm_86 (c): 513 bytes of spills, of 512"
    ]
    assert problems([{**fine, "spill_bytes": 24, "spills_in_loop": True}]) == []
    assert problems([{**fine, "spill_bytes": 28, "spills_in_loop": True}]) == [
        "k on sm_86 (c): registers spill inside a loop"
    ]
    assert problems([{**fine, "descriptor_faults": ["wgmma at 0x10: no"]}]) == [
        "k on sm_86 (c): wgmma at 0x10: no"
    ]


def test_lengths_of_a_class_compile_once():
    """And 2,047 different proteins at most four kernels of each stage, and of its variant.

    Of a long product of planes there are two, with wide and narrow tiles.
    """
    all_classes = [*range(1, 2048, 97), 96, 97, 160, 161, 320, 321]
    # None is of BACKWARD_CASES, whose launches are more.
    lengths = [(1, 2, 64, 77, 96), (321, 383, 511, 1000, 2047), all_classes]
    short, long, counts = json.loads(run_fresh(COUNT, json.dumps(lengths)))
    assert short == [1, 1, 1, 0, 0, 0, 1]
    assert long == [0, 0, 0, 1, 2, 1, 1]
    assert all(1 <= count <= 4 for count in counts)
