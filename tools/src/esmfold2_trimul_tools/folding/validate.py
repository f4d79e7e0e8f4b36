"""The model card's validation: is the kernel as close to the stock path as that path is to itself?

Ubiquitin and GB1 are folded four times each: on the stock path with two seeds, and with the kernel
with the same two seeds. Two seeds on the stock path differ by the model's own randomness (initial
pair state, language-model dropout, diffusion noise): that is the spread. Kernel and stock path with
one seed differ by the kernel's arithmetic alone: that difference must not exceed the spread.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .fold import Differences, Fold, LabelledProgress, compare, fold
from .model import Swap, restore_stock, swap_in
from .options import Kernel, Settings
from .sequences import Record, read_fasta

if TYPE_CHECKING:
    from transformers import EsmFold2Model

PROTEINS = ("ubiquitin", "gb1")
# The numbers that decide. Maxima are left out: over all residue pairs and bins they are luck.
DECIDING = ("plddt_mean", "ptm", "distogram_mean")


class Verdict(NamedTuple):
    """One protein's result: folds of the stock path and the kernel, one of each per seed."""

    record: Record
    stock: tuple[Fold, Fold]
    kernel: tuple[Fold, Fold]
    spread: Differences
    differences: tuple[Differences, Differences]

    def worst(self, name: str) -> float:
        """The larger of the two seeds' kernel differences in the number called `name`."""
        return max(getattr(difference, name) for difference in self.differences)

    def within_spread(self, name: str) -> bool:
        """Whether that number's difference is at most the stock path's spread."""
        return self.worst(name) <= getattr(self.spread, name)

    @property
    def passed(self) -> bool:
        """Whether every deciding number is within the spread."""
        return all(self.within_spread(name) for name in DECIDING)

    def summary(self) -> dict[str, Any]:
        """The protein in the JSON output."""
        return {
            "name": self.record.name,
            "residues": self.record.length,
            "passed": self.passed,
            "stock": [result.summary() for result in self.stock],
            "kernel": [result.summary() for result in self.kernel],
            "spread": self.spread._asdict(),
            "differences": [difference._asdict() for difference in self.differences],
            "within_spread": {name: self.within_spread(name) for name in DECIDING},
        }


class Validation(NamedTuple):
    """The sites that run the kernel's layer, and each protein's verdict."""

    swap: Swap
    verdicts: list[Verdict]

    @property
    def passed(self) -> bool:
        """Whether every protein passed."""
        return all(verdict.passed for verdict in self.verdicts)


def shipped_proteins() -> list[Record]:
    """Ubiquitin and GB1, from this package's data files."""
    folder = Path(__file__).resolve().parents[1] / "data"
    return [record for name in PROTEINS for record in read_fasta(folder / f"{name}.fasta")]


def validate(
    model: "EsmFold2Model",
    kernel: Kernel,
    root: Path,
    settings: Settings,
    records: list[Record] | None = None,
    progress: LabelledProgress | None = None,
) -> Validation:
    """Fold each protein twice on the stock path and twice with the kernel, and compare.

    Args:
        kernel, root: as for `model.swap_in`.
        settings: loops, samples and steps of every fold; the seeds are its seed and the next.
        records: the proteins; ubiquitin and GB1 without them.

    Raises:
        UserError: the kernel can't be had, or a fold can't be made or gives NaN.
    """
    settings.check()
    records = shipped_proteins() if records is None else records
    restore_stock(model)
    stock = _fold_all(model, "stock", records, settings, progress)
    swap = swap_in(model, kernel, root)
    swapped = _fold_all(model, kernel, records, settings, progress)
    verdicts = []
    for record, of_stock, of_kernel in zip(records, stock, swapped, strict=True):
        differences = tuple(map(compare, of_stock, of_kernel))
        verdicts.append(Verdict(record, of_stock, of_kernel, compare(*of_stock), differences))
    return Validation(swap, verdicts)


def _fold_all(
    model: "EsmFold2Model",
    path: str,
    records: list[Record],
    settings: Settings,
    progress: LabelledProgress | None,
) -> list[tuple[Fold, Fold]]:
    """Each record folded with two seeds."""

    def fold_one(record: Record, seed: int) -> Fold:
        label = f"{record.name}, {path}, seed {seed}"
        report = None if progress is None else partial(progress, label)
        return fold(model, record, replace(settings, seed=seed), report)

    seeds = (settings.seed, settings.seed + 1)
    return [tuple(fold_one(record, seed) for seed in seeds) for record in records]
