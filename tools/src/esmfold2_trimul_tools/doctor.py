"""A diagnosis of this machine: versions, paths, and each problem with its mend."""

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any, Literal

from . import triton_cache
from .libraries import how_to_get, missing
from .repository import find_root, is_checkout, load_kernel, remake

Status = Literal["ok", "note", "warning", "problem"]

_LAUNCHER_FROM_TRITON = (3, 8)  # from here on Triton launches without building a C stub first
_TRITON_DISTRIBUTION = "triton-windows" if sys.platform == "win32" else "triton"
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_TRANSFORMERS_MEND = 'pip install "transformers[kernels]>=5.18"'


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    status: "ok", "note" (worth knowing), "warning" (folding works, but not as well as it could) or
    "problem" (folding with the kernel can't work). mend: what to do about it, empty if nothing.
    """

    name: str
    status: Status
    value: str
    mend: str = ""

    def summary(self) -> dict[str, str]:
        """The finding in the JSON output."""
        return asdict(self)


def examine(kernel_root: str | Path | None = None) -> list[Finding]:
    """Every finding about this machine and the kernel repository that the tools belong to."""
    gpu = _gpu()
    return [
        Finding("Python", "ok", platform.python_version()),
        *_torch_and_device(gpu),
        *_many_devices(gpu),
        *_triton(gpu),
        *_triton_cache(gpu),
        *_numpy(),
        *_swapping(),
        *_kernel_and_paths(kernel_root, gpu),
        *_recipes(kernel_root, gpu),
        *_launcher(gpu),
        *_weights(),
    ]


def can_fold(findings: list[Finding]) -> bool:
    """Whether folding with the kernel can work: no finding is a problem."""
    return all(finding.status != "problem" for finding in findings)


def _torch_and_device(gpu: str | None) -> Iterator[Finding]:
    found = _version("torch")
    if found is None:
        yield Finding("PyTorch", "problem", "not installed", "pip install torch")
        return
    yield Finding("PyTorch", "ok", found)
    if gpu is not None:
        yield Finding("Device", "ok", _gpu_description(gpu))
    elif _nvidia_driver_present():
        yield Finding(
            "Device",
            "warning",
            f"the CPU: there is an NVIDIA driver, but torch {found} sees no GPU",
            "install a CUDA build of torch that the driver supports",
        )
    else:
        yield Finding("Device", "ok", f"the CPU, {os.cpu_count()} cores; no GPU that torch sees")


def _many_devices(gpu: str | None) -> Iterator[Finding]:
    """Whether a pair tensor can lie on several GPUs here, and what carries the messages."""
    if _version("torch") is None:
        return
    count = _device_count(gpu)
    if gpu != "cuda" or count < 2:
        gloo = "is" if _gloo_available() else "is not"
        device = "the CPU" if gpu is None else f"{count} {gpu} device"
        device += "s" if count > 1 else ""
        yield Finding("Many GPUs", "ok", f"{device}; gloo {gloo} there for ranks on CPUs")
        return
    access = _peer_access(count)
    lacking = not all(map(all, access))
    yield Finding(
        "Peer access",
        "warning" if lacking else "ok",
        f"of {count} GPUs, row by column:\n{_matrix(access)}",
        "messages go through the host where it is missing; nvidia-smi topo -p2p r says why"
        if lacking
        else "",
    )
    nccl = _nccl_version()
    if nccl is None:
        mend = "a torch that has NCCL"
        yield Finding("NCCL", "warning", "not in this torch: GPUs can't be ranks", mend)
        return
    yield Finding("NCCL", "ok", nccl)
    size, found = _links(count)
    what = f"{size >> 20} MiB from each of {count} GPUs to each other"
    if found.rate is None:
        mend = "NCCL_DEBUG=INFO with `esmfold2-trimul bench --nproc 2` says more"
        yield Finding("All-to-all", "warning", f"{what}: {found.fault}", mend)
    else:
        value = f"{found.rate / 1e9:.3g} GB/s in each direction of a GPU, {what}"
        yield Finding("All-to-all", "ok", value)
    if found.symmetric_fault:
        yield Finding("Symmetric memory", "note", f"not to be had: {found.symmetric_fault}")
    else:
        yield Finding("Symmetric memory", "ok", "every GPU writes into the next one's")


def _matrix(access: list[list[bool]]) -> str:
    """For example "0 1" above "- y" and "y -"."""
    rows = [
        " ".join("-" if at == of else "y" if can else "n" for of, can in enumerate(row))
        for at, row in enumerate(access)
    ]
    return "\n".join(rows)


def _triton(gpu: str | None) -> Iterator[Finding]:
    found, why = _triton_version()
    status = "note" if gpu is None else "warning"
    if why:
        mend = f"reinstall {_triton_distribution()}"
        yield Finding("Triton", status, f"can't be imported ({why}): the ATen path computes", mend)
    elif found is None:
        mend = "" if gpu is None else f"pip install {_TRITON_DISTRIBUTION}"
        yield Finding("Triton", status, "not installed: the ATen path computes", mend)
    elif _numbers(found) < (3, 6):
        distribution = _triton_distribution()
        mend = f'pip install "{distribution}>=3.6"'
        if distribution not in ("triton", "triton-windows"):  # a part of one release of torch
            mend = f"a newer torch, which brings a newer {distribution}"
        yield Finding("Triton", "warning", f"{found}: the kernels need 3.6", mend)
    else:
        yield Finding("Triton", "ok", f"{found}, from {_triton_distribution()}")


def _triton_cache(gpu: str | None) -> Iterator[Finding]:
    folder = triton_cache.cache_folder()
    if folder is None:
        return
    fault = triton_cache.cache_fault(folder)
    if not fault:
        yield Finding("Triton's cache", "ok", str(folder))
    elif gpu is not None:
        yield Finding("Triton's cache", "problem", f"{folder} {fault}", triton_cache.MEND)
    else:
        value = f"{folder} {fault}; needed only where kernels are compiled"
        yield Finding("Triton's cache", "note", value, triton_cache.MEND)


def _numpy() -> Iterator[Finding]:
    found, (triton, _) = _version("numpy"), _triton_version()
    if found is None:
        yield Finding("NumPy", "problem", "not installed", "pip install numpy")
    elif _numbers(found) >= (2, 4) and triton and _numbers(triton) == (3, 6):
        yield Finding(
            "NumPy",
            "warning",
            f"{found}: Triton 3.6's interpreter, which the tests use, fails from NumPy 2.4 on",
            'pip install "numpy<2.4", or a newer Triton',
        )
    else:
        yield Finding("NumPy", "ok", found)


def _swapping() -> Iterator[Finding]:
    found, kernels = _version("transformers"), _version("kernels")
    if problem := _esmfold2_problem():
        yield Finding("ESMFold2", "problem", f"transformers: {found or 'not installed'}", problem)
        return
    yield Finding("ESMFold2", "ok", f"of transformers {found}")
    if absent := missing("gemmi", "matplotlib", "dash_molstar"):
        status = "problem" if "gemmi" in absent else "warning"
        yield Finding("Files of a fold", status, f"no {', '.join(absent)}", how_to_get(*absent))
    versions = f"transformers {found}, kernels {kernels}"
    if problem := _swap_problem():
        value = f"{versions}: only transformers' own ways need a pair that fits"
        yield Finding("Swapping layers", "note", value, problem)
    else:
        yield Finding("Swapping layers", "ok", f"{versions}: a pair that fits")


def _recipes(kernel_root: str | Path | None, gpu: str | None) -> Iterator[Finding]:
    """Which of the ways of docs/use.md put the kernel into transformers' ESMFold2 here."""
    try:
        _load_kernel(kernel_root)
    except Exception:  # another finding
        return
    without_esmfold2 = bool(_esmfold2_problem())
    if without_esmfold2:
        why_not = "no ESMFold2 in transformers"
    elif _swap_problem():
        why_not = "transformers and kernels don't fit each other"
    elif gpu is None:
        why_not = "transformers takes kernels on a GPU alone"
    else:
        why_not = ""
    if without_esmfold2:
        yield Finding("patch(model)", "note", f"for other models: {why_not}")
    else:
        yield Finding("patch(model)", "ok", "works, with the Hub or without")
    if why_not:
        yield Finding("KernelConfig", "note", f"not here: {why_not}")
        yield Finding("use_kernels=True", "note", f"not here: {why_not}")
        return
    yield Finding("KernelConfig", "ok", "works, with the Hub or without")
    if not _has_local_kernel():
        yield Finding(
            "use_kernels=True", "note",
            "takes the published kernel, from the Hub: LOCAL_KERNELS names no other",
            "patch(model), or LOCAL_KERNELS: see docs/use.md",
        )  # fmt: skip
    elif not _hub_answers():
        yield Finding(
            "use_kernels=True", "note",
            "the Hub does not answer, which it asks for other kernels too: raises unless they are "
            "cached",
            "patch(model), or a KernelConfig: see docs/use.md",
        )  # fmt: skip
    else:
        yield Finding("use_kernels=True", "ok", "works, with the Hub")


def _kernel_and_paths(kernel_root: str | Path | None, gpu: str | None) -> Iterator[Finding]:
    try:
        root, kernel = _load_kernel(kernel_root)
    except Exception as error:  # whatever a missing library or a broken build raises
        text = str(error).strip() or type(error).__name__
        mend = "esmfold2-trimul build, or install the tools again"
        yield Finding("Kernel build", "problem", text.splitlines()[0], mend)
        return
    checkout = is_checkout(root)
    yield Finding("Kernel", "ok", f"of the checkout {root}" if checkout else f"installed, {root}")
    if _version("kernels") is None:
        value = "not checked: that needs the kernels library"
        yield Finding("Kernel build", "note", value, how_to_get("kernels"))
    elif stale := _build_problems(root):
        more = f", and {len(stale) - 1} more" if len(stale) > 1 else ""
        yield Finding("Kernel build", "warning", f"{stale[0]}{more}", remake(root))
    else:
        same = "in line with its sources, and " if checkout else ""
        yield Finding("Kernel build", "ok", f"{same}its digest holds")
    import torch

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = _explain_call(kernel, torch.device(gpu or "cpu"), dtype)
        # An accelerator that does not take Triton still folds, only slowly.
        status = "warning" if gpu is not None and found.path != "triton" else "ok"
        name = str(dtype).removeprefix("torch.")
        memory = f"{found.peak:.2f} pair tensors at once"
        yield Finding(f"Path in {name}", status, f"{found.path}: {found.reason}; {memory}")


def _explain_call(kernel: Any, device: Any, dtype: Any) -> Any:
    """Findings on a call of a trunk's width."""
    import torch

    length, channels = 128, 256
    x = torch.empty(1, length, length, channels, dtype=dtype, device=device)
    bundle = torch.empty(4 * channels, channels, dtype=dtype, device=device)
    square = torch.empty(channels, channels, dtype=dtype, device=device)
    halves = dict(zip(("p_in_weight", "g_in_weight"), bundle.chunk(2), strict=True))
    return kernel.explain(
        kernel.triangle_multiplicative_update, x, **halves, p_out_weight=square,
        g_out_weight=square,
    )  # fmt: skip


def _launcher(gpu: str | None) -> Iterator[Finding]:
    """What Triton needs to build its C launcher on the first launch on a GPU."""
    triton, _ = _triton_version()
    if triton is None:
        return
    if _numbers(triton) >= _LAUNCHER_FROM_TRITON:
        yield Finding("Triton's launcher", "ok", f"Triton {triton} needs no C compiler")
        return
    needed = gpu is not None
    parts = [
        ("C compiler", _c_compiler(), "install gcc or clang, or name one in CC"),
        (
            "Python headers",
            _python_header(),
            "install the headers of this Python (python3-dev or python3-devel)",
        ),
    ]
    if gpu is None or gpu.startswith("cuda"):
        parts.append(("CUDA headers", _cuda_header(), "reinstall triton: its wheel brings cuda.h"))
    for name, found, mend in parts:
        if found is not None:
            yield Finding(name, "ok", found)
        elif needed:
            yield Finding(name, "problem", "not found: Triton can't build its launcher", mend)
        else:
            yield Finding(name, "note", "not found; needed only where a GPU runs the kernels", mend)


def _weights() -> Iterator[Finding]:
    from .folding.model import HUB_MODEL

    if _weights_cached(HUB_MODEL):
        yield Finding("Model weights", "ok", f"{HUB_MODEL} is in the local cache")
    else:
        yield Finding(
            "Model weights",
            "note",
            f"{HUB_MODEL} is not in the local cache: fold would download it",
            "use --random-weights to try the machinery without it",
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(found: str) -> tuple[int, ...]:
    """The first two: (3, 9) of "3.9.0", of "3.9rc1" and of "3.9.0+git1a2b"."""
    return tuple(int(number) for number in re.findall(r"\d+", found)[:2])


def _triton_version() -> tuple[str | None, str]:
    """Triton's version, or None; and why it can't be imported, empty where it can or isn't there.

    The module is asked: triton-windows, pytorch-triton, pytorch-triton-rocm, triton-rocm and
    triton-xpu are distributions of it too.
    """
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # a folder of that name is no Triton
        return None, ""
    try:
        return importlib.import_module("triton").__version__, ""
    except Exception as error:  # whatever a broken installation raises
        return None, (str(error).strip() or type(error).__name__).splitlines()[0]


def _triton_distribution() -> str:
    """The name of the distribution that Triton is of, for pip."""
    return next(iter(packages_distributions().get("triton", ())), _TRITON_DISTRIBUTION)


def _gpu() -> str | None:
    """The accelerator that a fold would take, "cuda" or "xpu"; None for the CPU."""
    if importlib.util.find_spec("torch") is None:
        return None
    from .folding.model import resolve_device

    kind = resolve_device(None).type
    return None if kind == "cpu" else kind


def _gpu_description(gpu: str) -> str:
    import torch

    backend = getattr(torch, gpu)
    properties = backend.get_device_properties(0)
    text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if gpu == "cuda" and torch.version.hip is None:
        text += f", compute capability {properties.major}.{properties.minor}"
    return text


def _device_count(gpu: str | None) -> int:
    import torch

    return 0 if gpu is None else getattr(torch, gpu).device_count()


def _gloo_available() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_gloo_available()


def _nccl_version() -> str | None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _peer_access(count: int) -> list[list[bool]]:
    """Whether a GPU can read and write another's memory, by the numbers of both."""
    import torch

    can = torch.cuda.can_device_access_peer
    return [[one == other or can(one, other) for other in range(count)] for one in range(count)]


def _links(count: int) -> tuple[int, Any]:
    """The size of a message, and what was measured with such ones."""
    from .links import MESSAGE_BYTES, measure

    return MESSAGE_BYTES["cuda"], measure("cuda", count)


def _nvidia_driver_present() -> bool:
    return _NVIDIA_DRIVER.exists()


def _swap_problem() -> str:
    """Why no layer can be swapped, with the mend; empty if layers can."""
    if importlib.util.find_spec("transformers") is None:
        return f"transformers is not installed; {_TRANSFORMERS_MEND}"
    from .errors import UserError
    from .folding.model import check_swappable

    try:
        check_swappable()
    except UserError as error:
        return str(error)
    return ""


def _esmfold2_problem() -> str:
    """Why there is no ESMFold2 that `patch` could change; empty if there is."""
    if importlib.util.find_spec("transformers") is None:
        return how_to_get("transformers")
    from .errors import UserError
    from .folding.model import esmfold2_model_class

    try:
        esmfold2_model_class()
    except UserError as error:
        return str(error)
    return ""


def _has_local_kernel() -> bool:
    """Whether LOCAL_KERNELS has a path for the name that transformers asks for."""
    from .folding.model import has_local_kernel

    return has_local_kernel()


def _hub_answers() -> bool:
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import constants

    from .folding.model import hub_answers

    return not constants.HF_HUB_OFFLINE and hub_answers()


def _load_kernel(kernel_root: str | Path | None) -> tuple[Path, Any]:
    root = find_root(kernel_root)
    return root, load_kernel(root)


def _build_problems(root: Path) -> list[str]:
    from .build import check_variant

    return check_variant(root)


def _c_compiler() -> str | None:
    """The compiler that Triton would call: $CC, else triton-windows' own, else gcc, else clang."""
    named = os.environ.get("CC")
    if named:
        return shutil.which(named)
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        brought = Path(triton.origin).parent / "runtime" / "tcc" / "tcc.exe"
        if brought.is_file():
            return str(brought)
    return shutil.which("gcc") or shutil.which("clang")


def _python_header() -> str | None:
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return str(header) if header.is_file() else None


def _cuda_header() -> str | None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    header = Path(triton.origin).parent / "backends" / "nvidia" / "include" / "cuda.h"
    return "cuda.h, from Triton's wheel" if header.is_file() else None


def _weights_cached(model: str) -> bool:
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)
