"""A run of `fold`: many proteins, whose results are kept as they come."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..console import ProgressBar, print_json
from ..errors import UserError
from .files import write_whole
from .model_setup import Setup
from .options import MEMORY_VARIABLE, Settings
from .report import facts, print_fold, print_line
from .results import INDEX, TABLE, Results
from .sequences import ELSEWHERE, Failure, Record, looks_like_dna

if TYPE_CHECKING:
    from .fold import Outcome

RANDOM_NOTE = "random weights: meaningless as biology"


class Run:
    """What is folded, and the folder that the results go to.

    Args:
        setup: the model and the kernel.
        settings: of each fold.
        compare: whether each is folded on the stock path too.
        out: the folder of the results; it is made.
        as_json: whether a JSON document is printed, and nothing else.
        pages: whether each fold gets a page.

    Raises:
        UserError: the folder can't be written to.
    """

    def __init__(
        self,
        setup: Setup,
        settings: Settings,
        compare: bool,
        out: Path,
        as_json: bool,
        pages: bool,
    ) -> None:
        self.setup, self.settings, self.compare = setup, settings, compare
        self.out, self.as_json, self.pages = out, as_json, pages
        self.failures: dict[str, Failure] = {}
        self._warned: set[str] = set()
        with _writing(out):
            out.mkdir(parents=True, exist_ok=True)
            self.results = Results(out, setup.settings_of_results(settings, compare))

    def fold(self, proteins: dict[str, Record | Failure], memory: str | None, force: bool) -> None:
        """Fold what is not done, the shortest first, and report on all of it.

        Args:
            proteins: each by the stem of its files.
            memory: the kernel's mode; None for lean where the longest protein may not fit.
            force: whether to fold what is done again.

        Raises:
            typer.Exit: with 1 if some proteins were not folded, with 2 if none was, for want of
                an input that can be.
        """
        records = {stem: one for stem, one in proteins.items() if isinstance(one, Record)}
        todo = {
            stem: record
            for stem, record in sorted(records.items(), key=lambda item: item[1].length)
            if force or self.results.done(stem, record) is None
        }
        several = len(proteins) > 1
        with _writing(self.out):
            self.results.begin([stem for stem in proteins if stem in todo or stem not in records])
        for stem, one in proteins.items():
            if isinstance(one, Failure):
                self._fail(stem, one)
            elif stem not in todo:
                self._skip(stem, one)
            if stem in todo and looks_like_dna(one):
                print(f"warning: {one.name}: folded as a protein, but it looks like DNA; "
                      f"{ELSEWHERE}", file=sys.stderr)  # fmt: skip
        settings = self.settings
        try:
            if todo:
                settings = self._fold_all(todo, memory, several)
        except KeyboardInterrupt:
            if several:
                left = sum(stem not in self.results.entries for stem in todo)
                print(f"interrupted: {left} of {len(proteins)} not folded; the same command goes "
                      "on from here", file=sys.stderr)  # fmt: skip
            raise
        finally:
            self._index()
        folded = [stem for stem in records if self.results.has(stem)]
        if self.as_json:
            failures = [self.failures[stem].summary() for stem in proteins if stem in self.failures]
            folds = [self._summary(stem, stem not in todo) for stem in folded]
            print_json({**self.setup.summary(settings), "folds": folds, "failures": failures})
        elif several:
            index = f" and {self.out / INDEX}" if self.pages else ""
            print(f"{len(folded)} of {len(proteins)} folded: {self.out / TABLE}{index}")
        if self.failures:
            self._list_failures(len(proteins))
            worst = min(failure.exit_status for failure in self.failures.values())
            raise typer.Exit(1 if folded else worst)

    def _index(self) -> None:
        """The page that leads to the others, where there are several."""
        if self.pages and len(self.results.entries) > 1:
            from .pages import index_of

            with _writing(self.out):
                write_whole(self.out / INDEX, index_of(list(self.results.entries.values())))

    def _skip(self, stem: str, record: Record) -> None:
        if not self.as_json:
            print(f"{record.name}: done before, in {self.out}; --force folds it again")
        for fault in self.results.entries[stem]["faults"]:
            self._blame(stem, Failure(record.name, fault, 1))

    def _fold_all(self, records: dict[str, Record], memory: str | None, several: bool) -> Settings:
        """Fold the records; returns the settings with the model's own numbers."""
        from .fold import fold_records

        setup, model = self.setup, self.setup.load()
        settings = self.settings.resolved(model.config)
        tight = self._weigh(model, list(records.values()), settings.samples)
        with (
            ProgressBar("Proteins" if several else None) as report,
            _memory_mode(memory or ("lean" if tight else None)),
        ):
            if several:
                report.overall(0, len(records))
            outcomes = fold_records(
                model, list(records.values()), self.settings, setup.kernel, setup.root,
                self.compare, report, setup.cuda_graph,
            )  # fmt: skip
            for number, (stem, outcome) in enumerate(zip(records, outcomes, strict=True), start=1):
                with report.hidden():
                    if isinstance(outcome, Failure):
                        self._fail(stem, outcome)
                    else:
                        self._keep(stem, outcome, several)
                if several:
                    report.overall(number, len(records))
        return settings

    def _weigh(self, model: Any, records: list[Record], samples: int) -> bool:
        """Say how much memory the longest protein takes, and whether it may not fit."""
        from .memory import fold_bytes, free_bytes

        longest = records[-1]
        path = "off" if self.compare else self.setup.kernel
        needed = fold_bytes(model, longest.length, samples, path)
        free = free_bytes(self.setup.device)
        if len(records) > 1 and not self.as_json:
            room = "" if free is None else f" of {_gib(free)} that are free"
            print(
                f"To fold: {len(records)}. The longest, {longest.name}, has {longest.length} "
                f"residues and takes about {_gib(needed)}{room}"
            )
        if free is None or needed <= free:
            return False
        print(
            f"warning: {longest.name} ({longest.length} residues) may not fit: a fold takes about "
            f"{_gib(needed)}, and {_gib(free)} are free; fewer --samples need less",
            file=sys.stderr,
        )
        return True

    def _keep(self, stem: str, outcome: "Outcome", several: bool) -> None:
        """Write a fold's files, then its line, and say so."""
        from .output import write_files

        record = outcome.fold.record
        for words in outcome.warnings:
            if words not in self._warned:
                print(f"warning: {words}", file=sys.stderr)
        self._warned.update(outcome.warnings)
        note = RANDOM_NOTE if self.setup.random_weights else ""
        try:
            with _writing(self.out):
                files, faults = write_files(
                    outcome.fold, self.out, stem, self.setup.name, facts(outcome, self.setup),
                    note, self.pages,
                )  # fmt: skip
                entry = {"status": "folded", **outcome.summary(), "sequence": record.sequence}
                self.results.add(stem, {**entry, "files": files, "faults": faults})
        except UserError as error:
            self._fail(stem, Failure(record.name, str(error)))
            return
        if not self.as_json:
            if several and not self.compare:
                print_line(outcome, self.out / files.get("page", files["pdb"]))
            else:
                print_fold(outcome, self.setup, self.out / stem, list(files.values()))
        for fault in faults:
            self._blame(stem, Failure(record.name, fault, 1))

    def _blame(self, stem: str, failure: Failure) -> None:
        print_failure(failure)
        self.failures[stem] = failure

    def _fail(self, stem: str, failure: Failure) -> None:
        self._blame(stem, failure)
        entry = {"status": "failed", "name": failure.name, "error": failure.message}
        with _writing(self.out):
            self.results.add(stem, entry)

    def _list_failures(self, total: int) -> None:
        if total > 1:
            print(f"{len(self.failures)} of {total} with errors:", file=sys.stderr)
            for failure in self.failures.values():
                print(f"  {failure.message}", file=sys.stderr)

    def _summary(self, stem: str, done_before: bool) -> dict[str, Any]:
        """A fold in the JSON document."""
        entry = dict(self.results.entries[stem])
        for key in ("stem", "status", "settings", "sequence", "faults"):
            del entry[key]
        files = {kind: str(self.out / file) for kind, file in entry["files"].items()}
        return {**entry, "files": files, "done_before": done_before}


def print_failure(failure: Failure) -> None:
    """Say on stderr why a protein is not folded."""
    print(f"{failure.trace}error: {failure.message}", file=sys.stderr)


@contextmanager
def _memory_mode(mode: str | None) -> Iterator[None]:
    """The mode of our kernel, which `swap_in` reads from the environment; None leaves it."""
    before = os.environ.get(MEMORY_VARIABLE)
    if mode is not None:
        os.environ[MEMORY_VARIABLE] = mode
    try:
        yield
    finally:
        if before is not None:
            os.environ[MEMORY_VARIABLE] = before
        else:
            os.environ.pop(MEMORY_VARIABLE, None)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path = Path(error.filename2 or error.filename or path)
        raise UserError(f"--out {path}: can't be written to ({error.strerror})") from error


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
