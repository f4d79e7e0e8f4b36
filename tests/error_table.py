"""Prints the error table of docs/numerics.md: python tests/error_table.py [LENGTH]

Relative L2 error against the float64 reference of the tests, for each dtype and width, of
transformers' own module, of both kinds of the CPU path, and of the Triton kernels: on a GPU if
there is one, else in Triton's interpreter with the tests' repairs.
"""

import platform
import sys

import conftest
import torch
import transformers
import triton
from helpers import DTYPES, in_tree_module, make_problem, reference, relative_error, run

WIDTHS = (128, 256)
SEED = 0


def measure(kernel, length: int, channels: int, dtype: torch.dtype) -> list[str]:
    """The table's row: the larger error of the two directions in each column."""
    entry = conftest._submodule(kernel, "trimul_with_residual")
    aten = conftest._submodule(kernel, "aten")
    cpu_multiplies_bf16 = aten._multiplies_bf16
    columns = []
    for direction in ("outgoing", "incoming"):
        problem = make_problem(
            length, channels, dtype=dtype, direction=direction, mask="bool", seed=SEED
        )
        wanted = reference(problem)

        def error(got, wanted=wanted):
            return relative_error(got, wanted)

        def aten_error(native: bool, problem=problem, error=error):
            entry._INTERPRET = False
            entry.execution_path.cache_clear()
            aten._multiplies_bf16 = lambda: native
            return error(run(kernel, problem))

        in_tree = in_tree_module(problem)
        errors = [error(wanted.to(dtype)), error(in_tree(problem.x, problem.mask))]
        errors.append(aten_error(native=False))
        native = dtype == torch.bfloat16 and cpu_multiplies_bf16()
        errors.append(aten_error(native=True) if native else float("nan"))
        aten._multiplies_bf16 = cpu_multiplies_bf16
        entry._INTERPRET = not conftest.HAS_GPU
        entry.execution_path.cache_clear()
        errors.append(error(run(kernel, problem, "cuda" if conftest.HAS_GPU else "cpu")))
        columns.append(errors)
    return ["-" if worst != worst else f"{worst:.2e}" for worst in map(max, *columns)]


@torch.no_grad()
def main() -> None:
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    torch.set_num_threads(1)
    if not conftest.HAS_GPU:
        conftest._repair_interpreter()
    kernel = conftest._load_variant()
    device = torch.cuda.get_device_name() if conftest.HAS_GPU else "Triton's interpreter"
    print(
        f"L = {length}; torch {torch.__version__}, Triton {triton.__version__}, "
        f"transformers {transformers.__version__}, {platform.machine()}; kernels: {device}\n"
    )
    print(
        "| dtype | C = D | output's own rounding | in-tree module | CPU path, fp32 GEMMs "
        "| CPU path, bf16 GEMMs | kernels |"
    )
    print("|---|---|---|---|---|---|---|")
    for dtype in DTYPES:
        for channels in WIDTHS:
            cells = measure(kernel, length, channels, dtype)
            print("|", " | ".join([str(dtype).removeprefix("torch."), str(channels), *cells]), "|")


if __name__ == "__main__":
    main()
