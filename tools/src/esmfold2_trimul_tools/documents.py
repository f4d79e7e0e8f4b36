"""Results and settings as JSON files with one row a line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import UserError


def in_lines(value: Any, margin: str = "") -> str:
    """`value` as JSON: a row (a dict in a list) takes one line, and so does a flat dict.

    Lists of rows, dicts that hold dicts or lists, and the document itself take a line for each
    entry. Equal documents give equal text.
    """
    inner = margin + "  "
    if isinstance(value, dict) and (not margin or any(map(_holds_others, value.values()))):
        lines = [f"{json.dumps(key)}: {in_lines(item, inner)}" for key, item in value.items()]
        opening, closing = "{}"
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        lines = [json.dumps(item, allow_nan=False) for item in value]
        opening, closing = "[]"
    else:
        return json.dumps(value, allow_nan=False)
    body = ",\n".join(inner + line for line in lines)
    return f"{opening}\n{body}\n{margin}{closing}"


def _holds_others(value: Any) -> bool:
    return isinstance(value, (dict, list))


def read_document(path: Path) -> Any:
    """The JSON document in a file.

    Raises:
        UserError: there is no such file, or it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def write_document(document: Any, path: Path) -> None:
    """Write the file in one step, so that an interrupted run leaves a complete file.

    Raises:
        UserError: it can't be written to.
    """
    unfinished = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(in_lines(document) + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"--out {path}: can't be written to ({error.strerror})") from error
