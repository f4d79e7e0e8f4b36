"""Prints the error table of docs/numerics.md: python tests/error_table.py [LENGTH]

Relative L2 errors against the float64 reference of the tests, by dtype and width: transformers' own
module, the CPU path with either kind of GEMM, and the Triton kernels, which run on a GPU if there
is one and else in Triton's interpreter, repaired as for the tests.
"""

import platform
import sys
from collections.abc import Iterator

import conftest
import torch
import transformers
import triton
from helpers import DTYPES, Problem, in_tree_module, make_problem, reference, relative_error, run
from torch import Tensor

WIDTHS = (128, 256)
COLUMNS = (
    "one rounding",
    "in-tree module",
    "CPU path, fp32 GEMMs",
    "CPU path, bf16 GEMMs",
    "Triton kernels",
)


def outputs(kernel, problem: Problem, wanted: Tensor) -> Iterator[Tensor | None]:
    """The problem's answer as each column has it; None where there is none."""
    paths, aten = (conftest._submodule(kernel, name) for name in ("paths", "aten_path.blocks"))
    multiplies_bf16 = aten._multiplies_bf16

    def run_on(path: str, device: str = "cpu", bf16_gemms: bool = False) -> Tensor:
        paths._INTERPRET = path == "triton"
        aten._multiplies_bf16 = lambda: bf16_gemms
        paths.execution_path.cache_clear()
        return run(kernel, problem, device)

    yield wanted.to(problem.x.dtype)
    yield in_tree_module(problem)(problem.x, problem.mask)
    yield run_on("aten")
    # Where the CPU has no bf16 products torch makes them in software, with the same rounding.
    yield run_on("aten", bf16_gemms=True) if problem.x.dtype == torch.bfloat16 else None
    yield run_on("triton", "cuda" if conftest.HAS_GPU else "cpu")
    aten._multiplies_bf16 = multiplies_bf16


def worst_errors(kernel, length: int, channels: int, dtype: torch.dtype) -> list[str]:
    """Each column's larger error of the two directions."""
    errors = []
    for direction in ("outgoing", "incoming"):
        problem = make_problem(length, channels, dtype=dtype, direction=direction, mask="bool")
        wanted = reference(problem)
        gots = outputs(kernel, problem, wanted)
        errors.append([None if got is None else relative_error(got, wanted) for got in gots])
    return ["-" if None in column else f"{max(column):.2e}" for column in zip(*errors, strict=True)]


@torch.no_grad()
def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    if not conftest.HAS_GPU:
        import interpreter

        interpreter.repair()
    kernel = conftest._load_variant()
    where = torch.cuda.get_device_name() if conftest.HAS_GPU else "Triton's interpreter"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}"
    versions += f", transformers {transformers.__version__}, {platform.machine()}"
    print(f"L = {length}, kernels on {where}; {versions}\n")
    print("| dtype | C = D |", " | ".join(COLUMNS), "|")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for dtype in DTYPES:
        for channels in WIDTHS:
            cells = worst_errors(kernel, length, channels, dtype)
            print(f"| {dtype} | {channels} |".replace("torch.", ""), " | ".join(cells), "|")


if __name__ == "__main__":
    main()
