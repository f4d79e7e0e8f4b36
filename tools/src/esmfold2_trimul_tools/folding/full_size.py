"""An ESMFold2 of the default architecture with random weights: 6.5 billion parameters.

They are made where they stay and in the dtype that is asked for, so that there is never a second
copy. A fold takes the same time and memory as with real weights.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import UserError
from .memory import free_bytes
from .model import draw_heads, esmfold2_model_class, silence_transformers

if TYPE_CHECKING:
    from transformers import EsmFold2Config, EsmFold2Model


def full_size_model(
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    config: "EsmFold2Config | None" = None,
) -> "EsmFold2Model":
    """The model, ready to fold. Equal seeds, devices and dtypes give equal weights.

    Args:
        device, dtype: where and in what it folds; modules that ESMFold2 keeps in float32 are so.
        seed: of the weights. torch's own random state is left as it was.
        config: another architecture than the default.

    Raises:
        UserError: the weights alone need more memory than is free on the device.
    """
    model_class = esmfold2_model_class()
    silence_transformers()
    from transformers import EsmFold2Config
    from transformers.initialization import no_init_weights

    config = config or EsmFold2Config()
    _check_room(model_class, config, device, dtype)
    forked = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    try:
        with torch.random.fork_rng(devices=forked, device_type=kind):
            torch.manual_seed(seed)
            # transformers' and torch's own initial values would be drawn, and then overwritten.
            with no_init_weights(), torch.device(device), _default_dtype(dtype):
                model = model_class(config)
            _keep_in_float32(model)
            _fill(model)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the model does not fit into the memory of {device}") from error
    return model.eval().requires_grad_(False)


def weight_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of the parameters and buffers, as they are or in another dtype."""
    tensors = chain(model.parameters(), model.buffers())
    return sum(one.numel() * (dtype or one.dtype).itemsize for one in tensors)


def _check_room(
    model_class: type["EsmFold2Model"],
    config: "EsmFold2Config",
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Refuses a model whose weights alone are more than what is free."""
    with torch.device("meta"):
        needed = weight_bytes(model_class(config), dtype)
    free = free_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"the full-size model's weights take {needed / 2**30:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and {device} has {free / 2**30:.1f} GiB free; "
            "without --full-size the random model is small"
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _keep_in_float32(model: "EsmFold2Model") -> None:
    """What `from_pretrained` keeps in float32, by transformers' own list of parts of names."""
    kept = re.compile("|".join(model._keep_in_fp32_modules_strict))
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if kept.search(name):
            tensor.data = tensor.data.float()


@torch.no_grad()
def _fill(model: "EsmFold2Model") -> None:
    """Plain norms, and projections that keep the size of signals, zero-initialised ones too."""
    for part in model.modules():
        is_norm = isinstance(part, nn.LayerNorm)
        for name, weight in part.named_parameters(recurse=False):
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            else:
                weight.fill_(float(is_norm and name == "weight"))
    model._init_weights(model.parcae)  # a recurrence with random values may grow without bounds
    draw_heads(model)
    # Computed in the default dtype, that is, rounded.
    head = model.config.confidence_head
    edges = torch.linspace(head.min_dist, head.max_dist, head.distogram_bins - 1)
    model.confidence_head.boundaries.copy_(edges)
