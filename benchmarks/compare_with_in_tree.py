"""Our layer beside transformers' own triangle multiplication: time, peak memory, error.

    python benchmarks/compare_with_in_tree.py --device cuda --json results.json

Both run the same module's parameters on the same inputs, interleaved, in bf16 (or --dtype) with
fp32 norms and a padding mask. Times are medians of eager calls, on a GPU between two events;
caches are not flushed. Errors are relative L2 errors against float64. Peak memory counts what a
call allocates beyond its inputs, its output included, in tensors of the pair's size.

On a GPU each time is that of --calls calls in a row, divided by their number: as in a trunk, the
host prepares one call while the GPU works on the last. Where the host is the slower, the time is
the host's.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from kernels import get_local_kernel
from transformers import EsmFold2Config
from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2TriangleMultiplicativeUpdate

ROOT = Path(__file__).resolve().parents[1]


def make_module(width: int, flow: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """An in-tree module with random parameters, norms in fp32 as the model keeps them."""
    config = EsmFold2Config(pairwise_hidden_size=width)
    module = EsmFold2TriangleMultiplicativeUpdate(config, outgoing=flow == "outgoing")
    for name, parameter in module.named_parameters():
        if name.startswith("proj_"):
            torch.nn.init.normal_(parameter, std=width**-0.5)
            parameter.data = parameter.data.to(dtype)
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return module.to(device).requires_grad_(False)


def in_float64(module: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The module's function line by line in float64."""
    w = {name: value.double() for name, value in module.named_parameters()}
    width = x.shape[-1:]
    z = F.layer_norm(x.double(), width, w["norm_start.weight"], w["norm_start.bias"])
    signal, gate = F.linear(z, w["proj_bundle.weight"]).chunk(2, dim=-1)
    a, b = (signal * gate.sigmoid() * mask.double().unsqueeze(-1)).chunk(2, dim=-1)
    a, b = a.movedim(-1, 1), b.movedim(-1, 1)
    t = a @ b.mT if module.flow == "outgoing" else a.mT @ b
    t = F.layer_norm(t.movedim(1, -1), width, w["norm_mix.weight"], w["norm_mix.bias"])
    return F.linear(t, w["proj_emit.weight"]) * F.linear(z, w["proj_gate.weight"]).sigmoid()


def seconds(call: Callable[[], object], device: str, calls: int) -> float:
    """Seconds a call; on a GPU the mean of `calls` in a row."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def peak_pairs(call: Callable[[], object], x: torch.Tensor) -> float | None:
    """Peak memory of a call beyond its inputs, in tensors of the size of x; None on a CPU."""
    if x.device.type == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / (x.numel() * x.element_size())


def measure(args: argparse.Namespace, forward: Callable, width: int, length: int) -> list[dict]:
    dtype = getattr(torch, args.dtype)
    rows = []
    for flow in ("outgoing", "incoming"):
        module = make_module(width, flow, dtype, args.device)
        x = torch.randn(1, length, length, width, device=args.device).to(dtype)
        real = torch.arange(length, device=args.device) < length - 3
        mask = real[None, :, None] & real[None, None, :]
        ours = types.MethodType(forward, module)

        def in_tree(chunk_size: int | None, module=module, x=x, mask=mask) -> torch.Tensor:
            module.chunk_size = chunk_size
            return module(x, mask)

        calls = {
            "ours": lambda ours=ours, x=x, mask=mask: ours(x, mask),
            "in-tree, chunk_size 64": lambda in_tree=in_tree: in_tree(64),
            "in-tree, chunk_size None": lambda in_tree=in_tree: in_tree(None),
        }
        wanted = in_float64(module, x, mask) if length <= args.check_up_to else None
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(2):
            for call in calls.values():
                call()
        for _ in range(args.repeats):
            for name, call in calls.items():
                times[name].append(seconds(call, args.device, args.calls))
        for name, call in calls.items():
            error = None
            if wanted is not None:
                error = float((call().double() - wanted).norm() / wanted.norm())
            row = {
                "who": name,
                "flow": flow,
                "C": width,
                "L": length,
                "dtype": args.dtype,
                "milliseconds": 1e3 * statistics.median(times[name]),
                "slowest": 1e3 * max(times[name]),
                "fastest": 1e3 * min(times[name]),
                "speed_up": statistics.median(times["in-tree, chunk_size 64"])
                / statistics.median(times[name]),
                "peak_pairs": peak_pairs(call, x),
                "error": error,
            }
            rows.append(row)
            peak = "-" if row["peak_pairs"] is None else f"{row['peak_pairs']:.2f}"
            print(
                f"{flow:9}C={width:<4} L={length:<5}{name:26}{row['milliseconds']:10.3f} ms"
                f"{row['speed_up']:8.2f}x  peak {peak:>6}  error "
                + ("-" if error is None else f"{error:.2e}"),
                flush=True,
            )
    return rows


def cpu_name() -> str:
    """The processor as the kernel names it, or as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(device: str, commit: str | None) -> dict:
    """Where and with what the numbers were taken; `commit` where there is no git to ask."""
    if commit is None:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        commit = asked.stdout.strip() or None
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "all of the CPU's"),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[160])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, default=5, help="calls in a row a time, on a GPU")
    parser.add_argument("--check-up-to", type=int, default=512, help="longest L held to float64")
    parser.add_argument(
        "--without-native-bf16",
        action="store_true",
        help="our CPU path as on a CPU that doesn't multiply bf16; hold oneDNN to the like with "
        "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2",
    )
    parser.add_argument("--commit", help="what to record where this is no git checkout")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    kernel = get_local_kernel(ROOT)
    forward = kernel.layers.ESMFold2TriangleMultiplication.forward
    if args.without_native_bf16:
        aten = importlib.import_module(f"{kernel.__name__}.aten")
        aten._multiplies_bf16 = lambda: False
    result = {"environment": environment(args.device, args.commit), "rows": []}
    print(" ".join(f"{name}={value}" for name, value in result["environment"].items()))
    for width in args.widths:
        for length in args.lengths:
            result["rows"] += measure(args, forward, width, length)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
