"""Loads the package as users do, and puts its kernels where the machine allows.

With a GPU the kernels run on it. Without one they run in Triton's interpreter, as `interpreter`
repairs it. TRITON_INTERPRET is for Triton's import, so it is set before anything imports it; tests
of ahead-of-time compilation run in processes of their own.
"""

import faulthandler
import gc
import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from fresh_process import HUNG_SECONDS
from helpers import SEED

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
# A process that imports the variant must not leave byte code in a folder that has a digest.
sys.dont_write_bytecode = True
HAS_GPU = torch.cuda.is_available()
# Threads that wait for each other, or for another process, take longer than small tensors do. With
# a GPU float64 references are larger, and each test process has its share of the cores.
_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
_SHARE = max(1, torch.get_num_threads() // _PROCESSES) if HAS_GPU else 1
_THREADS = int(os.environ.get("TRIMUL_TEST_THREADS", 1))
torch.set_num_threads(max(_THREADS, _SHARE))
os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of the processes that tests start
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: quick checks of the kernels, for GPU machines")
    # Only one of several test processes reports; on a terminal pytest shows its progress anyway.
    if not hasattr(config, "workerinput") and not sys.stdout.isatty():
        config.pluginmanager.register(LineAMinute(config))


class LineAMinute:
    """Reports progress once a minute, so that nobody takes a long run for one that hangs."""

    def __init__(self, config):
        self._config, self._tests, self._done, self._failed = config, 0, 0, 0
        self._start, self._minutes = time.monotonic(), 0

    def pytest_collection_finish(self, session):
        self._tests = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self._tests = len(ids)

    def pytest_runtest_logreport(self, report):
        self._done += report.when == "teardown"
        self._failed += report.failed
        minutes = int((time.monotonic() - self._start) / 60)
        if minutes > self._minutes:
            self._minutes = minutes
            self._config.pluginmanager.get_plugin("terminalreporter").write(
                f"\n{minutes} min: {self._done} of {self._tests} tests done, "
                f"{self._failed} failed\n"
            )


def _load_variant():
    """build/torch-universal through the kernels library, or by a plain import without it."""
    try:
        from kernels import get_local_kernel
    except ImportError:
        path = ROOT / "build" / "torch-universal" / "__init__.py"
        spec = importlib.util.spec_from_file_location("esmfold2_trimul_kernel_under_test", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    return get_local_kernel(ROOT)


@pytest.fixture(scope="session")
def kernel():
    """The package under test. CPU tensors take the ATen path unless `on_triton` is asked for."""
    return _load_variant()


@pytest.fixture(scope="session")
def _interpreter():
    if not HAS_GPU:
        pytest.importorskip("triton")
        import interpreter

        interpreter.repair()
        interpreter.quicken()


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """What lives as long as the process is not looked through for garbage.

    To measure memory the tools collect garbage many times, which takes half a second each time
    among all the modules that tests import.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Random numbers drawn without a generator do not depend on the tests before.

    Without a GPU torch.manual_seed keeps a traceback of each of its calls, which takes 1 ms.
    """
    torch.default_generator.manual_seed(1000 * SEED + 999)
    if HAS_GPU:
        torch.cuda.manual_seed_all(1000 * SEED + 999)


@pytest.fixture(autouse=True)
def _aten_for_cpu_tensors(kernel, monkeypatch):
    entry = _submodule(kernel, "paths")
    monkeypatch.setattr(entry, "_INTERPRET", False)
    entry.execution_path.cache_clear()
    yield
    entry.execution_path.cache_clear()


@pytest.fixture
def on_triton(kernel, _interpreter, _aten_for_cpu_tensors, monkeypatch) -> str:
    """The device whose tensors the Triton kernels take: "cuda", or "cpu" in the interpreter."""
    if HAS_GPU:
        return "cuda"
    entry = _submodule(kernel, "paths")
    monkeypatch.setattr(entry, "_INTERPRET", True)
    entry.execution_path.cache_clear()
    return "cpu"


@pytest.fixture
def on_split(on_triton, submodule) -> str:
    """`on_triton` where float32 operands may be split; elsewhere the test is skipped."""
    device = submodule("triton_parts.device").device_target(torch.device(on_triton))
    if "split" not in submodule("triton_parts.settings").settings_of(*device[:2])["trimul_einsum"]:
        pytest.skip(f"{device.target} splits no operands")
    return on_triton


@pytest.fixture
def recorded(submodule, monkeypatch) -> list:
    """The stages launched, with the tensors of each."""
    launched, prepared_launch = [], submodule("triton_parts.launch").PreparedLaunch
    launch = prepared_launch.launch

    def record(prepared, **tensors):
        launched.append((prepared.stage, tensors))
        launch(prepared, **tensors)

    monkeypatch.setattr(prepared_launch, "launch", record)
    return launched


@pytest.fixture
def watched():
    """A barrier that nobody arrives at would wait for ever: the process ends then."""
    faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def one_thread():
    """For tensors that are small with a GPU too: one thread, or those asked for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def submodule(kernel):
    """submodule("aten_path.blocks"): a module of the package under test."""
    return lambda name: _submodule(kernel, name)


def _submodule(kernel, name):
    return importlib.import_module(f"{kernel.__name__}.{name}")


@pytest.fixture
def calls(kernel, submodule, monkeypatch):
    """What runs inside a pair layer: ("triangle" or "transition", whether in place)."""
    module, found = submodule("models.pair_layers"), []

    def counted(name, function):
        def run(*arguments, **named):
            found.append((name, named["inplace"]))
            return function(*arguments, **named)

        return run

    for name, function in (
        ("triangle", "triangle_multiplicative_update_with_residual"),
        ("transition", "swiglu_transition"),
    ):
        monkeypatch.setattr(module, function, counted(name, getattr(module, function)))
    return found


@pytest.fixture
def meta_call(submodule):
    """meta_call(channels, x): a call of bfloat16 on the meta device."""

    def make(channels, x):
        def meta(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        def norm():
            return meta(channels, dtype=torch.float32)

        square, bundle = meta(channels, channels), meta(4 * channels, channels)
        types = submodule("_call")
        weights = types.Weights(
            norm(), norm(), bundle[: 2 * channels], None, bundle[2 * channels :], None,
            norm(), norm(), square, None, square, None,
        )  # fmt: skip
        return types.Call(
            x=x, direction="outgoing", mask=None, residual=None, drop_mask=None, weights=weights,
            eps_in=1e-5, eps_out=1e-5, precision="fp32", memory="default", recompute="none",
            inplace=False, lengths=None,
        )  # fmt: skip

    return make
