"""Fold proteins on transformers' stock path or with a kernel swapped in, and compare two folds."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BrokenFoldError, UserError
from .memory import PeakMemory, measure_peak_memory
from .model import Swap, swap_in, triangle_modules
from .options import Kernel, Settings
from .sequences import Record

if TYPE_CHECKING:
    from transformers import EsmFold2Config, EsmFold2Model

# Called after each site with the number of sites done and the total.
Progress = Callable[[int, int], None]
# The same, after a few words on what is being folded.
LabelledProgress = Callable[[str, int, int], None]

_LOOPED_PARTS = ("folding_trunk.", "lm_encoder.", "msa_encoder.")  # run once a loop; others once


@dataclass
class Fold:
    """One folded protein; tensors are float32 on the CPU. L residues, S samples, A heavy atoms.

    plddt: [S, L], 0 to 1. ptm: [S], 0 to 1. coords: [S, A, 3] in Å. distogram: [L, L, bins],
    probabilities. bin_centres: [bins] in Å. best: the sample with the highest pTM, the one that is
    reported. pdb: its structure, with pLDDT from 0 to 100 as B-factors. seconds: wall time.
    """

    record: Record
    plddt: Tensor
    ptm: Tensor
    coords: Tensor
    distogram: Tensor
    bin_centres: Tensor
    best: int
    pdb: str
    seconds: float
    memory: PeakMemory

    @property
    def mean_plddt(self) -> float:
        """Mean over the residues of the best sample, 0 to 1."""
        return float(self.plddt[self.best].mean())

    @property
    def expected_distances(self) -> Tensor:
        """[L, L] in Å: the mean of each pair's distogram, between Cβ atoms (Cα for glycine)."""
        return self.distogram @ self.bin_centres

    def summary(self) -> dict[str, Any]:
        """The fold in the JSON output."""
        return {
            "seconds": self.seconds,
            "peak_memory_bytes": self.memory.peak_bytes,
            "added_memory_bytes": self.memory.added_bytes,
            "memory_meaning": self.memory.meaning,
            "mean_plddt": self.mean_plddt,
            "ptm": float(self.ptm[self.best]),
        }


class Differences(NamedTuple):
    """The differences of two folds of one protein, for the sample that is the first fold's best.

    All are absolute. plddt_of_means: between the mean pLDDTs. plddt_mean, plddt_max: mean and
    largest over residues. ptm. distogram_mean, distogram_max: of the probabilities, over residue
    pairs and bins. coords_rmsd: Å, over heavy atoms after superposition.
    """

    plddt_of_means: float
    plddt_mean: float
    plddt_max: float
    ptm: float
    distogram_mean: float
    distogram_max: float
    coords_rmsd: float


def site_calls(model: "EsmFold2Model", loops: int) -> int:
    """How many times one fold calls a triangle multiplication.

    A site in the trunk or in one of the encoders that feed it runs in each of the `loops` + 1
    passes; one in the coda or the confidence head runs once, whatever the number of samples.
    """
    names = triangle_modules(model)
    looped = sum(name.startswith(_LOOPED_PARTS) for name in names)
    return looped * (loops + 1) + (len(names) - looped)


def fold(
    model: "EsmFold2Model",
    record: Record,
    settings: Settings,
    progress: Progress | None = None,
) -> Fold:
    """Fold one protein with the layers that the model has now.

    torch's random state is set from `settings.seed` first, on every device: two folds with equal
    settings draw the same initial pair state, dropout and noise, and so can be compared.

    Raises:
        UserError: a setting that no fold can use, or not enough memory.
        BrokenFoldError: NaN or infinity in the outputs.
    """
    settings.check()
    settings = settings.resolved(model.config)
    from transformers.models.esmfold2.protein_utils import output_to_pdb, prepare_protein_features

    features = prepare_protein_features(record.sequence, device=model.device)
    torch.manual_seed(settings.seed)
    try:
        with (
            _counted_sites(model, site_calls(model, settings.loops), progress),
            measure_peak_memory(model.device) as memory,
        ):
            start = time.perf_counter()
            output = model.fold(
                **features,
                num_loops=settings.loops,
                num_diffusion_samples=settings.samples,
                num_sampling_steps=settings.steps,
            )
            ptm = output.ptm.float().cpu()  # waits for the device
            seconds = time.perf_counter() - start
    except torch.linalg.LinAlgError as error:  # the sampler's superposition of coordinates
        raise _broken(record, model.dtype) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{record.name}: {len(record.sequence)} residues and {settings.samples} samples do not "
            f"fit into the memory of {model.device}"
        ) from error

    plddt = output.plddt.float().cpu()
    coords = output.sample_atom_coords.float().cpu()
    distogram = output.distogram_logits[0].float().cpu().softmax(-1)
    if not all(bool(numbers.isfinite().all()) for numbers in (plddt, ptm, coords, distogram)):
        raise _broken(record, model.dtype)
    best = int(ptm.argmax())
    # B-factors as the AlphaFold database writes them, 0 to 100; ESMFold2's pLDDT is 0 to 1.
    rendered = {"sample_atom_coords": coords, "plddt": plddt * 100}
    return Fold(
        record=record,
        plddt=plddt,
        ptm=ptm,
        coords=coords[:, features["atom_attention_mask"][0].cpu()],
        distogram=distogram,
        bin_centres=distogram_bin_centres(model.config),
        best=best,
        pdb=output_to_pdb(rendered, features, sample_idx=best),
        seconds=seconds,
        memory=memory,
    )


class Outcome(NamedTuple):
    """One protein folded with the kernel, or on the stock path for "off", and its comparison.

    stock and differences are None unless the fold was to be compared.
    """

    swap: Swap
    fold: Fold
    stock: Fold | None = None
    differences: Differences | None = None

    def summary(self) -> dict[str, Any]:
        """The protein in the JSON output."""
        return {
            "name": self.fold.record.name,
            "residues": len(self.fold.record.sequence),
            "sites": self.swap._asdict(),
            **self.fold.summary(),
            "stock": self.stock and self.stock.summary(),
            "differences": self.differences and self.differences._asdict(),
        }


class Failure(NamedTuple):
    """One protein that could not be folded: why, in a line, and the exit status that it asks for.

    trace: of an error that nobody foresaw, in words: a traceback would keep the fold's tensors.
    """

    record: Record
    message: str
    exit_status: int = 1
    trace: str = ""

    def summary(self) -> dict[str, Any]:
        """What the JSON output says of the protein."""
        return {"name": self.record.name, "error": self.message}


def fold_records(
    model: "EsmFold2Model",
    records: list[Record],
    settings: Settings,
    kernel: Kernel,
    root: Path | None = None,
    compare_with_stock: bool = False,
    progress: LabelledProgress | None = None,
) -> Iterator[Outcome | Failure]:
    """Fold each protein with the kernel, and once more on the stock path to compare if asked.

    A protein that can't be folded costs the others nothing. Both paths are warmed up before a
    comparison, so that its times exclude one-time costs: compiling kernels, starting thread pools.

    Args:
        kernel, root: as for `model.swap_in`.

    Raises:
        UserError: the kernel can't be had.
    """

    def fold_with(path: Kernel, record: Record, name: str, settings: Settings) -> tuple[Swap, Fold]:
        swap = swap_in(model, path, root)
        report = None if progress is None else partial(progress, f"{record.name}, {name}")
        return swap, fold(model, record, settings, report)

    def fold_one(record: Record) -> Outcome:
        nonlocal warm
        if not warm:
            cheapest = Settings(loops=0, samples=1, steps=1)
            for path in ("off", kernel):
                fold_with(path, record, "warming up", cheapest)
            warm = True
        name = "stock path" if kernel == "off" else kernel
        swap, result = fold_with(kernel, record, name, settings)
        if not compare_with_stock:
            return Outcome(swap, result)
        _, stock = fold_with("off", record, "stock path", settings)
        return Outcome(swap, result, stock, compare(result, stock))

    warm = not compare_with_stock
    swap_in(model, kernel, root)  # a kernel that can't be had is no protein's failure
    for record in records:
        outcome: Outcome | Failure
        try:
            outcome = fold_one(record)
        except UserError as error:
            outcome = Failure(record, str(error), error.exit_status)
        except Exception as error:  # a fault of ours or of a library: the others may be well
            words = (str(error).strip() or "no message").splitlines()[0]
            message = f"{record.name}: the fold failed ({type(error).__name__}: {words})"
            outcome = Failure(record, message, trace=traceback.format_exc())
        yield outcome


def compare(one: Fold, other: Fold) -> Differences:
    """The differences of two folds of the same protein with the same settings."""
    best = one.best
    plddt = (one.plddt[best] - other.plddt[best]).abs()
    # Row by row: the whole difference would be another [L, L, bins] tensor.
    rows = [(a - b).abs() for a, b in zip(one.distogram, other.distogram, strict=True)]
    return Differences(
        plddt_of_means=float((one.plddt[best].mean() - other.plddt[best].mean()).abs()),
        plddt_mean=float(plddt.mean()),
        plddt_max=float(plddt.max()),
        ptm=float((one.ptm[best] - other.ptm[best]).abs()),
        distogram_mean=float(torch.stack([row.mean() for row in rows]).mean()),
        distogram_max=float(torch.stack([row.max() for row in rows]).max()),
        coords_rmsd=superposed_rmsd(one.coords[best], other.coords[best]),
    )


def superposed_rmsd(moving: Tensor, fixed: Tensor) -> float:
    """Root mean square distance in Å of [A, 3] coordinates after the best rotation and shift.

    Kabsch: with centred P, Q and U S V' = P' Q, the best rotation is U diag(1, 1, det(U V')) V'.
    """
    p = moving.double() - moving.double().mean(0)
    q = fixed.double() - fixed.double().mean(0)
    u, _, vt = torch.linalg.svd(p.T @ q)
    handedness = torch.ones(3, dtype=torch.float64)
    handedness[2] = torch.linalg.det(u @ vt)
    rotated = p @ (u * handedness) @ vt
    return float((rotated - q).pow(2).sum(-1).mean().sqrt())


def distogram_bin_centres(config: "EsmFold2Config") -> Tensor:
    """[bins], the distance in Å that each distogram bin stands for.

    The model's own code never reads the distogram as distances. Its authors do, in Biohub/esm,
    `cookbook/tutorials/binder_design.py`: evenly spaced edges from 2 to 52 Å, which are those of
    the confidence head, and open bins at both ends that count as 1 to 2 Å and 52 to 57 Å.
    """
    head = config.confidence_head
    bins = config.structure_head.num_distogram_bins
    inner = torch.linspace(head.min_dist, head.max_dist, bins - 1)
    edges = torch.cat([inner[:1] - 1, inner, inner[-1:] + 5])
    return (edges[:-1] + edges[1:]) / 2


def write_pdb(result: Fold, path: Path, remarks: list[str]) -> None:
    """Write the best sample as a PDB file; its B-factors are pLDDT, 0 to 100."""
    lines = [f"REMARK   1 {remark}" for remark in (*remarks, "B-FACTOR: PLDDT, 0 TO 100")]
    path.write_text("\n".join(lines) + "\n" + result.pdb, encoding="utf-8")


def _broken(record: Record, dtype: torch.dtype) -> BrokenFoldError:
    hint = "; float16 overflows where bfloat16 does not" if dtype == torch.float16 else ""
    return BrokenFoldError(f"{record.name}: the fold gave numbers that are not finite{hint}")


def is_out_of_memory(error: Exception) -> bool:
    """A CPU's and a library's are plain RuntimeErrors."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error)
        for words in ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")
    )


@contextmanager
def _counted_sites(model: "EsmFold2Model", total: int, progress: Progress | None) -> Iterator[None]:
    """Report every call of a triangle multiplication within the block to `progress`."""
    if progress is None:
        yield
        return
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    handles = [site.register_forward_hook(count) for site in triangle_modules(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
