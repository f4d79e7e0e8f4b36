"""The command `esmfold2-trimul`: one function per subcommand, each the door to a plain function.

What a person reads goes to stdout, or with --json one JSON document and nothing else; progress bars
and errors go to stderr. Exit status: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
"""

import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from typer.core import TyperGroup

from .errors import UserError
from .folding.sequences import file_stems, parse_sequence, read_fasta
from .heartbeat import heartbeat

if TYPE_CHECKING:
    from .folding.fold import Outcome, Settings
    from .folding.memory import PeakMemory
    from .folding.validate import Validation

# torch and transformers take seconds to import: each command imports what it needs.

RANDOM_NOTE = "random weights: meaningless as biology"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns what the user can mend into one line on stderr and an exit status."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        if isinstance(error, UserError):
            message, status = str(error), error.exit_status
        elif hasattr(error, "format_message"):  # the parser's own errors
            message, status = error.format_message(), 2
        else:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise typer.Exit(status) from None


class _Commands(TyperGroup):
    """A command group whose errors are one line each."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        if not args:  # the help page, which the parser raises as an error too
            return super().make_context(info_name, args, parent, **extra)
        with _one_line_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: typer.Context) -> Any:
        with _one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fold with the ESMFold2 triangle multiplication kernel, check it, and build it.",
)

KernelRoot = Annotated[
    Path | None,
    typer.Option("--kernel-root", help="The kernel repository. Default: the tools' own checkout."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Commit = Annotated[
    str | None,
    typer.Option("--commit", help="What to record as the commit. Default: git's answer."),
]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")]
Published = Annotated[
    Path | None,
    typer.Option(
        "--published",
        help="The folder that holds the published package, esmfold2_trimul. Default: the Hub.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="A Hub id or a local folder. Default: biohub/ESMFold2."),
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights",
        help="Fold with a small random model made on the spot: no download, and no biology either.",
    ),
]
KernelName = Annotated[
    str,
    typer.Option(
        "--kernel",
        help="ours: the build of this repository. hub: what transformers itself would fetch. "
        "off: transformers' stock path.",
    ),
]
DeviceName = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:N or xpu. Default: the best here.")
]
DtypeName = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16. Default: bfloat16 on an accelerator, else float32.",
    ),
]
Loops = Annotated[
    int | None, typer.Option("--loops", help="Refinements after the first pass through the trunk.")
]
Samples = Annotated[int | None, typer.Option("--samples", help="Structures drawn per protein.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Length of the noise schedule.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random draw, random weights included.")]


@app.command()
def fold(
    sequence: Annotated[
        str | None,
        typer.Argument(
            help="One letter per residue, upper or lower case; X for an unknown one.",
            show_default=False,
        ),
    ] = None,
    fasta: Annotated[
        Path | None, typer.Option("--fasta", help="A FASTA file: every protein in it is folded.")
    ] = None,
    model: ModelName = None,
    random_weights: RandomWeights = False,
    kernel: KernelName = "ours",
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Fold again on the stock path, same seeds, and compare."),
    ] = False,
    device: DeviceName = None,
    dtype: DtypeName = None,
    loops: Loops = None,
    samples: Samples = None,
    steps: Steps = None,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for the PDB and PNG files.")] = Path(
        "out"
    ),
    kernel_root: KernelRoot = None,
    as_json: AsJson = False,
) -> None:
    """Fold proteins with the kernel at every triangle multiplication of ESMFold2.

    Writes a PDB file (B-factors: pLDDT from 0 to 100) and a PNG (pLDDT by
    residue, expected distances) per protein, and prints time, peak memory,
    mean pLDDT and pTM.
    """
    if (sequence is None) == (fasta is None):
        raise UserError("give either SEQUENCE or --fasta FILE")
    if compare and kernel == "off":
        raise UserError("--compare needs a kernel beside the stock path: --kernel ours or hub")
    records = [parse_sequence(sequence)] if fasta is None else read_fasta(fasta)

    from .folding.fold import Settings, fold_records, write_pdb
    from .folding.plots import plot_fold

    settings = Settings(loops, samples, steps, seed)
    settings.check()
    setup = _Setup(model, random_weights, kernel, device, dtype, seed, kernel_root)
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    loaded = setup.load()
    note = RANDOM_NOTE if random_weights else ""
    folded = []
    with _ProgressBar() as report:
        outcomes = fold_records(
            loaded, records, settings, setup.kernel, setup.root, compare, report
        )
        for stem, outcome in zip(file_stems(records), outcomes, strict=True):
            pdb, png = out / f"{stem}.pdb", out / f"{stem}.png"
            with _writing(out):
                write_pdb(outcome.fold, pdb, [note.upper()] if note else [])
                plot_fold(outcome.fold, png, note)
            files = {"pdb": str(pdb), "png": str(png)}
            folded.append(outcome.summary() | files)
            if not as_json:
                with report.hidden():
                    _print_outcome(outcome, setup, files)
    if as_json:
        _print_json({**setup.summary(settings.resolved(loaded.config)), "folds": folded})


@app.command()
def validate(
    model: ModelName = None,
    random_weights: RandomWeights = False,
    kernel: KernelName = "ours",
    device: DeviceName = None,
    dtype: DtypeName = None,
    loops: Loops = None,
    samples: Samples = None,
    steps: Steps = None,
    seed: Seed = 0,
    kernel_root: KernelRoot = None,
    as_json: AsJson = False,
) -> None:
    """Fold ubiquitin and GB1, and hold the kernel's differences against the model's own spread.

    Stock path and kernel fold with the same two seeds. Exit status 1 if kernel
    and stock path differ by more (with one seed) than the stock path does
    between two seeds.
    """
    from .folding.fold import Settings
    from .folding.validate import validate as run

    if kernel == "off":
        raise UserError("validate needs a kernel beside the stock path: --kernel ours or hub")
    settings = Settings(loops, samples, steps, seed)
    settings.check()
    setup = _Setup(model, random_weights, kernel, device, dtype, seed, kernel_root)
    loaded = setup.load()
    with _ProgressBar() as report:
        result = run(loaded, setup.kernel, setup.root, settings, progress=report)
    if as_json:
        _print_json(
            {
                **setup.summary(settings.resolved(loaded.config)),
                "sites": result.swap._asdict(),
                "passed": result.passed,
                "proteins": [verdict.summary() for verdict in result.verdicts],
            }
        )
    else:
        _print_validation(result, setup)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def doctor(kernel_root: KernelRoot = None, as_json: AsJson = False) -> None:
    """Say what this machine would do with the kernel, and what stands in its way.

    Exit status 1 if there is a problem that prevents folding with the kernel.
    """
    from .doctor import can_fold, examine

    findings = examine(kernel_root)
    works = can_fold(findings)
    if as_json:
        _print_json({"can_fold": works, "findings": [finding.summary() for finding in findings]})
    else:
        table = Table("", "", Column(overflow="fold"), box=None, show_header=False)
        for finding in findings:
            text = finding.value + (f"\n→ {finding.mend}" if finding.mend else "")
            style = {"problem": "bold red", "warning": "yellow"}.get(finding.status, "")
            table.add_row(finding.status, finding.name, text, style=style)
        console = _stdout()
        console.print(table)
        console.print(
            "Folding with the kernel can work." if works else "Folding with the kernel can't work."
        )
    if not works:
        raise typer.Exit(1)


@app.command()
def resources(
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="Compile for this architecture only; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compile every kernel and shipped setting ahead of time, without a GPU.

    Prints registers, spills and shared memory. Exit status 1 if a kernel breaks
    a limit.
    """
    from . import resources as module

    with _ProgressBar() as report:
        try:
            rows = module.collect(
                target or None, lambda done, total, label: report(label, done, total)
            )
        except (ImportError, ValueError) as error:
            raise UserError(str(error)) from error
    problems = module.problems(rows)
    if as_json:
        _print_json(rows)
    else:
        _print_resources(rows)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)


@app.command()
def bench(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Channels C of the pair tensor.")] = "128,256",
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Residues L. Default: 15 lengths from 64 to 2048 on a GPU, 3 up to 256 on a CPU."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths.")] = False,
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="Of float32, bfloat16 and float16. Default: bfloat16 on a GPU, float32 on a CPU."
        ),
    ] = None,
    directions: Annotated[str, typer.Option(help="Of outgoing and incoming.")] = "outgoing",
    masks: Annotated[str, typer.Option(help="Of bool, float and none.")] = "bool",
    passes: Annotated[
        str, typer.Option(help="Of forward and training, which is forward and backward.")
    ] = "forward",
    rivals: Annotated[
        list[str] | None,
        typer.Option(
            "--rival", help="Measure this rival, and ours, instead of all; may be repeated."
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also transformers' module under torch.compile.")
    ] = False,
    max_autotune: Annotated[
        bool,
        typer.Option(
            "--max-autotune",
            help="Also transformers' module under torch.compile with max-autotune. Slow.",
        ),
    ] = False,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="Also CUDA graphs of the rivals, which show device time without host time.",
        ),
    ] = False,
    compile_lengths: Annotated[
        str | None,
        typer.Option(
            help="The lengths at which anything is compiled by torch.compile. Default: all."
        ),
    ] = None,
    published: Published = None,
    budget: Annotated[float, typer.Option(help="Seconds of timing for each row.")] = 0.5,
    check_up_to: Annotated[
        int | None,
        typer.Option(
            help="The longest L that is held to float64 at all pairs; longer at some. "
            "Default: 1024 on a GPU, 512 on a CPU."
        ),
    ] = None,
    first_call: Annotated[
        bool,
        typer.Option(
            "--first-call",
            help="Also time first calls, in fresh processes with an empty Triton cache.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    busy: Annotated[
        int,
        typer.Option(
            help="So many processes compute beside the benchmark, "
            "as on a machine that people share."
        ),
    ] = 0,
    kernel_root: KernelRoot = None,
    commit: Commit = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the results to this file, after every shape.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Add to the results in --out what they don't hold yet.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="Measure nothing: show the results in this file.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw plots into this folder, as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the kernel beside its rivals: time, peak memory, error, share of the floor.

    Exit status 1 if the kernel itself fails or gives a wrong result.
    """
    from .bench import run as module
    from .bench.report import markdown
    from .bench.results import ours_is_right, read_results
    from .bench.settings import read_settings

    if results is not None:
        measured = read_results(results)
    else:
        settings = read_settings(
            device=device,
            widths=widths,
            lengths=lengths,
            quick=quick,
            dtypes=dtypes,
            directions=directions,
            masks=masks,
            passes=passes,
            rivals=rivals,
            compile=compile,
            max_autotune=max_autotune,
            graphs=graphs,
            compile_lengths=compile_lengths,
            published=published,
            budget=budget,
            check_up_to=check_up_to,
            first_call=first_call,
            seed=seed,
            busy=busy,
            kernel_root=kernel_root,
        )
        command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
        with _ProgressBar() as report:
            measured = module.bench(settings, command, out, resume, commit, report)
    if plot is not None:
        module.draw(measured, plot)
    if as_json:
        _print_json(measured)
    elif as_markdown:
        print(markdown(measured))
    else:
        _print_bench(measured)
    if not ours_is_right(measured):
        raise typer.Exit(1)


@app.command()
def conformance(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N or xpu. Default: a GPU if there is one.")
    ] = None,
    implementations: Annotated[
        list[str] | None,
        typer.Option(
            "--implementation", help="Hold this one to the cases instead of all; may be repeated."
        ),
    ] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--case", help="Cases whose name has this in it, instead of all; may be repeated."
        ),
    ] = None,
    published: Published = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    kernel_root: KernelRoot = None,
    commit: Commit = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Run nothing: show the results in this file.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the report of docs/conformance.md.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hold every implementation on this machine to float64, over one table of cases.

    Exit status 1 if a case of ours fails; failures of others are reported.
    """
    from .conformance import run as module
    from .conformance.report import markdown, read_results

    if results is not None:
        found = read_results(results)
    else:
        settings = module.read_settings(
            device=device,
            implementations=implementations,
            cases=cases,
            published=published,
            seed=seed,
            kernel_root=kernel_root,
        )
        command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
        with _ProgressBar() as report:
            found = module.conformance(settings, command, commit, out, report)
    if as_json:
        _print_json(found)
    elif as_markdown:
        print(markdown(found))
    else:
        _print_conformance(found)
    if not module.ours_conforms(found):
        raise typer.Exit(1)


@app.command()
def tune(
    out: Annotated[Path, typer.Option(help="Write the settings table to this file.")],
    results: Annotated[Path | None, typer.Option(help="Write every timing to this file.")] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            help="Tune this stage alone: fused_dual_gemm, trimul_einsum, fused_ln_residual; "
            "may be repeated.",
        ),
    ] = None,
    widths: Annotated[
        list[int] | None,
        typer.Option(
            "--width", help="Tune this C = D alone; may be repeated. Default: 128 and 256."
        ),
    ] = None,
    kernel_root: KernelRoot = None,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Search launch settings on this machine's GPU and write the fastest as a table.

    Every candidate is checked before it is timed. The shipped table of this
    GPU's architecture is where the new one starts from; it is not changed.
    """
    from .tune import search as module

    command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
    with _ProgressBar() as report:
        measured = module.run(
            out, results, stages, widths, kernel_root, commit, command, progress=report
        )
    if as_json:
        _print_json(measured)
    else:
        print(module.text(measured))


@app.command()
def build(
    check: Annotated[
        bool,
        typer.Option("--check", help="Write nothing; exit status 1 if the build is out of date."),
    ] = False,
    kernel_root: KernelRoot = None,
) -> None:
    """Make build/torch-universal, the folder that the kernels library loads, from torch-ext/."""
    from .build import build_variant, check_variant

    root = _find_root(kernel_root)
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


class _Setup:
    """The model options that fold and validate share, checked before anything is loaded."""

    def __init__(
        self,
        model: str | None,
        random_weights: bool,
        kernel: str,
        device: str | None,
        dtype: str | None,
        seed: int,
        kernel_root: Path | None,
    ) -> None:
        from .folding.model import (
            HUB_MODEL,
            check_kernel,
            check_swappable,
            resolve_device,
            resolve_dtype,
        )

        if random_weights and model is not None:
            raise UserError("give either --model or --random-weights")
        self.device = resolve_device(device)
        self.kernel = check_kernel(kernel, self.device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.root = _find_root(kernel_root) if self.kernel == "ours" else None
        self.name = "random weights" if random_weights else model or HUB_MODEL
        self.random_weights = random_weights
        self.seed = seed
        if self.kernel != "off":
            check_swappable()

    def load(self) -> Any:
        """The model on its device."""
        from .folding.model import load_model, random_model

        if self.random_weights:
            return random_model(self.device, self.dtype, self.seed)
        return load_model(self.name, self.device, self.dtype)

    def path(self) -> tuple[str, str]:
        """Which implementation our kernel takes here, and why."""
        from .repository import load_kernel

        return tuple(load_kernel(self.root).paths.execution_path(self.device, self.dtype))

    def kernel_description(self) -> str:
        """The kernel in words."""
        if self.kernel == "ours":
            return "ours, {} path: {}".format(*self.path())
        return {"hub": "the Hub's", "off": "stock path"}[self.kernel]

    def summary(self, settings: "Settings") -> dict[str, Any]:
        """What the JSON output says of a run."""
        name, reason = self.path() if self.kernel == "ours" else (None, None)
        return {
            "model": self.name,
            "random_weights": self.random_weights,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernel": self.kernel,
            "path": name,
            "path_reason": reason,
            "loops": settings.loops,
            "samples": settings.samples,
            "steps": settings.steps,
            "seed": settings.seed,
        }


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder}: can't be written to ({error.strerror})") from error


def _find_root(kernel_root: Path | None) -> Path:
    from .repository import find_root

    try:
        return find_root(kernel_root)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error


def _stdout(**options: Any) -> Console:
    # Without markup: names and package extras may be in square brackets.
    return Console(markup=False, highlight=False, **options)


class _ProgressBar:
    """A progress bar on stderr, moved by calling it; where that is no terminal, a line a minute."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._now = "Starting"
        self._minutes = nullcontext() if console.is_terminal else heartbeat(self._say)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            # Redirected, what is meant for stdout would go to stderr.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(self._now, total=None)

    def __enter__(self) -> "_ProgressBar":
        self._minutes.__enter__()
        self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()
        self._minutes.__exit__(*exception)

    def _say(self, elapsed: str) -> None:
        print(f"{elapsed}: {self._now}", file=sys.stderr, flush=True)

    def __call__(self, label: str, done: int, total: int) -> None:
        self._now = f"{label} ({done} of {total} done)"
        self._bar.update(self._task, description=label, completed=done, total=total)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the bar off the screen, to print something."""
        self._bar.stop()
        yield
        self._bar.start()


def _print_outcome(outcome: "Outcome", setup: _Setup, files: dict[str, str]) -> None:
    result, stock, differences = outcome.fold, outcome.stock, outcome.differences
    console = _stdout(soft_wrap=True)
    record = result.record
    console.print(
        f"\n{record.name}, {len(record.sequence)} residues, "
        f"{setup.name} in {str(setup.dtype).removeprefix('torch.')} on {setup.device}"
    )
    if setup.random_weights:
        console.print(
            "Random weights: as biology this fold is meaningless, only the machinery works."
        )
    swapped, total = outcome.swap
    console.print(f"Sites swapped: {swapped} of {total} ({setup.kernel_description()})")

    columns = [setup.kernel if setup.kernel != "off" else "stock"]
    rows = [
        ["Seconds", f"{result.seconds:.2f}"],
        ["Peak memory", _memory(result.memory)],
        ["Mean pLDDT", f"{result.mean_plddt:.4f}"],
        ["pTM", f"{float(result.ptm[result.best]):.4f}"],
    ]
    if stock is not None and differences is not None:
        columns += ["stock", "difference"]
        speed = stock.seconds / result.seconds
        saved = stock.memory.peak_bytes - result.memory.peak_bytes
        rows[0] += [f"{stock.seconds:.2f}", f"{speed:.2f}x as fast"]
        rows[1] += [_memory(stock.memory), f"{-saved / 2**20:+.0f} MiB"]
        rows[2] += [f"{stock.mean_plddt:.4f}", f"{differences.plddt_of_means:.1e}"]
        rows[3] += [f"{float(stock.ptm[result.best]):.4f}", f"{differences.ptm:.1e}"]
        rows += [
            ["pLDDT, largest", "", "", f"{differences.plddt_max:.1e}"],
            ["Distogram, mean", "", "", f"{differences.distogram_mean:.1e}"],
            ["Distogram, largest", "", "", f"{differences.distogram_max:.1e}"],
            ["Coordinates, RMSD", "", "", f"{differences.coords_rmsd:.1e} Å"],
        ]
    table = Table("", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    _stdout().print(table)
    if stock is not None:
        console.print("Differences are absolute; those of the distogram are of probabilities")
    console.print(f"Memory: {result.memory.meaning}; in brackets, above the fold's start")
    console.print(f"Wrote {files['pdb']} and {files['png']}")


def _print_validation(result: "Validation", setup: _Setup) -> None:
    from .folding.validate import DECIDING

    console = _stdout(soft_wrap=True)
    if setup.random_weights:
        console.print("Random weights: as biology these folds are meaningless.")
    swapped, total = result.swap
    console.print(f"Sites swapped: {swapped} of {total} ({setup.kernel_description()})")
    names = {
        "plddt_of_means": "Mean pLDDT",
        "plddt_mean": "pLDDT by residue, mean",
        "ptm": "pTM",
        "distogram_mean": "Distogram, mean",
        "distogram_max": "Distogram, largest",
    }
    for verdict in result.verdicts:
        table = Table(
            f"{verdict.record.name}, {len(verdict.record.sequence)} residues",
            "kernel to stock",
            "stock's spread",
            "within",
        )
        for name, label in names.items():
            within = ("yes" if verdict.within_spread(name) else "NO") if name in DECIDING else ""
            spread = getattr(verdict.spread, name)
            table.add_row(label, f"{verdict.worst(name):.2e}", f"{spread:.2e}", within)
        for path, folds in (("stock", verdict.stock), ("kernel", verdict.kernel)):
            numbers = ", ".join(
                f"pLDDT {one.mean_plddt:.3f} pTM {float(one.ptm[one.best]):.3f}" for one in folds
            )
            console.print(f"{verdict.record.name}, {path}, two seeds: {numbers}")
        _stdout().print(table)
    if result.passed:
        console.print("Passed: the kernel differs from the stock path by less than its own spread.")
    else:
        console.print(
            "FAILED: the kernel differs from the stock path by more than its own spread. "
            "A spread of two seeds can be small by luck: try another --seed too."
        )


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
        _stdout().print(table)


def _print_bench(measured: dict[str, Any]) -> None:
    from .bench.report import caption, groups, notes, table

    console = _stdout(soft_wrap=True)
    console.print(caption(measured))
    for name, rows in groups(measured):
        head, lines = table(rows)
        columns = [Column(title, justify="left" if title == "rival" else "right") for title in head]
        drawn = Table(
            *columns, title=f"{name}; times in ms, medians", box=None, title_justify="left"
        )
        for line in lines:
            drawn.add_row(*line)
        _print_whole(drawn)
    for note in notes(measured):
        console.print(note)


def _print_conformance(found: dict[str, Any]) -> None:
    from .conformance.report import COLUMNS, caption, notes, summaries

    console = _stdout(soft_wrap=True)
    console.print(caption(found))
    name, *numbers, worst, where = COLUMNS
    drawn = Table(
        name, *[Column(number, justify="right") for number in numbers], worst, where, box=None
    )
    for summary in summaries(found):
        drawn.add_row(*summary.cells())
    _print_whole(drawn)
    for note in notes(found):
        console.print(note)


def _print_whole(drawn: Table) -> None:
    """A table as wide as it is: cut to a narrow terminal its numbers would be lost."""
    console = _stdout()
    width = Measurement.get(console, console.options.update(width=1000), drawn).maximum
    _stdout(width=max(width, console.width)).print(drawn)


def _memory(memory: "PeakMemory") -> str:
    return f"{memory.peak_bytes / 2**20:.0f} MiB (+{memory.added_bytes / 2**20:.0f})"


def _print_json(document: Any) -> None:
    print(json.dumps(_finite(document), indent=2))


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def main() -> None:
    """The command's entry point."""
    app(prog_name="esmfold2-trimul")
