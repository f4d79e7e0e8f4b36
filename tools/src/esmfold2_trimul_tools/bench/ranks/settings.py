"""The options of ranks: their checks, and their defaults on this machine."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UserError
from ...options import at_least
from ...repository import find_root
from ...triton_cache import check_cache
from ..case import Case
from ..settings import numbers

if TYPE_CHECKING:
    import torch

    from ..options import Options

_LENGTHS = {"cuda": (1024, 2048, 4096, 8192), "cpu": (64, 128)}
_ALONE_UP_TO = {"cuda": 4096, "cpu": 512}


@dataclass(frozen=True)
class RanksOptions:
    """The options that only ranks have."""

    nproc: Annotated[
        int | None,
        typer.Option(
            help="Measure whole calls of a pair tensor over so many processes of this machine, one "
            "a GPU with NCCL or on the CPU with gloo, beside one process; it starts them. "
            "--lengths: 1024 to 8192 by default.",
        ),
        at_least(2),
    ] = None
    alone_up_to: Annotated[
        int | None,
        typer.Option(
            help="With --nproc: the longest L that one process computes too. Default: 4096 on a "
            "GPU, 512 on a CPU."
        ),
        at_least(0),
    ] = None
    messages: Annotated[
        str,
        typer.Option(
            help="With --nproc: MiB from each rank to each other, of which the rate is measured."
        ),
        numbers,
    ] = "1,16,64"


@dataclass(frozen=True)
class Plan:
    """The options, checked and resolved: the `RunSettings` of the results' environment."""

    device: "torch.device"  # of any rank; of this one once it has joined
    ranks: int  # of this machine
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    passes: tuple[str, ...]
    alone_up_to: int
    messages: tuple[int, ...]  # MiB
    budget: float
    seed: int
    root: Path

    def cases(self) -> list[Case]:
        """The shapes, in the order in which they are measured."""
        return [
            Case(channels, length, dtype, direction, passes=passes)
            for passes in self.passes
            for dtype in self.dtypes
            for channels in self.widths
            for length in self.lengths
            for direction in self.directions
        ]


def plan_of(options: "Options") -> Plan:
    """What is to be measured on this machine.

    Raises:
        UserError: no such device, or fewer GPUs than ranks.
    """
    root = find_root(options.kernel_root)  # before torch is imported
    import torch

    from ...folding.model import resolve_device, resolve_dtype
    from ...ranks import is_rank

    device = resolve_device(options.device)
    if device.type not in _LENGTHS or (options.device or "").startswith("cuda:"):
        name = options.device or str(device)
        raise UserError(f"--device must be cpu or cuda with --nproc; got {name!r}")
    if device.type == "cuda":
        check_cache()
        if options.nproc > torch.cuda.device_count():
            raise UserError(
                f"--nproc must be at most the {torch.cuda.device_count()} GPUs here; "
                f"got {options.nproc}"
            )
    if is_rank() and (started := os.environ.get("LOCAL_WORLD_SIZE")) != str(options.nproc):
        raise UserError(
            f"--nproc must be the number of processes that torchrun has started here, {started}; "
            f"got {options.nproc}"
        )
    kind, alone = device.type, options.alone_up_to
    return Plan(
        device=device,
        ranks=options.nproc,
        widths=options.widths,
        lengths=options.lengths or _LENGTHS[kind],
        dtypes=options.dtypes or (str(resolve_dtype(None, device)).removeprefix("torch."),),
        directions=options.directions,
        passes=options.passes,
        alone_up_to=_ALONE_UP_TO[kind] if alone is None else alone,
        messages=options.messages,
        budget=options.budget,
        seed=options.seed,
        root=root,
    )
