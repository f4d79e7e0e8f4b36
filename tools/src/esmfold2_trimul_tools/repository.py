"""Finds the kernel repository that these tools belong to, and loads the kernel from it."""

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


def find_root(kernel_root: str | Path | None = None) -> Path:
    """The folder with the kernel's `build.toml`.

    Args:
        kernel_root: the folder that the user named with `--kernel-root`. The default is the
            environment variable `ESMFOLD2_TRIMUL_ROOT`, or else the checkout that this package was
            installed from (`pip install -e tools`).

    Raises:
        UserError: the folder that was named, or the checkout, is not a kernel repository.
    """
    if kernel_root is not None:
        return _checked(Path(kernel_root), "--kernel-root")
    if named := os.environ.get(ROOT_VARIABLE):
        return _checked(Path(named), ROOT_VARIABLE)
    checkout = Path(__file__).resolve().parents[3]
    if not _is_kernel_root(checkout):
        raise UserError(
            "the tools are not installed from a checkout of the kernel repository: "
            f"pass --kernel-root or set {ROOT_VARIABLE} to the folder that holds build.toml"
        )
    return checkout


def load_kernel(root: Path) -> ModuleType:
    """The kernel package of the repository at `root`, loaded as the kernels library loads it.

    Without that library, the package is imported under the same name.

    Raises:
        UserError: the repository has no built variant.
    """
    name = built(root)["id"]
    # Resolved, because the library loads another copy for another spelling of the same path.
    root = root.resolve()
    try:
        from kernels import get_local_kernel
    except ImportError:
        return _import_variant(root / VARIANT, name)
    return get_local_kernel(root)


def built(root: Path) -> dict[str, Any]:
    """The metadata of the repository's built variant: its name, version, id and so on.

    Raises:
        UserError: the repository has no built variant.
    """
    path = root / VARIANT / "metadata.json"
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
    if not _is_kernel_root(folder):
        raise UserError(
            f"{source} must name the kernel repository, a folder with build.toml and torch-ext; "
            f"got {str(folder)!r}"
        )
    return folder.resolve()


def _is_kernel_root(folder: Path) -> bool:
    return (folder / "build.toml").is_file() and (folder / "torch-ext").is_dir()
