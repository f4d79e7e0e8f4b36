"""The libraries that only some commands need, which an installation without extras lacks."""

import importlib.util

from .errors import UserError

# By the name of the import: what pip calls it, and the extra of this package that brings it.
OPTIONAL = {
    "dash_molstar": ("dash-molstar", "fold"),
    "gemmi": ("gemmi", "fold"),
    "matplotlib": ("matplotlib", "fold"),
    "transformers": ("transformers", "fold"),
    "kernels": ("kernels", "hub"),
}


def missing(*names: str) -> list[str]:
    """Those of the libraries, by the names of their imports, that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def how_to_get(*names: str) -> str:
    """The command that installs some of `OPTIONAL`."""
    return f"pip install {' '.join(OPTIONAL[name][0] for name in names)}"


def check_installed(*names: str) -> None:
    """Refuses to begin what would fail at its end.

    Raises:
        UserError: some of these are missing.
    """
    if absent := missing(*names):
        raise UserError(not_installed(*absent))


def not_installed(*names: str) -> str:
    """That some of `OPTIONAL` are missing, and the mend."""
    extras = ", ".join(sorted({OPTIONAL[name][1] for name in names}))
    return (
        f"{', '.join(OPTIONAL[name][0] for name in names)} not installed: {how_to_get(*names)}, or "
        f"install esmfold2-trimul-tools with [{extras}]"
    )
