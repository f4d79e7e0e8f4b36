"""Helpers of the tests of whole folds: a tiny model with all that a way may change."""

import torch
from esmfold2_trimul_tools.bench.rivals import Sources
from esmfold2_trimul_tools.bench.whole.results import STEP
from esmfold2_trimul_tools.bench.whole.ways import WAYS, Bench
from folding import CPU, tiny_model

BY_NAME = {way.name: way for way in WAYS}
LENGTH = 12


def tiny_bench(kernel, dtype=torch.float32, published=None, esm=None) -> Bench:
    model = tiny_model(dtype=dtype).requires_grad_(False)
    return Bench(model, CPU, dtype, Sources(kernel, published), esm)


def whole_row(way, length=256, **entries):
    """A measured row: 2 s for ours and 4 s for others, unless entries say otherwise."""
    parts = {"triangle": 1.0, "transition": 0.5, "diffusion": 0.25, "rest": 0.25}
    row = {
        "L": length, "way": way, "status": "measured", "note": None,
        "seconds": 2.0 if way == "ours" else 4.0, "loops": 10, "loops_timed": 10,
        "seconds_timed": [2.0], "peak_bytes": 3 * 2**30, "parts": parts, "mean_plddt": 0.5,
        "trunk_seconds": 0.125, "trunk_layers_timed": 24, "trunk_peak_bytes": 2**31,
        "trunk_pairs": 5.04,
    }  # fmt: skip
    return row | entries


def without_numbers(way, status, note, length=256):
    row = dict.fromkeys(whole_row(way)) | {"L": length, "way": way, "loops": 10}
    return row | {"status": status, "note": note}


def longest_row(way, **entries):
    row = {
        "way": way, "status": "measured", "note": None, "gib": 80.0, "L": 1088, "step": 64,
        "tried": {"1088": True, "1152": False}, "peak_bytes": 79 * 2**30,
        "bound_by": "transition in confidence", "peak_by_loops": {"0": 2**32, "2": 2**32},
    }  # fmt: skip
    return row | entries


def step_row(way, milliseconds=None, length=256, **entries):
    """A training step's row, measured if it has a time."""
    row = dict.fromkeys(STEP) | {"L": length, "way": way, "status": "measured"}
    if milliseconds is not None:
        times = {"median": milliseconds, "p10": milliseconds / 2, "p90": 2 * milliseconds}
        row |= {"device_ms": times | {"calls": 3}, "wall_ms": 2.0, "host_ms": 1.5,
                "steps_per_s": 500.0, "peak_pairs": 12.345, "error": 4.5e-3}  # fmt: skip
    return row | entries


def step_results(*rows):
    layer = {
        "architecture": "small", "dtype": "bfloat16", "parameters": 1_500_000, "bytes": 3_000_000,
        "pair_width": 256, "transition_width": 1024,
    }  # fmt: skip
    return {"environment": whole_results()["environment"], "layer": layer, "steps": [*rows]}


def whole_results(*rows, longest=()):
    environment = {
        "device": "A GPU", "torch": "2.0", "triton": None, "cuda": "12", "driver": None,
        "python": "3.12", "rivals": {"transformers": "5"}, "date": "2026-01-02", "commit": "abc",
        "commands": ["one", "two"], "esm": None,
    }  # fmt: skip
    model = {
        "architecture": "small", "dtype": "bfloat16", "parameters": 6_500_000_000,
        "bytes": 13 * 2**30, "loops": 10, "samples": 8, "steps": 68, "denoiser_calls": 48,
        "pair_layers_a_loop": 32, "pair_width": 256,
    }  # fmt: skip
    return {
        "environment": environment, "model": model, "rows": [*rows], "longest": [*longest],
    }  # fmt: skip
