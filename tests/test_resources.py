"""Ahead-of-time compilation for every target: what each kernel needs, and that no length matters.

Compiling takes real JIT functions, so these run in processes without TRITON_INTERPRET.
"""

import json

import pytest
from esmfold2_trimul_tools.resources import (
    BACKWARD_CASES,
    CASES,
    TARGETS,
    backward_kernels,
    problems,
)
from fresh_process import ROOT, python_output

pytest.importorskip("triton")

COLLECT = """
import json
from esmfold2_trimul_tools.resources import collect
print(json.dumps(collect([{target!r}])))
"""

COUNT = """
import importlib, json, torch
from esmfold2_trimul_tools.repository import find_root, load_kernel
from esmfold2_trimul_tools.resources import STAGE_KERNELS, Case, compile_case

kernel = load_kernel(find_root())
for length in {lengths}:
    compile_case(kernel, "sm_90", Case(torch.bfloat16, 128, length))
print(json.dumps([
    sum(len(cache[0]) for cache in getattr(module, name).device_caches.values())
    for module, name in (
        (importlib.import_module(f"{{kernel.__name__}}.{{stage}}"), name)
        for stage, name in STAGE_KERNELS.items()
    )
]))
"""


def run_fresh(script: str) -> str:
    return python_output(script, PYTHONPATH=str(ROOT / "tools" / "src"))


@pytest.mark.parametrize("target", TARGETS)
def test_every_shipped_setting_fits_its_target(target):
    rows = json.loads(run_fresh(COLLECT.format(target=target)))
    launches = 3 * len(CASES) + sum(len(backward_kernels(case)) for case in BACKWARD_CASES)
    assert len({(row["kernel"], row["case"]) for row in rows}) == len(rows) == launches
    assert problems(rows) == []
    for row in rows:
        assert row["registers"] > 0
        if row["kernel"] == "norm_in_bwd":  # the only one without a product
            continue
        assert row["shared_bytes"] > 0
        assert row["matrix_instructions"] > 0, f"{row['kernel']} {row['case']}: no matrix units"
        if target == "sm_90" and row["config"].get("DESCRIPTORS"):
            assert row["bulk_copies"] > 0, row
            # Wider rows than 256 are read in blocks, between whose products there is other work.
            assert row["pipelined"] or "C=512" in row["case"], row


def test_problems_name_what_is_over_a_limit():
    fine = {
        "kernel": "k", "target": "sm_86", "case": "c", "shared_bytes": 99 * 1024,
        "spill_bytes": 256, "spills_in_loop": False,
    }  # fmt: skip
    assert problems([fine]) == []
    assert problems([{"kernel": "k", "target": "sm_86", "case": "c", "error": "E()"}]) == [
        "k on sm_86 (c): can't be compiled: E()"
    ]
    assert problems([{**fine, "shared_bytes": 99 * 1024 + 1}]) == [
        "k on sm_86 (c): 101377 bytes of shared memory, of 101376"
    ]
    assert problems([{**fine, "spill_bytes": 257}]) == [
        "k on sm_86 (c): 257 bytes of spills, of 256"
    ]
    assert problems([{**fine, "spill_bytes": 16, "spills_in_loop": True}]) == []
    assert problems([{**fine, "spill_bytes": 20, "spills_in_loop": True}]) == [
        "k on sm_86 (c): registers spill inside a loop"
    ]


@pytest.mark.parametrize("lengths", [(1, 2, 64, 77, 96), (321, 383, 512, 1000, 2047)])
def test_lengths_of_a_class_compile_once(lengths):
    assert json.loads(run_fresh(COUNT.format(lengths=list(lengths)))) == [1, 1, 1]


def test_all_lengths_together_compile_as_often_as_there_are_classes():
    """2,047 different proteins, and at most four kernels of each stage."""
    lengths = [*range(1, 2048, 97), 96, 97, 160, 161, 320, 321]
    counts = json.loads(run_fresh(COUNT.format(lengths=lengths)))
    assert all(1 <= count <= 4 for count in counts)
