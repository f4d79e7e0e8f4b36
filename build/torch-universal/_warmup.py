"""Compiles beforehand the kernels that the first calls of a process would wait for."""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch

from ._call import Call, Transition, TransitionWeights, Weights
from .paths import TRITON_DEVICES, execution_path, module_for, path_module, say_once
from .triton_parts.device import DeviceTarget, device_target, standing_in
from .triton_parts.settings import class_lengths
from .validation import COMPUTE_DTYPES, check_memory, resolve_precision

_LONGEST_OF_OTHER_GROUPS = 1024  # longer ones are cut into as many groups of channels as this one


def warmup(
    channels: int = 256,
    hidden: int | None = None,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    norm_dtype: torch.dtype | None = torch.float32,
    mask_dtypes: Iterable[torch.dtype | None] = (torch.bool, torch.float32),
    residual: bool = False,
    drop_mask_dtype: torch.dtype | None = None,
    lengths: Iterable[int] | None = None,
    precision: str | None = None,
    memory: str = "default",
    training: bool = False,
    transition_hidden: int | None = None,
) -> None:
    """Compiles the kernels that calls of one kind need, so that no such call waits for a compiler.

    Lengths share kernels in a few classes; all classes are compiled, or those of `lengths`: for one
    sequence at a time, and tensors of less than 2^31 elements (L below 2,048 for C = D = 256).
    Triton caches compiled kernels on disk, so later processes on the same machine profit too. The
    defaults fit ESMFold2's trunk.

    On a machine without such a device, or with one that runs no Triton kernels, there is nothing to
    compile: the log says so once.

    Args:
        channels, hidden: C and D; hidden is channels unless given.
        device: the accelerator of the calls to come.
        dtype: of the pair tensor and the projections.
        norm_dtype: of the LayerNorms' parameters; None where they have none.
        mask_dtypes: the dtypes that masks will have, None for calls without a mask.
        residual: whether calls add a residual.
        drop_mask_dtype: the dtype of the drop masks; None for calls without one.
        lengths: L of the calls to come; None means any.
        precision: as for `triangle_multiplicative_update_with_residual`.
        memory: "default" or "lean": the kernels of that mode.
        training: whether calls need the gradients of x and of all parameters.
        transition_hidden: H of the transitions, which are compiled too, for the same channels,
            dtypes, residual, lengths and precision, without biases; 1024 in ESMFold2's trunk.
            None means none.

    Raises:
        ValueError: an argument that doesn't fit, such as the eighth GPU of four.
        TypeError: a dtype that the kernels don't take.
    """
    hidden = channels if hidden is None else hidden
    widths = {"channels": channels, "hidden": hidden}
    if transition_hidden is not None:
        widths["transition_hidden"] = transition_hidden
    for name, value in widths.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}")
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"dtype must be torch.bfloat16, torch.float16 or torch.float32; got {dtype}"
        )
    if norm_dtype is not None and norm_dtype not in COMPUTE_DTYPES:
        raise TypeError(
            "norm_dtype must be torch.bfloat16, torch.float16, torch.float32 or None; "
            f"got {norm_dtype}"
        )
    mask_dtypes = _listed("mask_dtypes", mask_dtypes)
    for mask_dtype in mask_dtypes:
        _check_mask_dtype("mask_dtypes", mask_dtype)
    _check_mask_dtype("drop_mask_dtype", drop_mask_dtype)
    check_memory(memory)
    if memory == "auto":
        raise ValueError("memory must be 'default' or 'lean' for warmup; got 'auto'")
    word = resolve_precision(precision, "pair", torch.empty(0, dtype=dtype, device="meta"))
    if lengths is not None:
        lengths = _listed("lengths", lengths)
        if not all([isinstance(length, int) and length > 0 for length in lengths]):
            raise ValueError(f"lengths must be positive integers; got {lengths}")
    try:
        kind = torch.device(device).type
        if kind in TRITON_DEVICES and not getattr(torch, kind).is_available():
            say_once(f"is not compiled beforehand: there is no {kind} device here")
            return
        there = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be one of this machine; got {device!r}") from error
    device = there.device  # with its index
    path = execution_path(device, dtype)
    if path.name != "triton":
        say_once(f"is not compiled beforehand: {path.reason}")
        return

    target = device_target(device)
    module = path_module(path.name)

    def tensor(*shape: int, dtype: torch.dtype | None = dtype) -> torch.Tensor | None:
        return None if dtype is None else torch.empty(shape, dtype=dtype, device="meta")

    bundle = tensor(4 * hidden, channels)  # one tensor, as in ESMFold2
    weights = Weights(
        tensor(channels, dtype=norm_dtype), tensor(channels, dtype=norm_dtype),
        bundle[: 2 * hidden], None, bundle[2 * hidden :], None,
        tensor(hidden, dtype=norm_dtype), tensor(hidden, dtype=norm_dtype),
        tensor(channels, hidden), None, tensor(channels, channels), None,
    )  # fmt: skip
    transition_weights = None
    if transition_hidden is not None:
        gate_and_up = tensor(2 * transition_hidden, channels)  # one tensor, as in ESMFold2
        transition_weights = TransitionWeights(
            tensor(channels, dtype=norm_dtype), tensor(channels, dtype=norm_dtype),
            gate_and_up[:transition_hidden], None, gate_and_up[transition_hidden:], None,
            tensor(channels, transition_hidden), None,
        )  # fmt: skip

    def calls(length: int) -> Iterator[Call | Transition]:
        """The calls of this length whose kernels are compiled."""
        x = tensor(1, length, length, channels)
        added = x if residual else None
        for mask_dtype in mask_dtypes:
            yield Call(
                x=x,
                direction="outgoing",
                mask=tensor(1, length, length, dtype=mask_dtype),
                residual=added,
                drop_mask=tensor(1, length, channels, dtype=drop_mask_dtype),
                weights=weights,
                eps_in=1e-5,
                eps_out=1e-5,
                precision=word,
                memory=memory,
                recompute="none",
                inplace=False,
                lengths=None,
            )
        if transition_weights is not None:
            yield Transition(
                x=x,
                residual=added,
                weights=transition_weights,
                eps=1e-5,
                precision=word,
                inplace=False,
                lengths=None,
            )

    sizes = functools.partial(module.group_size, hidden) if training else None
    with standing_in(target), module.current_device(there):
        for length in _lengths_of_each_kind(lengths, target, sizes):
            for call in calls(length):
                of = module_for(call, path.name)
                for launch, tensors in (
                    of.plan_training(call) if training else of.plan(call).launches
                ):
                    launch.compile(**tensors)


def _lengths_of_each_kind(
    lengths: list[int] | None, target: DeviceTarget, group_size: Callable[[int], int] | None
) -> list[int]:
    """One of `lengths`, or of all lengths, for each set of kernels that they distinguish.

    `group_size` gives the channels of the backward's groups by length; None without a backward.
    Lengths below 16 count as 16: axes of length 1 would need another kernel.
    """
    classes = class_lengths(target.target, target.name)
    if lengths is None:
        lengths = list(classes)
        if group_size is not None:
            # The last length of each size.
            tried = range(16, _LONGEST_OF_OTHER_GROUPS)
            lengths += [n for n in tried if group_size(n) != group_size(n + 1)]
            lengths.append(_LONGEST_OF_OTHER_GROUPS)
    kinds = {}
    for length in [max(16, length) for length in lengths]:
        class_ = min([c for c in classes if c >= length], default=None)
        kinds.setdefault((class_, group_size and group_size(length)), length)
    return list(kinds.values())


def _check_mask_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype.is_complex):
        raise TypeError(f"{name} must be bool, real or None; got {dtype!r}")


def _listed(name: str, values: Iterable) -> list:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be several, in a list or tuple; got {values!r}")
    return list(values)
