"""Runs a script in a Python process of its own, for tests about what importing the kernel does."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
# Variables that would change how the kernel is found or which path it takes.
STRIPPED = ("TRITON_INTERPRET", "LOCAL_KERNELS", "USE_HUB_KERNELS")
HUNG_SECONDS = 3600  # a process that takes so long will never end


def python_output(script: str, *arguments: str, **environment: str) -> str:
    """The output of `script` run with `arguments`; a script that fails fails the test.

    The process is offline, takes the paths that a user's would, and can import the test helpers and
    the tools. `environment` adds to its environment variables.
    """
    variables = {name: value for name, value in os.environ.items() if name not in STRIPPED}
    variables |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tools" / "src")]),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=variables,
        capture_output=True,
        text=True,
        timeout=HUNG_SECONDS,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def import_package(name: str, folder: str) -> ModuleType:
    """The package in `folder` under a name of our choice, as every kernels library imports one."""
    spec = importlib.util.spec_from_file_location(name, Path(folder, "__init__.py"))
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package
