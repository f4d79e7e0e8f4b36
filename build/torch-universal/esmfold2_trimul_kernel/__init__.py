"""The package above, for kernels libraries that look for it here.

Written by `esmfold2-trimul build`.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_BUILD_ID = "_esmfold2_trimul_kernel_4597dbbf51"


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
globals().update({name: getattr(_package, name) for name in __all__})
