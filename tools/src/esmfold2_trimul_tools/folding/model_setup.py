"""The model, device and kernel of a command, checked before anything is loaded."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..repository import built, find_root, load_kernel
from ..triton_cache import check_cache
from .options import Settings


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
        chunk_size: int | None = None,
        cuda_graph: bool = False,
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
        if cuda_graph and self.device.type != "cuda":
            raise UserError(
                f"--cuda-graph needs a CUDA device, and this fold runs on {self.device.type}"
            )
        self.kernel = check_kernel(kernel, self.device)
        self.dtype = resolve_dtype(dtype, self.device)
        drawn = "random weights, full size" if full_size else "random weights"
        self.name = drawn if random_weights else model or HUB_MODEL
        self.random_weights = random_weights
        self.full_size = full_size
        self.seed = seed
        self.chunk_size = chunk_size
        self.cuda_graph = cuda_graph
        if self.kernel == "hub":
            check_swappable()

    def load(self) -> Any:
        """The model on its device.

        Raises:
            UserError: it can't be had or does not fit, or Triton can't write to its cache.
        """
        from .model import load_model, random_model, set_chunk_size

        if self.device.type != "cpu" and self._compiles():
            check_cache()
        if self.full_size:
            from .full_size import full_size_model

            model = full_size_model(self.device, self.dtype, self.seed)
        elif self.random_weights:
            model = random_model(self.device, self.dtype, self.seed)
        else:
            model = load_model(self.name, self.device, self.dtype)
        if self.chunk_size is not None:
            set_chunk_size(model, self.chunk_size)
        return model

    def _compiles(self) -> bool:
        """Whether Triton compiles the kernel on an accelerator."""
        return self.kernel == "hub" or (self.kernel == "ours" and self.path()[0] == "triton")

    def path(self) -> tuple[str, str]:
        """Which implementation our kernel takes here, and why."""
        return tuple(load_kernel(self.root).paths.execution_path(self.device, self.dtype))

    def kernel_description(self) -> str:
        """The kernel in words."""
        if self.kernel == "ours":
            return "ours, {} path: {}".format(*self.path())
        return {"hub": "the Hub's", "off": "stock path"}[self.kernel]

    def settings_of_results(self, settings: Settings, compare: bool) -> dict[str, Any]:
        """What the results depend on, as it was asked for."""
        return {
            "model": self.name,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "kernel": self.kernel,
            "build": built(self.root)["id"] if self.kernel == "ours" else None,
            "compare": compare,
            **asdict(settings),
        }

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
            "cuda_graph": self.cuda_graph,
            "path": name,
            "path_reason": reason,
            "loops": settings.loops,
            "samples": settings.samples,
            "steps": settings.steps,
            "seed": settings.seed,
        }
