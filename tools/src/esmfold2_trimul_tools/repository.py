"""Finds the kernel that these tools run, and loads it.

It is the build in a checkout of the kernel repository, or the package `esmfold2_trimul_kernel` that
a wheel of these tools installs: a copy of that build. A root is the folder of either.
"""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UserError

ROOT_VARIABLE = "ESMFOLD2_TRIMUL_ROOT"
VARIANT = Path("build", "torch-universal")
PACKAGE = "esmfold2_trimul_kernel"
_METADATA = "metadata.json"


def find_root(kernel_root: str | Path | None = None) -> Path:
    """The folder of the kernel: a checkout, which has `build.toml`, or the installed package.

    Args:
        kernel_root: the checkout that the user named with `--kernel-root`. The default is the
            environment variable `ESMFOLD2_TRIMUL_ROOT`, or else the checkout that this package was
            installed from (`pip install -e tools`), or else the package beside it.

    Raises:
        UserError: the folder that was named is not a kernel repository, or there is no kernel.
    """
    if kernel_root is not None:
        return _checked(Path(kernel_root), "--kernel-root")
    if named := os.environ.get(ROOT_VARIABLE):
        return _checked(Path(named), ROOT_VARIABLE)
    checkout = Path(__file__).resolve().parents[3]
    if is_checkout(checkout):
        return checkout
    package = Path(__file__).resolve().parents[1] / PACKAGE
    if not (package / _METADATA).is_file():
        raise UserError(
            f"the tools are installed without a kernel: there is no {package}. Install them again, "
            f"or pass --kernel-root or set {ROOT_VARIABLE} to a checkout of the kernel repository"
        )
    return package


def find_checkout(kernel_root: str | Path | None = None) -> Path:
    """As `find_root`, where only a checkout will do.

    Raises:
        UserError: there is none.
    """
    root = find_root(kernel_root)
    if not is_checkout(root):
        raise UserError(
            f"the kernel in {root} is installed, without its sources: "
            f"pass --kernel-root or set {ROOT_VARIABLE} to a checkout of the kernel repository"
        )
    return root


def is_checkout(root: Path) -> bool:
    """Whether the folder has the kernel's sources."""
    return (root / "build.toml").is_file() and (root / "torch-ext").is_dir()


def variant_of(root: Path) -> Path:
    """The folder of the built variant."""
    return root if (root / _METADATA).is_file() else root / VARIANT


def remake(root: Path) -> str:
    """How a build that can't be used is mended."""
    return "esmfold2-trimul build" if is_checkout(root) else "install esmfold2-trimul-tools again"


def load_kernel(root: Path) -> ModuleType:
    """The kernel package at `root`.

    A checkout's is loaded as the kernels library loads it, or without that library imported under
    the same name; the installed one is imported as users import it.

    Raises:
        UserError: the repository has no built variant.
    """
    name = built(root)["id"]
    if not is_checkout(root):
        return importlib.import_module(PACKAGE)
    # Resolved, because the library loads another copy for another spelling of the same path.
    root = root.resolve()
    try:
        from kernels import get_local_kernel
    except ImportError:
        return _import_variant(root / VARIANT, name)
    return get_local_kernel(root)


def built(root: Path) -> dict[str, Any]:
    """The metadata of the built variant at `root`: its name, version, id and so on.

    Raises:
        UserError: the repository has no built variant.
    """
    path = variant_of(root) / _METADATA
    if not path.is_file():
        raise UserError(f"{root} has no {VARIANT.as_posix()}: run `esmfold2-trimul build` first")
    return json.loads(path.read_text())


def _import_variant(folder: Path, name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def submodule(package: ModuleType, name: str) -> ModuleType:
    """A module of the kernel package."""
    return importlib.import_module(f"{package.__name__}.{name}")


def _checked(folder: Path, source: str) -> Path:
    if not is_checkout(folder):
        raise UserError(
            f"{source} must name the kernel repository, a folder with build.toml and torch-ext; "
            f"got {str(folder)!r}"
        )
    return folder.resolve()
