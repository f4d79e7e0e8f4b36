"""The commands fold and validate."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..console import ProgressBar, print_json
from ..errors import UserError
from ..libraries import check_installed
from ..options import AsJson, KernelRoot, checked, writable_folder
from .model_setup import Setup
from .options import (
    ChunkSize,
    CudaGraph,
    DeviceName,
    DtypeName,
    FullSize,
    KernelName,
    Loops,
    MaxLength,
    MemoryMode,
    ModelName,
    RandomWeights,
    Samples,
    Seed,
    Settings,
    Steps,
)
from .report import print_validation
from .run import Run, print_failure
from .sequences import STDIN, Failure, Record, file_stems, parse_sequence, read_fasta

# torch and transformers take seconds to import, so each command first makes all checks that don't
# need them.


@checked
def fold(
    sequence: Annotated[
        str | None,
        typer.Argument(
            help="One letter per residue, upper or lower case; X for an unknown one; : between "
            "the chains of a complex. Or a FASTA file; - is standard input.",
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
    max_length: MaxLength = None,
    memory: MemoryMode = None,
    chunk_size: ChunkSize = None,
    cuda_graph: CudaGraph = False,
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for the results."),
        writable_folder,
    ] = Path("out"),
    force: Annotated[
        bool,
        typer.Option("--force", help="Fold again what the folder already has with these settings."),
    ] = False,
    pages: Annotated[
        bool,
        typer.Option(help="Write a page for each protein, of 2.5 MB, that a browser shows."),
    ] = True,
    kernel_root: KernelRoot = None,
    as_json: AsJson = False,
) -> None:
    """Fold proteins with the kernels in every pair-update layer of ESMFold2.

    Writes for each protein or complex a page for the browser, a structure (PDB,
    and mmCIF with its confidence), the confidences as JSON in AlphaFold's layout,
    and a picture; other samples go by their rank. Short ones are folded first. summary.csv and
    results.jsonl get a line as soon as a protein is done: a run that was stopped
    goes on where it was. Exit status: 0, 1 if some were not folded, 2 if nothing
    in the input can be.
    """
    if (sequence is None) == (fasta is None):
        raise UserError("give either SEQUENCE or --fasta FILE")
    if full_size and not random_weights:
        raise UserError("--full-size is for --random-weights; a checkpoint has its own size")
    if compare and kernel == "off":
        raise UserError("--compare needs a kernel beside the stock path: --kernel ours or hub")
    if memory is not None and kernel != "ours":
        raise UserError("--memory is for --kernel ours; the others have one mode")
    given = _records(sequence) if fasta is None else read_fasta(fasta)
    proteins = {
        stem: _of_length(record, max_length)
        for stem, record in zip(file_stems(given), given, strict=True)
    }
    settings = Settings(loops, samples, steps, seed)
    settings.check()
    if all(isinstance(one, Failure) for one in proteins.values()):
        for failure in proteins.values():
            print_failure(failure)
        raise typer.Exit(2)
    check_installed("gemmi")  # the others cost a picture or a page
    setup = Setup(
        model, random_weights, kernel, device, dtype, seed, kernel_root, full_size, chunk_size,
        cuda_graph,
    )  # fmt: skip
    Run(setup, settings, compare, out, as_json, pages).fold(proteins, memory, force)


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
        print_validation(result, setup)
    if not result.passed:
        raise typer.Exit(1)


def _records(sequence: str) -> list[Record | Failure]:
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


def _of_length(record: Record | Failure, longest: int | None) -> Record | Failure:
    if longest is None or isinstance(record, Failure) or record.length <= longest:
        return record
    message = f"{record.name}: {record.length} residues, more than --max-length {longest}"
    return Failure(record.name, message)
