"""The numeric tests with every instruction set, number of threads and seed: python tests/isa.py

Prints a line for each combination, and ends with status 1 if a test failed in one. Arguments are
parts of lines: `interpreted`, or `"oneDNN AVX2"`; only combinations with one of them are run then.
JOBS is how many test processes run at a time.
"""

import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEEDS = 5
# Tests of both paths, and what is of one alone.
BOTH = [
    "test_fuzz.py", "test_gradients.py", "test_layers.py", "test_lengths.py", "test_operators.py",
    "test_training_layers.py", "test_trimul_with_residual.py", "tools/conformance",
]  # fmt: skip
ATEN = ["aten_path", "models", "test_budgets.py", "test_sharded.py"]
INTERPRETED = [
    "test_fused_dual_gemm.py", "test_fused_ln_residual.py", "test_trimul_einsum_triton.py",
    "triton_path",
]  # fmt: skip
# Tests whose names have one of these words compute nothing that could differ.
OTHERS = "not (ops_are or TestCompiled or Refusals or wrong or planted_errors or command)"
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "TRIMUL_TEST_THREADS")


def combinations() -> list[tuple[tuple[str, ...], list[str]]]:
    """Values of VARIABLES, and pytest's arguments."""
    aten = [*files(BOTH + ATEN), "-k", f"not triton and {OTHERS}"]
    isas = itertools.product(("", "avx2", "default"), ("", "AVX2", "AVX512_CORE"))
    found = [((*isa, "1"), aten) for isa in isas]
    found += [(("", "", threads), aten) for threads in ("2", "8")]
    # The interpreter computes with numpy, which reads none of the variables.
    words = f"(triton or fused or row_products) and {OTHERS}"
    return [*found, (("", "", ""), [*files(BOTH + INTERPRETED), "-k", words])]


def files(names: list[str]) -> list[str]:
    return [f"tests/{name}" for name in names]


def words_of(values: tuple[str, ...]) -> str:
    aten, onednn, threads = values
    if not threads:
        return "interpreted"
    return f"ATen {aten or 'unset'}, oneDNN {onednn or 'unset'}, threads {threads}"


def run(values: tuple[str, ...], arguments: list[str], seed: int) -> tuple[int, list[str]]:
    """How many tests passed, and the names of those that did not."""
    variables = {name: value for name, value in zip(VARIABLES, values, strict=True) if value}
    variables |= {"TRIMUL_TEST_SEED": str(seed), "FUZZ_CASES": "100"}
    variables["OMP_WAIT_POLICY"] = "passive"  # threads that outnumber the cores would turn in place
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", "-m", "not slow", *arguments],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
    )  # fmt: skip
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", done.stdout)
    if done.returncode not in (0, 1):
        failed.append(f"pytest: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0, [f"{name}, seed {seed}" for name in failed]


def main() -> int:
    chosen = [
        (values, arguments)
        for values, arguments in combinations()
        if len(sys.argv) == 1 or any(words in words_of(values) for words in sys.argv[1:])
    ]
    anything_failed = False
    with ThreadPoolExecutor(int(os.environ.get("JOBS", 2))) as pool:
        runs = [[pool.submit(run, *one, seed) for seed in range(SEEDS)] for one in chosen]
        for (values, _), futures in zip(chosen, runs, strict=True):
            results = [future.result() for future in futures]
            failed = [name for _, names in results for name in names]
            passed = ", ".join(str(passed) for passed, _ in results)
            print(f"{words_of(values)}: passed {passed}; failed {len(failed)}", flush=True)
            print(*(f"    {name}\n" for name in failed), sep="", end="", flush=True)
            anything_failed |= bool(failed) or not all(passed for passed, _ in results)
    return int(anything_failed)


if __name__ == "__main__":
    sys.exit(main())
