"""Fold proteins on transformers' stock path or with a kernel swapped in, and compare two folds."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BrokenFoldError, UserError
from .complexes import features_of
from .denoiser import graphed_denoiser
from .memory import PeakMemory, measure_peak_memory
from .model import Swap, pair_layers, swap_in, triangle_modules
from .options import Kernel, Settings
from .sequences import Failure, Record

if TYPE_CHECKING:
    from transformers import EsmFold2Config, EsmFold2Model

# Called after each site with the number of sites done and the total.
Progress = Callable[[int, int], None]
# The same, after a few words on what is being folded.
LabelledProgress = Callable[[str, int, int], None]

_LOOPED_PARTS = ("folding_trunk.", "lm_encoder.", "msa_encoder.")  # run once a loop; others once


@dataclass
class Fold:
    """One folded protein or complex; tensors are float32 on the CPU.

    L residues, S samples, A heavy atoms, N chains. plddt: [S, L], 0 to 1. ptm, iptm: [S], 0 to 1;
    iptm is 0 for a single chain. chain_iptm: [S, N, N]; [i, j] is the mean over chain i as seen
    from the best residue of chain j, on the diagonal a chain's own. coords: [S, A, 3] in Å. pae,
    pde: [L, L] in Å, of the best sample; a row of pae is aligned on its residue. distogram:
    [L, L, bins], probabilities. bin_centres: [bins] in Å. seconds: wall time. settings: of the
    fold, none of them None.
    """

    record: Record
    plddt: Tensor
    ptm: Tensor
    iptm: Tensor
    chain_iptm: Tensor
    coords: Tensor
    pae: Tensor
    pde: Tensor
    distogram: Tensor
    bin_centres: Tensor
    seconds: float
    memory: PeakMemory
    settings: Settings

    @property
    def several(self) -> bool:
        """Whether it is a complex."""
        return len(self.record.chains) > 1

    @property
    def ranking_scores(self) -> Tensor:
        """[S], as `ranking_scores` says."""
        return ranking_scores(self.ptm, self.iptm, len(self.record.chains))

    @property
    def ranked(self) -> list[int]:
        """The samples, the one with the highest score first."""
        return _ranked(self.ranking_scores)

    @property
    def best(self) -> int:
        """The sample that is reported."""
        return self.ranked[0]

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
            "iptm": float(self.iptm[self.best]) if self.several else None,
        }


class Differences(NamedTuple):
    """The differences of two folds of one protein, for the sample that is the first fold's best.

    All are absolute. plddt_of_means: between the mean pLDDTs. plddt_mean, plddt_max: mean and
    largest over residues. ptm, iptm. distogram_mean, distogram_max: of the probabilities, over
    residue pairs and bins. coords_rmsd: Å, over heavy atoms after superposition.
    """

    plddt_of_means: float
    plddt_mean: float
    plddt_max: float
    ptm: float
    iptm: float
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
    features = features_of(record, model.device)
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
            ptm = _on_host(output.ptm)  # waits for the device
            seconds = time.perf_counter() - start
    except torch.linalg.LinAlgError as error:  # the sampler's superposition of coordinates
        raise _broken(record, model.dtype) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{record.name}: {record.length} residues and {settings.samples} samples do not "
            f"fit into the memory of {model.device}"
        ) from error

    iptm, plddt = _on_host(output.iptm), _on_host(output.plddt)
    best = _ranked(ranking_scores(ptm, iptm, len(record.chains)))[0]
    coords = _on_host(output.sample_atom_coords)
    pae, pde = _on_host(output.pae[best]), _on_host(output.pde[best])
    distogram = _on_host(output.distogram_logits[0]).softmax(-1)
    numbers = (plddt, ptm, iptm, pae, pde, coords, distogram)
    if not all(bool(one.isfinite().all()) for one in numbers):
        raise _broken(record, model.dtype)
    return Fold(
        record=record,
        plddt=plddt,
        ptm=ptm,
        iptm=iptm,
        chain_iptm=_on_host(output.pair_chains_iptm),
        coords=coords[:, features["atom_attention_mask"][0].cpu()],
        pae=pae,
        pde=pde,
        distogram=distogram,
        bin_centres=distogram_bin_centres(model.config),
        seconds=seconds,
        memory=memory,
        settings=settings,
    )


def ranking_scores(ptm: Tensor, iptm: Tensor, chains: int) -> Tensor:
    """What samples are ranked by: pTM, and 0.8 ipTM + 0.2 pTM of several chains, as AlphaFold's."""
    return ptm if chains == 1 else 0.8 * iptm + 0.2 * ptm


class Outcome(NamedTuple):
    """One protein folded with the kernel, or on the stock path for "off", and its comparison.

    stock and differences are None unless the fold was to be compared. replayed_steps: how many
    steps of the fold's denoiser a CUDA graph replayed, None if it was not to. warnings: about that.
    """

    swap: Swap
    fold: Fold
    stock: Fold | None = None
    differences: Differences | None = None
    replayed_steps: int | None = None
    warnings: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The protein in the JSON output."""
        return {
            "name": self.fold.record.name,
            "residues": self.fold.record.length,
            "chains": len(self.fold.record.chains),
            "sites": self.swap._asdict(),
            **self.fold.summary(),
            "replayed_steps": self.replayed_steps,
            "stock": self.stock and self.stock.summary(),
            "differences": self.differences and self.differences._asdict(),
        }


def fold_records(
    model: "EsmFold2Model",
    records: list[Record],
    settings: Settings,
    kernel: Kernel,
    root: Path | None = None,
    compare_with_stock: bool = False,
    progress: LabelledProgress | None = None,
    cuda_graph: bool = False,
) -> Iterator[Outcome | Failure]:
    """Fold each protein with the kernel, and once more on the stock path to compare if asked.

    A protein that can't be folded costs the others nothing. Both paths are warmed up before a
    comparison, so that its times exclude one-time costs: compiling kernels, starting thread pools.

    Args:
        kernel, root: as for `model.swap_in`.
        cuda_graph: whether the denoiser is a CUDA graph; not in the fold that is compared with.

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
        warnings: list[str] = []
        graphed = graphed_denoiser(model, warnings.append) if cuda_graph else nullcontext()
        with graphed as denoiser:
            swap, result = fold_with(kernel, record, name, settings)
        replayed_steps = denoiser and denoiser.replays
        if not compare_with_stock:
            return Outcome(swap, result, None, None, replayed_steps, tuple(warnings))
        _, stock = fold_with("off", record, "stock path", settings)
        differences = compare(result, stock)
        return Outcome(swap, result, stock, differences, replayed_steps, tuple(warnings))

    warm = not compare_with_stock
    swap_in(model, kernel, root)  # a kernel that can't be had is no protein's failure
    for record in records:
        outcome: Outcome | Failure
        try:
            outcome = fold_one(record)
        except UserError as error:
            outcome = Failure(record.name, str(error), error.exit_status)
        except Exception as error:  # a fault of ours or of a library: the others may be well
            words = (str(error).strip() or "no message").splitlines()[0]
            message = f"{record.name}: the fold failed ({type(error).__name__}: {words})"
            outcome = Failure(record.name, message, 1, traceback.format_exc())
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
        iptm=float((one.iptm[best] - other.iptm[best]).abs()),
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


def _ranked(scores: Tensor) -> list[int]:
    """Where the scores are, the highest first; of equal ones the first first."""
    return scores.argsort(descending=True, stable=True).tolist()


def _on_host(values: Tensor) -> Tensor:
    return values.float().cpu()


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
    """Report the calls of triangle multiplications within the block to `progress`.

    By hooks of the layers that call two of them: a patched layer calls no module.
    """
    if progress is None:
        yield
        return
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 2
        progress(done, total)

    handles = [layer.register_forward_hook(count) for layer in pair_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
