"""The denoiser of a fold as a CUDA graph.

The sampler calls the denoiser once a step, dozens of times a fold, on tensors of equal shapes, so
every step launches the same kernels. With a short protein the host takes longer to launch them than
the GPU takes to run them. A CUDA graph has them all and is launched at once.

The first step of a fold runs as ever, which compiles and warms up what the second one captures and
all others replay. A graph has the model's own kernels and the sampler goes on to draw all random
numbers, so the coordinates are those without a graph, to the bit where the kernels themselves give
equal bits twice (transformers' mean over a token's atoms adds in no fixed order on a GPU).

A capture launches nothing and takes the host about as long as a step: a graph for each protein is
cheap. `torch.compile` is not: the denoiser is compiled anew for each length even with dynamic=True,
because the lengths of its loops over chunks are the protein's.
"""

import dataclasses
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import EsmFold2Model

_ARGUMENTS = ["noisy_coords", "noise_level", "conditioning"]


@contextmanager
def graphed_denoiser(
    model: "EsmFold2Model", say: Callable[[str], None] | None = None
) -> Iterator["GraphedDenoiser"]:
    """Within the block, `model.fold` replays its denoiser as a CUDA graph from the third step on.

    Another fold captures its own graph. A graph and its memory are given back when the sampler is
    done, before the confidence head, where a fold needs the most memory. Where a step can't be
    captured, the model's own forward runs, and the reason is said once.

    Args:
        say: called with a sentence; `warnings.warn` without it.

    Yields:
        the forward of the denoiser, which counts `captures` and `replays`.
    """
    denoiser = model.structure_head
    graphed = GraphedDenoiser(denoiser, say)
    if reason := _other_arguments(denoiser):
        graphed.leave(reason)
        yield graphed
        return
    before = vars(denoiser).get("forward")
    denoiser.forward = graphed
    try:
        yield graphed
    finally:
        graphed.release()
        del denoiser.forward
        if before is not None:
            denoiser.forward = before


class GraphedDenoiser:
    """A denoiser's forward, from the third call with equal tensors on as a CUDA graph.

    captures, replays: how often it did so.
    """

    def __init__(self, denoiser: nn.Module, say: Callable[[str], None] | None = None) -> None:
        self._denoiser, self._forward = denoiser, denoiser.forward
        self._say = say or (lambda words: warnings.warn(words, RuntimeWarning, stacklevel=4))
        self._said: set[str] = set()
        self.captures = self.replays = 0
        self._forget()

    def __call__(self, noisy_coords: Tensor, noise_level: Tensor, conditioning: Any) -> Tensor:
        """As the model's own: noisy_coords [S, A, 3], noise_level [S]; returns [S, A, 3].

        A graph reads the tensors of `conditioning` where they are, and copies of the other two.
        """
        step = (noisy_coords, noise_level)
        key = (*map(_layout, step), _addresses(conditioning), _modes(noisy_coords.device))
        if key != self._key:
            return self._first(key, step, conditioning)
        if self._graph is None and not self._left:
            self._capture(step, conditioning)
        if self._left:
            return self._forward(*step, conditioning)
        for own, given in zip(self._step, step, strict=True):
            own.copy_(given)
        self._graph.replay()
        self.replays += 1
        return self._graph.output.clone()  # the next replay writes over it

    def release(self) -> None:
        """Gives the graph and its memory back."""
        if self._graph is not None:
            self._graph.release()
        self._forget()

    def leave(self, reason: str) -> None:
        """Run the model's own forward until the tensors change."""
        self._left = True
        if reason not in self._said:
            self._said.add(reason)
            self._say(f"the denoiser runs without a CUDA graph: {reason}")

    def _forget(self) -> None:
        self._key = self._graph = self._step = self._sampling = None
        self._left = False

    def _first(self, key: tuple, step: tuple[Tensor, Tensor], conditioning: Any) -> Tensor:
        """A step that runs as ever, after which equal ones can be captured."""
        self.release()
        self._key = key
        # It holds the sampler's tensors no longer than the sampler does.
        self._sampling = weakref.ref(conditioning, lambda _: self.release())
        reason = self._obstacle(step[0].device)
        if reason is None:
            try:
                with CudaGraph.rehearsal():
                    return self._forward(*step, conditioning)
            except WaitsForDeviceError:
                reason = "it waits for the device within a step"
        self.leave(reason)
        return self._forward(*step, conditioning)

    def _obstacle(self, device: torch.device) -> str | None:
        """Why a step can't be captured, as far as that shows beforehand."""
        if device.type != CudaGraph.device_type:
            return f"it runs on {device.type}"
        if torch.is_grad_enabled():
            return "gradients are recorded"
        if CudaGraph.is_under_way():
            return "another graph is being captured"
        inside = [part for part in self._denoiser.modules() if part is not self._denoiser]
        if any(part._forward_hooks or part._forward_pre_hooks for part in inside):
            return "its modules have hooks, which a graph would not call"
        return None

    def _capture(self, step: tuple[Tensor, Tensor], conditioning: Any) -> None:
        self._step = tuple(given.clone() for given in step)
        device = step[0].device
        try:
            self._graph = CudaGraph(lambda: self._forward(*self._step, conditioning), device)
        except Exception as error:  # whatever a library raises where it can't be captured
            words = (str(error).strip() or "no message").splitlines()[0]
            self._step = None
            self.leave(f"it can't be captured ({type(error).__name__}: {words})")
        else:
            self.captures += 1


def _other_arguments(denoiser: nn.Module) -> str | None:
    """The difference from transformers 5.22, if there is one."""
    found = [*inspect.signature(denoiser.forward).parameters]
    if found == _ARGUMENTS:
        return None
    return f"it takes {', '.join(found)} where {', '.join(_ARGUMENTS)} are known"


class WaitsForDeviceError(Exception):
    """A call waits for what the device computes."""


class CudaGraph:
    """What a call launches, to be launched again. output: of the call, and of the last replay.

    Raises:
        Exception: what the call raises, or torch, where it does what can't be captured. Random
            numbers and the current stream are then as they were.
    """

    device_type = "cuda"

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[device.index]
        state = generator.clone_state()
        # A weight that autocast casts would be kept for calls outside, in the graph's memory.
        keeps_casts = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with (
                torch.cuda.device(device),
                # torch.cuda.graph leaves its own stream current where a capture fails.
                torch.cuda.stream(torch.cuda.current_stream(device)),
                # Other threads may go on with the device.
                torch.cuda.graph(
                    self._graph, stream=_stream(device), capture_error_mode="thread_local"
                ),
            ):
                self.output = call()
        except Exception:
            generator.graphsafe_set_state(state)  # it may take itself for one within a capture
            raise
        finally:
            torch.set_autocast_cache_enabled(keeps_casts)

    def replay(self) -> None:
        """Runs it again, on the current stream, with what its tensors hold now."""
        self._graph.replay()

    def release(self) -> None:
        """Frees it, and its memory for all uses: torch keeps a graph's apart until then."""
        self.output = None
        self._graph.reset()
        torch.cuda.empty_cache()

    @staticmethod
    def is_under_way() -> bool:
        """Whether the current stream is captured."""
        return torch.cuda.is_current_stream_capturing()

    @staticmethod
    @contextmanager
    def rehearsal() -> Iterator[None]:
        """Raises WaitsForDeviceError where the block does what would spoil a capture.

        A spoilt capture leaves torch's allocator unable to free what it caches.
        """
        before = torch.cuda.get_sync_debug_mode()
        _watch_waits("error")
        try:
            yield
        except RuntimeError as error:
            if "synchronizing CUDA operation" not in str(error):
                raise
            raise WaitsForDeviceError from error
        finally:
            _watch_waits(before)


def _watch_waits(mode: int | str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype, which may miss some
        torch.cuda.set_sync_debug_mode(mode)


@functools.cache
def _stream(device: torch.device) -> "torch.cuda.Stream":
    """One for all captures: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def _modes(device: torch.device) -> tuple:
    """What a step depends on beside its arguments."""
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return autocast, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _layout(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _addresses(value: Any) -> Any:
    """Equal for values that a graph can't tell apart: tensors by address, all else by value."""
    if isinstance(value, Tensor):
        return value.data_ptr(), *_layout(value)
    if dataclasses.is_dataclass(value):
        return tuple(_addresses(getattr(value, one.name)) for one in dataclasses.fields(value))
    if isinstance(value, (list, tuple)):
        return tuple(map(_addresses, value))
    return value
