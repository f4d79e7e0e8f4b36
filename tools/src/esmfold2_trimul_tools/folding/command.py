"""The commands fold and validate."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..console import ProgressBar, print_json, stdout
from ..errors import UserError
from ..options import AsJson, KernelRoot, checked, writable_folder
from ..repository import find_root
from ..triton_cache import check_cache
from .options import (
    DeviceName,
    DtypeName,
    FullSize,
    KernelName,
    Loops,
    ModelName,
    RandomWeights,
    Samples,
    Seed,
    Settings,
    Steps,
)
from .sequences import STDIN, Record, file_stems, parse_sequence, read_fasta

if TYPE_CHECKING:
    from .fold import Failure, Fold, Outcome
    from .memory import PeakMemory
    from .validate import Validation

# torch and transformers take seconds to import, so each command first makes all checks that don't
# need them.

RANDOM_NOTE = "random weights: meaningless as biology"


@checked
def fold(
    sequence: Annotated[
        str | None,
        typer.Argument(
            help="One letter per residue, upper or lower case; X for an unknown one. "
            "Or a FASTA file; - is standard input.",
            show_default=False,
        ),
    ] = None,
    fasta: Annotated[
        Path | None,
        typer.Option(
            "--fasta",
            help="A FASTA file, also packed with gzip, bzip2 or xz, or - for standard input: "
            "every protein in it is folded.",
        ),
    ] = None,
    model: ModelName = None,
    random_weights: RandomWeights = False,
    full_size: FullSize = False,
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
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for the PDB and PNG files."),
        writable_folder,
    ] = Path("out"),
    kernel_root: KernelRoot = None,
    as_json: AsJson = False,
) -> None:
    """Fold proteins with the kernel at every triangle multiplication of ESMFold2.

    Writes a PDB file (B-factors: pLDDT from 0 to 100) and a PNG (pLDDT by
    residue, expected distances) per protein, and prints time, peak memory,
    mean pLDDT and pTM. A protein that fails costs the others nothing, but
    the exit status says so.
    """
    if (sequence is None) == (fasta is None):
        raise UserError("give either SEQUENCE or --fasta FILE")
    if full_size and not random_weights:
        raise UserError("--full-size is for --random-weights; a checkpoint has its own size")
    if compare and kernel == "off":
        raise UserError("--compare needs a kernel beside the stock path: --kernel ours or hub")
    records = _records(sequence) if fasta is None else read_fasta(fasta)
    settings = Settings(loops, samples, steps, seed)
    settings.check()
    setup = Setup(model, random_weights, kernel, device, dtype, seed, kernel_root, full_size)
    from .fold import Failure, fold_records

    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    loaded = setup.load()
    note = RANDOM_NOTE if random_weights else ""
    folded, failures = [], []
    with ProgressBar() as report:
        outcomes = fold_records(
            loaded, records, settings, setup.kernel, setup.root, compare, report
        )
        for stem, outcome in zip(file_stems(records), outcomes, strict=True):
            if isinstance(outcome, Failure):
                failed = [outcome]
            else:
                files, failed = _write(outcome.fold, out / stem, note)
                if files["pdb"] is not None:
                    folded.append(outcome.summary() | files)
                    if not as_json:
                        with report.hidden():
                            _print_outcome(outcome, setup, files)
            for failure in failed:
                with report.hidden():
                    print(f"{failure.trace}error: {failure.message}", file=sys.stderr)
            failures += failed
    if as_json:
        print_json(
            {
                **setup.summary(settings.resolved(loaded.config)),
                "folds": folded,
                "failures": [failure.summary() for failure in failures],
            }
        )
    if failures:
        raise typer.Exit(max(failure.exit_status for failure in failures))


@checked
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
    if kernel == "off":
        raise UserError("validate needs a kernel beside the stock path: --kernel ours or hub")
    settings = Settings(loops, samples, steps, seed)
    settings.check()
    setup = Setup(model, random_weights, kernel, device, dtype, seed, kernel_root)
    from .validate import validate as run

    loaded = setup.load()
    with ProgressBar() as report:
        result = run(loaded, setup.kernel, setup.root, settings, progress=report)
    if as_json:
        print_json(
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


class Setup:
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
        full_size: bool = False,
    ) -> None:
        if random_weights and model is not None:
            raise UserError("give either --model or --random-weights")
        self.root = find_root(kernel_root) if kernel == "ours" else None
        from .model import (
            HUB_MODEL,
            check_kernel,
            check_swappable,
            resolve_device,
            resolve_dtype,
        )

        self.device = resolve_device(device)
        self.kernel = check_kernel(kernel, self.device)
        self.dtype = resolve_dtype(dtype, self.device)
        drawn = "random weights, full size" if full_size else "random weights"
        self.name = drawn if random_weights else model or HUB_MODEL
        self.random_weights = random_weights
        self.full_size = full_size
        self.seed = seed
        if self.kernel != "off":
            check_swappable()

    def load(self) -> Any:
        """The model on its device.

        Raises:
            UserError: it can't be had or does not fit, or Triton can't write to its cache.
        """
        from .model import load_model, random_model

        if self.device.type != "cpu" and self._compiles():
            check_cache()
        if self.full_size:
            from .full_size import full_size_model

            return full_size_model(self.device, self.dtype, self.seed)
        if self.random_weights:
            return random_model(self.device, self.dtype, self.seed)
        return load_model(self.name, self.device, self.dtype)

    def _compiles(self) -> bool:
        """Whether Triton compiles the kernel on an accelerator."""
        return self.kernel == "hub" or (self.kernel == "ours" and self.path()[0] == "triton")

    def path(self) -> tuple[str, str]:
        """Which implementation our kernel takes here, and why."""
        from ..repository import load_kernel

        return tuple(load_kernel(self.root).paths.execution_path(self.device, self.dtype))

    def kernel_description(self) -> str:
        """The kernel in words."""
        if self.kernel == "ours":
            return "ours, {} path: {}".format(*self.path())
        return {"hub": "the Hub's", "off": "stock path"}[self.kernel]

    def summary(self, settings: Settings) -> dict[str, Any]:
        """A run in the JSON output."""
        name, reason = self.path() if self.kernel == "ours" else (None, None)
        return {
            "model": self.name,
            "random_weights": self.random_weights,
            "full_size": self.full_size,
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


def _records(sequence: str) -> list[Record]:
    """What the argument SEQUENCE stands for: a FASTA file if there is one of that name."""
    is_path = len(sequence) < 512 and any(mark in sequence for mark in "./\\")
    # A pipe is a file too; a folder may have the name of a sequence.
    is_file = os.path.exists(sequence) and (is_path or not os.path.isdir(sequence))
    if is_file or sequence == str(STDIN):
        return read_fasta(Path(sequence))
    try:
        return [parse_sequence(sequence)]
    except UserError as error:
        if is_path:
            raise UserError(f"{sequence}: no such file, and not a sequence either") from error
        raise


def _write(result: "Fold", stem: Path, note: str) -> "tuple[dict[str, str | None], list[Failure]]":
    """The files that were written, by their kinds, and what could not be."""
    from .fold import Failure, write_pdb

    pdb, png = Path(f"{stem}.pdb"), Path(f"{stem}.png")
    try:
        with _writing(pdb):
            write_pdb(result, pdb, [note.upper()] if note else [])
    except UserError as error:
        failure = Failure(result.record, str(error), error.exit_status)
        return {"pdb": None, "png": None}, [failure]
    try:
        from .plots import plot_fold

        plot_fold(result, png, note)
    except Exception as error:  # whatever a drawing library raises: the fold itself is there
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        failure = Failure(result.record, f"{png}: can't be drawn ({words}); {pdb} is whole")
        return {"pdb": str(pdb), "png": None}, [failure]
    return {"pdb": str(pdb), "png": str(png)}, []


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {path}: can't be written to ({error.strerror})") from error


def _print_outcome(outcome: "Outcome", setup: Setup, files: dict[str, str | None]) -> None:
    result, stock, differences = outcome.fold, outcome.stock, outcome.differences
    console = stdout(soft_wrap=True)
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
    stdout().print(table)
    if stock is not None:
        console.print("Differences are absolute; those of the distogram are of probabilities")
    console.print(f"Memory: {result.memory.meaning}; in brackets, above the fold's start")
    console.print("Wrote " + " and ".join(filter(None, files.values())))


def _print_validation(result: "Validation", setup: Setup) -> None:
    from .validate import DECIDING

    console = stdout(soft_wrap=True)
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
        stdout().print(table)
    if result.passed:
        console.print("Passed: the kernel differs from the stock path by less than its own spread.")
    else:
        console.print(
            "FAILED: the kernel differs from the stock path by more than its own spread. "
            "A spread of two seeds can be small by luck: try another --seed too."
        )


def _memory(memory: "PeakMemory") -> str:
    return f"{memory.peak_bytes / 2**20:.0f} MiB (+{memory.added_bytes / 2**20:.0f})"
