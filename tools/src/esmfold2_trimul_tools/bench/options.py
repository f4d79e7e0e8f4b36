"""The options of the command: of single calls, of whole folds and a layer's steps, and of ranks."""

from dataclasses import dataclass, fields

from ..errors import UserError
from ..options import read
from .ranks.settings import RanksOptions
from .settings import Settings
from .whole.settings import WholeOptions
from .whole.ways import WAYS

# The options of single calls that the other benchmarks have too.
_OF_ALL = {
    "device", "lengths", "dtypes", "seed", "kernel_root", "commit", "out", "results",
    "as_markdown", "as_json",
}  # fmt: skip
_OF_WHOLE = _OF_ALL | {"passes", "published", "esm", "resume"}
# Those that training steps of a layer have too, and those of folds that they don't have.
_OF_STEPS = _OF_WHOLE | {"budget", "check_up_to", "compile_lengths"}
_OF_FOLDS = {"longest", "loops", "samples", "steps", "fold_seconds", "as_readme"}
_OF_RANKS = _OF_ALL | {"widths", "directions", "passes", "budget"}


@dataclass(frozen=True)
class Options(RanksOptions, WholeOptions, Settings):
    """What is to be measured, and how."""

    def check_together(self) -> None:
        """Raises UserError for an option that the chosen benchmark does not have."""
        calls, whole, ranks = (
            {field.name for field in fields(of)} for of in (Settings, WholeOptions, RanksOptions)
        )
        if self.nproc is not None:
            self._refuse(calls - _OF_RANKS | whole, "not for --nproc")
            return
        self._refuse(ranks, "for --nproc")
        if not self.whole:
            self._refuse(whole, "for --whole")
            return
        for name in ("dtypes", "passes"):
            if len(values := getattr(self, name) or ()) > 1:
                raise UserError(f"--{name} must be one with --whole; got {', '.join(values)}")
        (passes,) = self.passes
        if passes == "training":
            self._refuse(calls - _OF_STEPS | _OF_FOLDS, "not for --whole --passes training")
        else:
            self._refuse(calls - _OF_WHOLE, "not for --whole")
        for way in WAYS:
            if way.name in (self.ways or ()) and passes not in way.passes:
                raise UserError(f"--ways: {way.name} is not for --passes {passes}")

    def _refuse(self, names: set[str], why: str) -> None:
        default = read(Options)
        for name in sorted(names):
            if getattr(self, name) != getattr(default, name):
                named = {"rivals": "rival", "as_readme": "readme"}.get(name, name)
                raise UserError(f"--{named.replace('_', '-')} is {why}")
