"""The folder to which Triton writes every kernel that it compiles, before the kernel can run."""

import tempfile
from pathlib import Path

from .errors import UserError

MEND = "set TRITON_CACHE_DIR to a folder that can be written to"


def cache_folder() -> Path | None:
    """As TRITON_CACHE_DIR, TRITON_HOME or HOME says; None where Triton can't be imported."""
    try:
        from triton import knobs
    except Exception:  # whatever a broken installation raises; that is another finding
        return None
    return Path(knobs.cache.dir)


def cache_fault(folder: Path) -> str:
    """Why Triton can't write to its cache, in words; empty where it can. Leaves nothing behind."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        # Only writing tells: of what root may write, the modes of /proc or of a full disk don't.
        with tempfile.TemporaryDirectory(dir=there) as tried:
            Path(tried, "file").write_bytes(b"something")
    except OSError as error:
        return f"can't be written to ({error.strerror})"
    return ""


def check_cache() -> None:
    """Raises UserError if Triton is installed and can't write to its cache."""
    folder = cache_folder()
    if folder is not None and (fault := cache_fault(folder)):
        raise UserError(f"Triton's cache folder {folder} {fault}; {MEND}")
