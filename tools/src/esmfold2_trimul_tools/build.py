"""Makes `build/torch-universal`, the folder that the kernels library loads, from `torch-ext/`.

kernel-builder makes such a folder too, but it needs Nix. This needs only Python, and gives the same
bytes for the same sources, so that the folder can be checked in and compared with them. It has

- the package's files of the kinds that `pyext` in `build.toml` lists, flat;
- `_ops.py`, the namespace of this build's torch ops;
- a folder of the package's name that exports the same symbols, for older kernels libraries;
- `metadata.json`: the kernel's entries of `build.toml`, the build's id, a digest of the files.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels._rust import (
    Build,
    Digest,
    DigestAlgorithm,
    DigestValidationError,
    KernelName,
    Metadata,
)

from .errors import UserError
from .repository import VARIANT, variant_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METADATA = "metadata.json"
OPS_MODULE = "_ops.py"
DEFAULT_EXTENSIONS = ("py", "pyi")  # kernel-builder's, where build.toml has no pyext

OPS_SOURCE = '''\
"""The namespace of this build's torch ops. Written by `esmfold2-trimul build`."""

import torch

_NAMESPACE = "{build_id}"

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op of this build, `<namespace>::<op_name>`."""
    return f"{{_NAMESPACE}}::{{op_name}}"
'''

COMPAT_SOURCE = '''\
"""The package above, for kernels libraries that look for it here.

Written by `esmfold2-trimul build`.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_BUILD_ID = "{build_id}"


def _load_package() -> ModuleType:
    # Current libraries load it under this name too: its ops can be registered only once.
    if _BUILD_ID in sys.modules:
        return sys.modules[_BUILD_ID]
    spec = importlib.util.spec_from_file_location(
        _BUILD_ID, Path(__file__).resolve().parents[1] / "__init__.py"
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[_BUILD_ID] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[_BUILD_ID]
        raise
    return package


_package = _load_package()
__all__ = list(_package.__all__)
__version__ = _package.__version__
globals().update({{name: getattr(_package, name) for name in __all__}})
'''


@dataclass(frozen=True)
class BuildResult:
    """The result of `build_variant`. Paths are relative to the variant folder."""

    variant: Path
    build_id: str
    files: tuple[str, ...]
    written: tuple[str, ...]
    removed: tuple[str, ...]


def build_variant(root: Path) -> BuildResult:
    """Bring `build/torch-universal` of the repository at `root` in line with its sources.

    Correct files stay untouched; files that don't belong there, also bytecode, are removed.

    Raises:
        UserError: `root` lacks the package, or a build.toml that describes a torch-noarch kernel.
    """
    variant = root / VARIANT
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        build_id = _write_variant(root, fresh)
        wanted = _files(fresh)
        removed = sorted(_files(variant).keys() - wanted.keys())
        written = [name for name in wanted if _differs(wanted[name], variant / name)]
        for name in removed:
            (variant / name).unlink()
        for name in written:
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(wanted[name], variant / name)
    _remove_bytecode_and_empty_folders(variant)
    return BuildResult(variant, build_id, tuple(wanted), tuple(written), tuple(removed))


def check_variant(root: Path) -> list[str]:
    """The problems of `build/torch-universal` in the repository at `root`, a line each.

    The list is empty if the folder is as `build_variant` would make it and its digest holds; an
    installed package has the digest alone.
    Nothing is written. Bytecode is ignored: importing the kernel makes it, and no digest counts it.

    Raises:
        UserError: as `build_variant`.
    """
    variant = variant_of(root)
    if variant == root:
        return _digest_problems(variant)
    with tempfile.TemporaryDirectory() as scratch:
        _write_variant(root, Path(scratch))
        wanted, found = _files(Path(scratch)), _files(variant)
        problems = []
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                problems.append(f"{VARIANT.as_posix()}/{name} is missing")
            elif name not in wanted:
                problems.append(f"{VARIANT.as_posix()}/{name} is extra: the sources don't give it")
            elif _differs(wanted[name], found[name]):
                problems.append(f"{VARIANT.as_posix()}/{name} differs from what the sources give")
    if METADATA in found:
        problems += _digest_problems(variant)
    return problems


def _write_variant(root: Path, folder: Path) -> str:
    """Write the whole variant into an empty folder; returns the build's id."""
    config = _read_build_toml(root)
    general = config["general"]
    name = KernelName(general["name"])
    package = root / "torch-ext" / name.python_name
    if not (package / "__init__.py").is_file():
        raise UserError(
            f"build.toml names the kernel {str(name)!r}, but torch-ext/{name.python_name} has no "
            "__init__.py"
        )

    extensions = config["torch-noarch"].get("pyext", DEFAULT_EXTENSIONS)
    sources = {
        relative: path.read_bytes()
        for relative, path in _files(package).items()
        if path.suffix[1:] in extensions and relative != OPS_MODULE
    }
    build_id = f"_{name.python_name}_{_content_hash(sources)}"
    contents = {
        **sources,
        OPS_MODULE: OPS_SOURCE.format(build_id=build_id).encode(),
        f"{name.python_name}/__init__.py": COMPAT_SOURCE.format(build_id=build_id).encode(),
    }
    for relative, content in contents.items():
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_bytes(content)

    # The format has one backend for each folder: the first that build.toml lists.
    backend = {"type": general["backends"][0]}
    if backend["type"] == "cuda" and "cuda_capabilities" in config["torch-noarch"]:
        backend["archs"] = config["torch-noarch"]["cuda_capabilities"]
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, folder)
    metadata = {
        "name": str(name),
        "id": build_id,
        "version": general["version"],
        "license": general["license"],
        "python-depends": general.get("python-depends", []),
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": dict(sorted(digest.files.items()))},
    }
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return build_id


def _read_build_toml(root: Path) -> dict[str, Any]:
    path = root / "build.toml"
    if not path.is_file():
        raise UserError(f"{path} is missing: it describes the kernel to build")
    # Build.open checks the file against its schema, but of its values it gives only the backends.
    try:
        Build.open(root)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    config = tomllib.loads(path.read_text(encoding="utf-8"))
    if "torch-noarch" not in config:
        raise UserError(
            f"{path} must have a [torch-noarch] section, for a package of Python alone; "
            f"its sections are {', '.join(sorted(config))}"
        )
    return config


def _content_hash(contents: dict[str, bytes]) -> str:
    """Ten hex digits that change with any file's name or content."""
    total = hashlib.sha256()
    for name in sorted(contents):
        for part in (name.encode(), contents[name]):
            total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()[:10]


def _digest_problems(variant: Path) -> list[str]:
    """The deviations of the folder's files from the digest in its own metadata.json."""
    try:
        recorded = Metadata.read_from_file(variant / METADATA).digest
    except ValueError as error:
        return [f"{METADATA} can't be read: {error}"]
    if recorded is None:
        return [f"{METADATA} has no digest"]
    try:
        recorded.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    except DigestValidationError as error:
        return [f"digest: {violation}" for violation in error.violations]
    return []


def _files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` but bytecode, by its path in it; none if there is no folder."""
    paths = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        relative.as_posix(): paths[relative]
        for relative in sorted(paths)
        if "__pycache__" not in relative.parts and relative.suffix != ".pyc"
    }


def _differs(wanted: Path, found: Path) -> bool:
    return not found.is_file() or wanted.read_bytes() != found.read_bytes()


def _remove_bytecode_and_empty_folders(variant: Path) -> None:
    # Deepest first, so that a folder is empty once its last subfolder is removed.
    for path in sorted(variant.rglob("*"), reverse=True):
        if path.name == "__pycache__":
            shutil.rmtree(path)
        elif path.suffix == ".pyc":
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
