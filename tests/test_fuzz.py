"""Random calls of the three public functions, good and wrong ones: see docs/fuzzing.md.

FUZZ_CASES is the number of good calls, FUZZ_SEED draws other calls than the usual ones, and
FUZZ_SUMMARY names a file for the results.
"""

import collections
import dataclasses
import datetime
import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
import hypothesis  # noqa: E402
from esmfold2_trimul_tools.documents import write_document  # noqa: E402
from esmfold2_trimul_tools.environment import checkout_commit, cpu_name  # noqa: E402
from fuzzing import (  # noqa: E402
    ATEN,
    GPU,
    GRADIENTS,
    INTERPRETER,
    NORMS,
    TRANSITION,
    UPDATE,
    WITH_RESIDUAL,
    Call,
    Case,
    Exact,
    Oracle,
    TransitionCase,
    calls,
    formula,
    gradients,
    lecun,
    make,
    oracle,
    ratio,
    share_of_rounding,
)
from helpers import DTYPES  # noqa: E402
from helpers import SEED as TEST_SEED  # noqa: E402
from hypothesis import HealthCheck, Phase  # noqa: E402
from torch import Tensor  # noqa: E402
from transitions import PATHS  # noqa: E402
from wrong_calls import (  # noqa: E402
    WrongCall,
    arguments_of,
    optional_of,
    table_of,
    wrong_calls,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
CASES = int(os.environ.get("FUZZ_CASES", 300))
SEED = os.environ.get("FUZZ_SEED") or TEST_SEED or None
# The number of good calls: an interpreted call takes as long as ten others. Wrong calls are extra.
SHARES = {"aten": 0.85, "triton": 0.15, "wrong": 1.0}
PLAIN = Case(
    UPDATE, torch.float32, (1,), 8, 8, 8, "outgoing", "plain",
    vectors={}, made=(), bundled=False, scales={}, mask=None, residual=None,
    drop_mask=None, lengths=None, eps=1e-5, eps_out=None, precision=None, memory="auto",
    recompute="none", inplace=False, needs_grad=(), layouts={}, seed=0,
)  # fmt: skip


def fuzz(share: str, calls: hypothesis.strategies.SearchStrategy):
    """A test of this many calls."""

    def decorate(test):
        test = hypothesis.settings(
            max_examples=max(1, round(SHARES[share] * CASES)),
            derandomize=SEED is None,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),  # fixtures change nothing between calls
        )(hypothesis.given(calls)(test))
        return test if SEED is None else hypothesis.seed(int(SEED))(test)

    return decorate


class Record:
    """The results of the calls so far."""

    def __init__(self, commit: str | None) -> None:
        self.commit = commit
        self.started = time.monotonic()
        self.devices = {"aten": cpu_name()}
        self.counts = collections.defaultdict(collections.Counter)
        self.worst = collections.defaultdict(dict)

    def passed(
        self,
        path: str,
        case: Case | TransitionCase,
        ratios: dict[str, float],
        remarks: list[str],
    ) -> None:
        dtype = str(case.dtype).removeprefix("torch.")
        self.counts[path].update(["calls", dtype, case.function, *remarks])
        for name, value in ratios.items():
            kind = f"{dtype}, {'output' if name == 'output' else 'gradients'}"
            if case.function == TRANSITION:
                kind += " of transitions"
            if value >= self.worst[path].get(kind, {"ratio": 0.0})["ratio"]:
                self.worst[path][kind] = {"ratio": round(value, 3), "of": name, "case": repr(case)}

    def summary(self) -> dict:
        packages = ("torch", "triton", "numpy", "hypothesis")
        return {
            "cases": CASES,
            "seed": SEED,
            "passed": self.counts,
            "worst": self.worst,
            "seconds": round(time.monotonic() - self.started),
            "devices": self.devices,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()}
            | {name: metadata.version(name) for name in packages},
            "commit": self.commit,
            "date": datetime.date.today().isoformat(),
        }


@pytest.fixture(scope="module")
def record(one_thread):
    found = Record(checkout_commit(ROOT))
    yield found
    if path := os.environ.get("FUZZ_SUMMARY"):
        write_document(found.summary(), Path(path))


@fuzz("aten", calls(ATEN))
def test_aten(kernel, record, case):
    check(kernel, record, "aten", "cpu", case)


@fuzz("triton", calls(GPU if torch.cuda.is_available() else INTERPRETER, "triton" in PATHS))
def test_triton(kernel, record, on_triton, case):
    on_gpu = on_triton == "cuda"
    record.devices["triton"] = torch.cuda.get_device_name() if on_gpu else "Triton's interpreter"
    check(kernel, record, "triton", on_triton, case)


@fuzz("wrong", wrong_calls())
def test_wrong_arguments(kernel, record, call):
    error = assert_refused(kernel, call)
    record.counts["wrong arguments"].update(["calls", type(error).__name__])


@pytest.mark.parametrize("function", [UPDATE, WITH_RESIDUAL, TRANSITION])
def test_each_wrong_argument_alone(kernel, function):
    for key in table_of(function):
        for given in ((), optional_of(function)):
            assert_refused(kernel, WrongCall(function, torch.float32, given, False, (key,)))


def assert_refused(kernel, call: WrongCall) -> Exception:
    """A wrong call raises a documented error about one of its wrong arguments."""
    arguments, named = arguments_of(call)
    error = error_of(getattr(kernel, call.function), arguments)
    message = str(error)
    assert isinstance(error, (ValueError, TypeError, NotImplementedError)), (call, error)
    assert any(re.search(rf"\b{name}\b", message) for name in named), (call, message)
    assert message.split()[0] in arguments and "got " in message, (call, message)
    return error


def error_of(function, arguments: dict) -> Exception | None:
    try:
        function(**arguments)
    except Exception as error:
        return error
    return None


def check(
    kernel, record: Record, path: str, device: str, case: Case | TransitionCase
) -> None:
    """The call gives what the formula gives, and writes to nothing else."""
    call = make(case, device, lecun)
    found = oracle(case, call.values, path == "triton", device != "cpu")
    function = getattr(kernel, case.function)
    leaves = [call.tensors[name].requires_grad_() for name in case.needs_grad]
    before = {name: bits(buffer) for name, buffer in call.buffers.items()}
    out = function(**call.arguments | ({} if case.function == UPDATE else {"inplace": False}))
    ratios = check_output(case, call, found, out)
    remarks = [] if case.function == TRANSITION else [f"memory={case.memory}"]
    if leaves:
        remarks.append("with gradients")
        ratios |= check_gradients(case, found, out, leaves)
    for name, value in ratios.items():
        assert value <= 1, f"the error of {name} is {value:.3g} times what is allowed"
    after = {name: bits(buffer) for name, buffer in call.buffers.items()}
    changed = [name for name, some in after.items() if not torch.equal(some, before[name])]
    assert not changed, f"{changed} were written to"
    if case.inplace:
        remarks.append("in place")
        check_inplace(function, call, out.clone(), found.overflows)
    if found.overflows:
        remarks.append("beyond float16")
    if not found.well.all():
        remarks.append("with pairs that have no digits to compare")
    record.passed(path, case, ratios, remarks)


def bits(buffer: Tensor) -> Tensor:
    return buffer.detach().clone().view(torch.uint8)


def check_output(
    case: Case | TransitionCase, call: Call, found: Oracle, out: Tensor
) -> dict[str, float]:
    """The output's error in units of the allowed error, if there is one."""
    assert out.shape == found.out.shape and out.dtype == case.dtype and out.is_contiguous()
    assert out.requires_grad == bool(case.needs_grad)
    assert out.device == call.tensors["x"].device
    memories = [buffer.untyped_storage().data_ptr() for buffer in call.buffers.values()]
    assert not out.numel() or out.untyped_storage().data_ptr() not in memories
    if found.overflows:
        return {}
    got = out.detach().cpu().double()
    assert got.isfinite().all()
    if case.lengths is not None:
        padding = torch.where(found.padding, found.out, 0.0)
        assert torch.equal(torch.where(found.padding, got, 0.0), padding)
    for name in found.as_rounded:
        share = share_of_rounding(got, found, name)
        assert share < 0.5, f"{name} is rounded to {case.dtype}: {share:.2f} of what that does"
    compared = (torch.where(found.well, some, 0.0) for some in (got, found.out, *found.drawn))
    got, wanted, *drawn = compared
    return {"output": ratio(got, wanted, drawn, found.budget)}


def check_gradients(
    case: Case | TransitionCase, found: Oracle, out: Tensor, leaves: list[Tensor]
) -> dict[str, float]:
    """The gradients' errors in units of the allowed error."""
    generator = torch.Generator().manual_seed(case.seed)
    grad_out = torch.randn(out.shape, generator=generator).to(case.dtype)
    grad_out = torch.where(found.well, grad_out, 0.0)
    got = torch.autograd.grad(out, leaves, grad_out.to(out.device))
    wanted, drawn = gradients(case, found, grad_out.double(), [leaf.dtype for leaf in leaves])
    for gradient, leaf in zip(got, leaves, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
    if found.overflows:
        return {}
    ratios = {}
    for index, name in enumerate(case.needs_grad):
        some = [grads[index] for grads in drawn]
        ratios[name] = ratio(got[index], wanted[index], some, GRADIENTS * found.budget)
    return ratios


def check_inplace(function, call: Call, wanted: Tensor, overflows: bool) -> None:
    """The same bits, in the residual's place, and nothing written beside it."""
    residual = call.arguments["residual"]
    around = {name: buffer.clone() for name, buffer in call.buffers.items()}
    name = "x" if residual is call.tensors["x"] else "residual"
    out = function(**call.arguments)
    assert out is residual
    if not overflows:
        assert torch.equal(out, wanted)
    start = residual.storage_offset()
    around[name][start : start + residual.numel()] = out.flatten()
    for name, buffer in call.buffers.items():
        assert torch.equal(bits(buffer), bits(around[name])), f"{name} was written to"


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_errors_are_of_the_size_of_plain_pytorchs(dtype):
    """The allowed error is measured with them, so they must not be larger than real errors."""
    case = dataclasses.replace(PLAIN, dtype=dtype, length=20, channels=32, hidden=32)
    call = make(case, "cpu", lecun)
    found = oracle(case, call.values, on_triton=False, on_gpu=False)
    given = {name: tensor.detach() for name, tensor in call.tensors.items()}
    plain, _ = formula(case, given, Exact(), Exact())
    assert plain.dtype == dtype
    error, drawn = (float((some.double() - found.out).norm()) for some in (plain, found.drawn[0]))
    most = 2 if dtype != torch.float32 else 6  # where sums of other orders have other errors
    assert 0.7 * error < drawn < most * error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["aten", "triton"])
def test_norm_weights_are_used_as_they_are(kernel, request, path, dtype):
    """In 16 bits their rounding is lost among others, but for its direction."""
    device = request.getfixturevalue("on_triton") if path == "triton" else "cpu"
    vectors = dict.fromkeys(NORMS, torch.float32)
    case = dataclasses.replace(
        PLAIN, dtype=dtype, length=24, channels=32, hidden=16, vectors=vectors
    )
    call = make(case, device, lecun)
    found = oracle(case, call.values, path == "triton", device != "cpu")
    function = getattr(kernel, case.function)
    out = function(**call.arguments).cpu().double()
    for name in ("norm_in_weight", "norm_out_weight"):
        assert share_of_rounding(out, found, name) < 0.5, name
        rounded = call.arguments | {name: call.arguments[name].to(dtype)}
        off = function(**rounded).cpu().double()
        assert share_of_rounding(off, found, name) > 0.5, name
