"""The commands about the machine and the repository: doctor, resources, build."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .console import ProgressBar, print_json, stdout
from .errors import UserError
from .options import AsJson, KernelRoot, checked
from .repository import built, find_checkout, find_root, variant_of


def _targets(option: str, chosen: list[str]) -> list[str]:
    """Refuses a target without a table of its own in the build (`triton_parts.settings`)."""
    root = find_root()
    built(root)
    tables = (variant_of(root) / "triton_parts" / "configs").glob("*.json")
    known = sorted(path.stem for path in tables if "shared_bytes" in json.loads(path.read_text()))
    for target in chosen:
        if target not in known:
            raise UserError(f"target must be one of {', '.join(known)}; got {target!r}")
    return chosen


@checked
def doctor(kernel_root: KernelRoot = None, as_json: AsJson = False) -> None:
    """Say what this machine would do with the kernel, and what stands in its way.

    Exit status 1 if there is a problem that prevents folding with the kernel.
    """
    from .doctor import can_fold, examine

    findings = examine(kernel_root)
    works = can_fold(findings)
    if as_json:
        print_json({"can_fold": works, "findings": [finding.summary() for finding in findings]})
    else:
        table = Table("", "", Column(overflow="fold"), box=None, show_header=False)
        for finding in findings:
            text = finding.value + (f"\n→ {finding.mend}" if finding.mend else "")
            style = {"problem": "bold red", "warning": "yellow"}.get(finding.status, "")
            table.add_row(finding.status, finding.name, text, style=style)
        console = stdout()
        console.print(table)
        console.print(
            "Folding with the kernel can work." if works else "Folding with the kernel can't work."
        )
    if not works:
        raise typer.Exit(1)


@checked
def resources(
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Compile for this architecture only; may be repeated."),
        _targets,
    ] = None,
    check_descriptors: Annotated[
        bool,
        typer.Option(
            "--check-descriptors",
            help="Look for descriptors and registers that ptxas made wrongly (sm_90), too.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile every kernel and shipped setting ahead of time, without a GPU.

    Prints registers, spills and shared memory. Exit status 1 if a kernel breaks
    a limit.
    """
    from . import resources as module
    from .triton_cache import check_cache

    check_cache()
    with ProgressBar() as report:
        try:
            rows = module.collect(
                target or None,
                lambda done, total, label: report(label, done, total),
                check_descriptors=check_descriptors,
            )
        except (ImportError, ValueError) as error:
            raise UserError(str(error)) from error
    problems = module.problems(rows)
    if as_json:
        print_json(rows)
    else:
        _print_resources(rows)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)


@checked
def build(
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; exit status 1 if the build is out of date."),
    ] = False,
    kernel_root: KernelRoot = None,
) -> None:
    """Make build/torch-universal, the folder that the kernels library loads, from torch-ext/."""
    root = find_checkout(kernel_root)
    from .build import build_variant, check_variant

    try:
        if check:
            problems = check_variant(root)
        else:
            result = build_variant(root)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(str(error)) from error
    if not check:
        print(
            f"{result.variant.relative_to(root)}: {len(result.files)} files, "
            f"{len(result.written)} written, {len(result.removed)} removed ({result.build_id})"
        )
    elif problems:
        print("\n".join([*problems, "Mend it with: esmfold2-trimul build"]), file=sys.stderr)
        raise typer.Exit(1)
    else:
        print("build/torch-universal is in line with its sources")


def _print_resources(rows: list[dict[str, Any]]) -> None:
    for target in dict.fromkeys(row["target"] for row in rows):
        numbers = [Column(name, justify="right") for name in ("registers", "spills", "shared")]
        title = f"{target}: registers and spilled bytes per thread, shared bytes per block"
        kernel = Column("kernel", no_wrap=True)
        table = Table(kernel, "calls", "setting", *numbers, title=title, box=None)
        for row in rows:
            if row["target"] == target and "error" not in row:
                setting = " ".join(
                    f"{name.removeprefix('BLOCK_').removeprefix('num_').lower()}={int(value)}"
                    for name, value in row["config"].items()
                )
                needs = (str(row[name]) for name in ("registers", "spill_bytes", "shared_bytes"))
                table.add_row(row["kernel"], row["case"], setting, *needs)
        stdout().print(table)
