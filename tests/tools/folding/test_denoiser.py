"""The denoiser as a graph: here of a stand-in that replays operators, on a GPU of the real one."""

import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import HAS_GPU
from esmfold2_trimul_tools.folding import denoiser as subject
from esmfold2_trimul_tools.folding.denoiser import WaitsForDeviceError, graphed_denoiser
from esmfold2_trimul_tools.folding.fold import Settings, fold, fold_records
from esmfold2_trimul_tools.folding.model import random_model, restore_stock
from esmfold2_trimul_tools.folding.sequences import Record
from folding import SHORT, STOCK_LAYER, tiny_config, tiny_model, write_kernel_repository
from fresh_process import python_output
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(loops=0, samples=2, steps=8)
CALLS = 6  # the schedule of 8 steps begins below the cap
COMPLEX = Record("complex", "MQIFVKTL:GKX")


class Recording(TorchDispatchMode):
    """A stand-in of `CudaGraph` on a CPU: it runs the operators of a call again where they were."""

    device_type = "cpu"
    alive = 0

    def __init__(self, call, device):
        super().__init__()
        self._calls = []
        with self:
            self.output = call()
        Recording.alive += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def release(self):
        self.output, self._calls = None, None
        Recording.alive -= 1

    @staticmethod
    def is_under_way():
        return False

    @staticmethod
    def rehearsal():
        return nullcontext()


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setattr(subject, "CudaGraph", Recording)
    monkeypatch.setattr(Recording, "alive", 0)
    return Recording


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture(autouse=True)
def _stock_before_each_test(tiny):
    restore_stock(tiny)


def folded(model, record=SHORT, settings=SETTINGS):
    return fold(model, record, settings).coords


@contextmanager
def steps_of(model, record=SHORT):
    """The arguments of the denoiser's calls in a fold."""
    given = []
    handle = model.structure_head.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((*args, *kwargs.values())), with_kwargs=True
    )
    folded(model, record)
    handle.remove()
    with torch.no_grad():
        yield given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ours", [False, True])
def test_a_fold_is_that_without_a_graph_to_the_bit(kernel, recording, dtype, ours):
    model = tiny_model(dtype=dtype)
    with kernel.patch(model) if ours else nullcontext():
        wanted = [folded(model, record) for record in (SHORT, COMPLEX)]
        with graphed_denoiser(model) as denoiser:
            got = [folded(model, record) for record in (SHORT, COMPLEX)]
            assert (denoiser.captures, denoiser.replays) == (2, 2 * (CALLS - 1))
    assert all(map(torch.equal, got, wanted))
    assert not torch.equal(folded(model), folded(model, settings=Settings(0, 2, 8, seed=1)))


def test_a_graph_is_given_back_before_the_confidence_head(tiny, recording):
    alive = []
    note = lambda *_: alive.append(recording.alive)  # noqa: E731
    handles = [
        tiny.structure_head.register_forward_hook(note),
        tiny.confidence_head.register_forward_pre_hook(note),
    ]
    with graphed_denoiser(tiny):
        folded(tiny)
    for handle in handles:
        handle.remove()
    assert alive == [0, *[1] * (CALLS - 1), 0]


def test_what_came_out_is_not_written_over(tiny, recording):
    with steps_of(tiny) as given:
        wanted = [tiny.structure_head(*step) for step in given]
        with graphed_denoiser(tiny):
            got = [tiny.structure_head(*step) for step in given]
    assert all(map(torch.equal, got, wanted))
    assert not torch.equal(got[-1], got[-2])


def test_a_step_unlike_the_last_is_captured_anew(tiny, recording):
    with steps_of(tiny) as given, graphed_denoiser(tiny) as denoiser:
        (coords, level, conditioning), *_ = given

        def agrees(captures, coords=coords, mode=nullcontext):
            with mode():
                wanted = type(tiny.structure_head).forward(
                    tiny.structure_head, coords, level, conditioning
                )
                for _ in range(3):
                    assert torch.equal(tiny.structure_head(coords, level, conditioning), wanted)
            assert denoiser.captures == captures
            assert recording.alive == 1

        agrees(1)
        agrees(1, coords + 1)
        strided = coords.transpose(1, 2).contiguous().transpose(1, 2)
        agrees(2, strided)
        conditioning.atom_embeds = conditioning.atom_embeds + 1
        agrees(3)
        conditioning.token_attention_bias[0] = conditioning.token_attention_bias[0] + 1
        agrees(4)
        agrees(5, mode=lambda: torch.autocast("cpu", torch.bfloat16))
        agrees(6)
    assert recording.alive == 0


def test_the_samplers_tensors_are_not_kept(tiny, recording):
    with steps_of(tiny) as given, graphed_denoiser(tiny):
        for step in given[:3]:
            tiny.structure_head(*step)
        held = weakref.ref(given[0][2])
        del step
        given.clear()
        gc.collect()
        assert held() is None and recording.alive == 0


def hooked(model, monkeypatch):
    handle = model.structure_head.token_norm.register_forward_hook(lambda *_: None)
    return handle.remove


def waiting(model, monkeypatch):
    @contextmanager
    def rehearsal():
        yield
        raise WaitsForDeviceError

    monkeypatch.setattr(Recording, "rehearsal", staticmethod(rehearsal))


def failing(model, monkeypatch):
    def fail(self, call, device):
        raise RuntimeError("operation not permitted\nmore")

    monkeypatch.setattr(Recording, "__init__", fail)


def nested(model, monkeypatch):
    monkeypatch.setattr(Recording, "is_under_way", staticmethod(lambda: True))


def elsewhere(model, monkeypatch):
    monkeypatch.setattr(Recording, "device_type", "cuda")


def of_another_version(model, monkeypatch):
    forward = model.structure_head.forward
    monkeypatch.setattr(
        model.structure_head, "forward", lambda **named: forward(**named), raising=False
    )


REASONS = {
    hooked: "its modules have hooks, which a graph would not call",
    waiting: "it waits for the device within a step",
    failing: "it can't be captured (RuntimeError: operation not permitted)",
    nested: "another graph is being captured",
    elsewhere: "it runs on cpu",
    of_another_version: "it takes named where noisy_coords, noise_level, conditioning are known",
}


@pytest.mark.parametrize("spoil", REASONS, ids=lambda one: one.__name__)
def test_where_nothing_can_be_captured_the_models_own_forward_runs(
    tiny, recording, monkeypatch, spoil
):
    wanted, said = folded(tiny), []
    undo = spoil(tiny, monkeypatch)
    with graphed_denoiser(tiny, said.append) as denoiser:
        assert all(torch.equal(folded(tiny), wanted) for _ in range(2))
    if undo is not None:
        undo()
    assert said == [f"the denoiser runs without a CUDA graph: {REASONS[spoil]}"]
    assert (denoiser.captures, denoiser.replays, recording.alive) == (0, 0, 0)


def test_gradients_are_recorded_without_a_graph(tiny, recording):
    with steps_of(tiny) as given, pytest.warns(RuntimeWarning, match="gradients are recorded"):
        with torch.enable_grad(), graphed_denoiser(tiny):
            outs = [tiny.structure_head(*step) for step in given[:3]]
    assert all(out.requires_grad for out in outs)


def test_the_denoisers_own_forward_comes_back(tiny, recording, monkeypatch):
    with pytest.raises(ZeroDivisionError), graphed_denoiser(tiny):
        raise ZeroDivisionError
    assert "forward" not in vars(tiny.structure_head)
    own = tiny.structure_head.forward
    monkeypatch.setitem(vars(tiny.structure_head), "forward", own)
    with graphed_denoiser(tiny) as denoiser:
        assert tiny.structure_head.forward is denoiser
    assert vars(tiny.structure_head)["forward"] is own


def test_an_error_of_the_first_step_is_the_callers(tiny, recording, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setitem(vars(tiny.structure_head.token_norm), "forward", fail)
    with graphed_denoiser(tiny), pytest.raises(RuntimeError, match="shapes differ"):
        folded(tiny)


def test_folds_of_many_replay_but_for_what_they_are_compared_with(tiny, recording, tmp_path):
    root = write_kernel_repository(tmp_path, STOCK_LAYER)
    records = [SHORT, COMPLEX]
    plain = [*fold_records(tiny, records, SETTINGS, "ours", root)]
    assert all(outcome.replayed_steps is None for outcome in plain)
    for compared in (False, True):
        captured = []
        recording_init = Recording.__init__

        def init(self, call, device, init=recording_init, captured=captured):
            captured.append(1)
            init(self, call, device)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Recording, "__init__", init)
            outcomes = [
                *fold_records(tiny, records, SETTINGS, "ours", root, compared, cuda_graph=True)
            ]
        assert len(captured) == len(records)
        for outcome, before in zip(outcomes, plain, strict=True):
            assert outcome.summary()["replayed_steps"] == CALLS - 1
            assert outcome.warnings == ()
            assert torch.equal(outcome.fold.coords, before.fold.coords)


def test_folds_of_many_say_why_they_do_not_replay(tiny, recording, monkeypatch):
    failing(tiny, monkeypatch)
    (outcome,) = fold_records(tiny, [SHORT], SETTINGS, "off", cuda_graph=True)
    assert outcome.replayed_steps == 0
    assert outcome.warnings == (f"the denoiser runs without a CUDA graph: {REASONS[failing]}",)


@pytest.fixture
def asked(monkeypatch):
    """What is asked of torch.cuda, in order; nothing of it needs a GPU."""
    asked, cuda = [], torch.cuda

    class Graph:
        def reset(self):
            asked.append("reset")

        def replay(self):
            asked.append("replay")

    class Generator:
        def clone_state(self):
            return "state"

        def graphsafe_set_state(self, state):
            asked.append(state)

    @contextmanager
    def graph(graph, stream, capture_error_mode):
        asked.append((stream, capture_error_mode, torch.is_autocast_cache_enabled()))
        yield
        asked.append("captured")

    subject._stream.cache_clear()
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "default_generators", [Generator()])
    monkeypatch.setattr(cuda, "graph", graph)
    monkeypatch.setattr(cuda, "device", nullcontext)
    monkeypatch.setattr(cuda, "stream", nullcontext)
    monkeypatch.setattr(cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(cuda, "empty_cache", lambda: asked.append("emptied"))
    monkeypatch.setattr(cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(cuda, "set_sync_debug_mode", asked.append)
    yield asked
    subject._stream.cache_clear()


def test_what_a_cuda_graph_asks_of_torch(asked):
    device = torch.device("cuda", 0)
    begun = ("a stream of cuda:0", "thread_local", False)
    graph = subject.CudaGraph(lambda: torch.ones(3), device)
    assert torch.equal(graph.output, torch.ones(3))
    graph.replay()
    graph.release()
    assert graph.output is None
    assert asked == [begun, "captured", "replay", "reset", "emptied"]
    asked.clear()
    with pytest.raises(ZeroDivisionError):
        subject.CudaGraph(lambda: 1 / 0, device)
    assert asked == [begun, "state"]
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize(
    ("words", "raised"),
    [("called a synchronizing CUDA operation", WaitsForDeviceError), ("other", RuntimeError)],
)
def test_a_rehearsal_forbids_waiting_for_the_device(asked, words, raised):
    with pytest.raises(raised), subject.CudaGraph.rehearsal():
        assert asked == ["error"]
        raise RuntimeError(words)
    assert asked == ["error", 0]


on_gpu = pytest.mark.skipif(not HAS_GPU, reason="CUDA graphs need a GPU")


@pytest.fixture(scope="module")
def on_device():
    return random_model(torch.device("cuda"), torch.bfloat16, 0, tiny_config())


@pytest.fixture
def equal_bits():
    """Sums over a token's atoms in a fixed order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@on_gpu
@pytest.mark.kernels_ci
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("ours", [False, True])
def test_a_cuda_graph_gives_equal_bits(kernel, on_device, equal_bits, ours):
    with kernel.patch(on_device) if ours else nullcontext():
        wanted = [folded(on_device, record) for record in (SHORT, COMPLEX)]
        assert torch.equal(wanted[0], folded(on_device))
        said = []
        with graphed_denoiser(on_device, said.append) as denoiser:
            got = [folded(on_device, record) for record in (SHORT, COMPLEX)]
    assert said == []
    assert (denoiser.captures, denoiser.replays) == (2, 2 * (CALLS - 1))
    assert all(map(torch.equal, got, wanted))


@on_gpu
@pytest.mark.kernels_ci
def test_a_cuda_graphs_memory_is_given_back(on_device):
    def reserved():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    with graphed_denoiser(on_device) as denoiser:
        folded(on_device)  # cuBLAS makes its workspaces
        before = reserved()
        for length in (12, 40, 90):
            folded(on_device, Record("longer", "M" * length))
        assert denoiser.captures == 4
        assert reserved() <= before


@on_gpu
@pytest.mark.kernels_ci
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("fault", ["waits", "raises"])
def test_after_a_step_that_cant_be_captured_a_fold_goes_on(
    on_device, equal_bits, monkeypatch, fault
):
    wanted, said, norm = folded(on_device), [], on_device.structure_head.token_norm
    own = norm.forward

    def forward(x):
        if fault == "waits":
            x.sum().item()
        elif torch.cuda.is_current_stream_capturing():
            raise ValueError("not here")
        return own(x)

    monkeypatch.setattr(norm, "forward", forward)
    with graphed_denoiser(on_device, said.append) as denoiser:
        assert torch.equal(folded(on_device), wanted)
    assert denoiser.replays == 0
    words = {"waits": REASONS[waiting], "raises": "it can't be captured (ValueError: not here)"}
    assert said == [f"the denoiser runs without a CUDA graph: {words[fault]}"]
    monkeypatch.undo()
    with graphed_denoiser(on_device) as denoiser:
        assert torch.equal(folded(on_device), wanted)
    assert denoiser.replays == CALLS - 1


@on_gpu
@pytest.mark.kernels_ci
def test_a_capture_that_is_spoilt_costs_its_fold_nothing():
    # In a process of its own: what the allocator keeps of such a capture stays until it ends.
    said = python_output("""
        import torch
        from esmfold2_trimul_tools.folding.denoiser import graphed_denoiser
        from esmfold2_trimul_tools.folding.fold import Settings, fold
        from esmfold2_trimul_tools.folding.model import random_model
        from folding import SHORT, tiny_config

        torch.use_deterministic_algorithms(True, warn_only=True)
        model = random_model(torch.device("cuda"), torch.bfloat16, 0, tiny_config())
        norm = model.structure_head.token_norm
        own = norm.forward

        def forward(x):
            if torch.cuda.is_current_stream_capturing():
                x.sum().item()
            return own(x)

        norm.forward = forward
        wanted = fold(model, SHORT, Settings(0, 2, 8)).coords
        with graphed_denoiser(model, print) as denoiser:
            for _ in range(2):
                assert torch.equal(fold(model, SHORT, Settings(0, 2, 8)).coords, wanted)
        assert denoiser.replays == 0
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        """)
    assert said.startswith("the denoiser runs without a CUDA graph: it can't be captured (")
