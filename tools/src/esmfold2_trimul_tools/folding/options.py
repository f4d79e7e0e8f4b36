"""The options that fold and validate share, among them the settings of a fold."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from ..errors import UserError
from ..options import at_least, device_name, dtype_name, one_of
from .sequences import SHORTEST

if TYPE_CHECKING:
    from transformers import EsmFold2Config

Kernel = Literal["ours", "hub", "off"]
MEMORY_VARIABLE = "ESMFOLD2_TRIMUL_MEMORY"  # the mode of our kernel, as its layer takes it
Memory = Literal["auto", "default", "lean"]

kernel_name = one_of(*get_args(Kernel))


def model_name(option: str, name: str) -> str:
    """Refuses a folder without a model, and a name that can't be a Hub id."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {name}: no config.json in it")
    elif _looks_like_a_path(name):
        raise UserError(f"model folder {name}: no such folder")
    else:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"model {name!r}: neither a folder nor a Hub id") from error
    return name


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or os.path.isabs(name)


ModelName = Annotated[
    str | None,
    typer.Option("--model", help="A Hub id or a local folder. Default: biohub/ESMFold2."),
    model_name,
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights",
        help="Fold with a small random model made on the spot: no download, and no biology either.",
    ),
]
FullSize = Annotated[
    bool,
    typer.Option(
        "--full-size",
        help="With --random-weights: the default architecture, 6.5 billion parameters "
        "(12.2 GiB in bfloat16), drawn on the device.",
    ),
]
KernelName = Annotated[
    str,
    typer.Option(
        "--kernel",
        help="ours: the build of this repository. hub: what transformers itself would fetch. "
        "off: transformers' stock path.",
    ),
    kernel_name,
]
DeviceName = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:N or xpu. Default: the best here."),
    device_name,
]
DtypeName = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16, or fp32, bf16, fp16. "
        "Default: bfloat16 on an accelerator, else float32.",
    ),
    dtype_name,
]
Loops = Annotated[
    int | None, typer.Option("--loops", help="Refinements after the first pass through the trunk.")
]
Samples = Annotated[int | None, typer.Option("--samples", help="Structures drawn per protein.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Length of the noise schedule.")]
Seed = Annotated[int, typer.Option("--seed", help="Of every random draw, random weights included.")]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", help="Leave out proteins with more residues than this."),
    at_least(SHORTEST),
]
MemoryMode = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Of the kernel: default, lean (half the memory, some percent slower), or auto (lean "
        "where an allocation fails). Without it, lean where the longest protein may not fit.",
    ),
    one_of(*get_args(Memory)),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        "--chunk-size",
        help="Rows of the pair tensor that the model's own layers take at once: fewer need less "
        "memory. Default: the model's own number.",
    ),
    at_least(1),
]
CudaGraph = Annotated[
    bool,
    typer.Option(
        "--cuda-graph",
        help="Replay the diffusion head's steps as a CUDA graph, which a GPU starts at once: "
        "faster where launching takes longest, with short proteins. Same kernels, same results.",
    ),
]


@dataclass(frozen=True)
class Settings:
    """How to fold. None means the model's own number.

    loops: refinements of the pair tensor after the first pass. samples: structures drawn.
    steps: length of the diffusion noise schedule. seed: of every random draw in the fold.
    """

    loops: int | None = None
    samples: int | None = None
    steps: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises UserError for a number that no fold can use."""
        for name, value, least in (
            ("--loops", self.loops, 0),
            ("--samples", self.samples, 1),
            ("--steps", self.steps, 1),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}; got {value}")

    def resolved(self, config: "EsmFold2Config") -> "Settings":
        """These settings with the model's own numbers in place of None."""
        head = config.structure_head
        return Settings(
            loops=config.num_loops if self.loops is None else self.loops,
            samples=head.num_diffusion_samples if self.samples is None else self.samples,
            steps=head.inference_num_steps if self.steps is None else self.steps,
            seed=self.seed,
        )
