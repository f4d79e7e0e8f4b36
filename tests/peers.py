"""Other models' own triangle multiplications, with which the adapters are compared.

`make env` puts the packages of requirements-peers.txt into the folder `peers` of the environment,
without what they depend on: a triangle multiplication needs torch alone, but the modules around it
import more. Where such a package is missing, something empty stands in for it during the import.
"""

import functools
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from esmfold2_trimul_tools.bench.rivals import find_esm
from helpers import seeded
from torch import nn

MODULES = {
    "accelerate": "accelerate",
    "peft": "peft",
    "boltz": "boltz.model.layers.triangular_mult",
    "openfold3": "openfold3.core.model.layers.triangular_multiplicative_update",
    "protenix": "protenix.model.triangular.triangular",
}
_ESM_MEND = "make env installs it for Python 3.12 or newer"
_FOLDER = Path(sys.prefix, "peers")
_ABSENT = ("biotite", "gemmi", "ml_collections", "optree", "scipy")


def peer(name: str, module: str | None = None) -> ModuleType:
    """A module of a peer, its triangle's by default; skips the test where the peer is absent."""
    with _importable():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; make env installs it where it can be")
        return importlib.import_module(module or MODULES[name])


def esm_peer(name: str = "layers") -> ModuleType:
    """A module of biohub's esm, without the packages above it, which import all that it needs."""
    folder = _esm_folder()
    layers = "no package of that name" if folder is None else find_esm(folder)
    if isinstance(layers, str):
        pytest.skip(f"biohub's esm is not here ({layers}); {_ESM_MEND}")
    sys.modules["esm.models.esmc"].EsmcModel = object  # the language model, which no test runs
    with _importable():
        return pytest.importorskip(f"esm.models.esmfold2.{name}", exc_type=ImportError)


@functools.cache
def _esm_folder() -> Path | None:
    with _importable():
        found = importlib.util.find_spec("esm")
    return None if found is None or found.origin is None else Path(found.origin).parents[1]


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with random parameters like a trained one's: peers start with gates of zero."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            scale = 0.3 if value.ndim == 1 else value.shape[-1] ** -0.5
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
            if "norm" in name and name.endswith("weight"):
                value.add_(1)
    return module


@contextmanager
def _importable():
    """The peers' folder on the path, and stand-ins for what is not installed."""
    before = os.environ.get("LAYERNORM_TYPE")
    os.environ["LAYERNORM_TYPE"] = "torch"  # Protenix would compile a LayerNorm of its own
    finder = _StandIns()
    sys.path.append(str(_FOLDER))
    sys.meta_path.append(finder)  # the last: installed packages come first
    try:
        with warnings.catch_warnings():  # OpenFold 3 sets a filter of its own
            yield
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(str(_FOLDER))
        for name in finder.made:
            del sys.modules[name]
        if before is None:
            del os.environ["LAYERNORM_TYPE"]
        else:
            os.environ["LAYERNORM_TYPE"] = before


class _StandIns:
    """Finds the absent packages, as packages of whatever name is asked of them."""

    def __init__(self) -> None:
        self.made = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        self.made.append(spec.name)
        return _StandIn(spec.name)

    def exec_module(self, module) -> None:
        pass


class _StandIn(ModuleType):
    __version__ = "0"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return {"ConfigDict": _ConfigDict, "truncnorm": _TruncatedNormal}.get(name) or type(
            name, (), {}
        )


class _ConfigDict(dict):
    """Stands in for ml_collections' in OpenFold 3: a dict whose entries are attributes too."""

    def __getattr__(self, name: str):
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return _ConfigDict(value) if type(value) is dict else value


class _TruncatedNormal:
    """Stands in for scipy.stats' in the peers' initialisation, which `randomized` overwrites."""

    @staticmethod
    def std(**_) -> float:
        return 1.0

    @staticmethod
    def rvs(size: int, **_) -> np.ndarray:
        return np.zeros(size)
