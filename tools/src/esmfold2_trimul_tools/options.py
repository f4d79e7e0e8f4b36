"""Options that several commands share, and how an option is declared.

It is declared once: as a parameter of its command, or as a field of a dataclass that its command
takes. A check may follow typer's part of the annotation:

    seed: Annotated[int, typer.Option(help="Of the random inputs."), at_least(0)] = 0

A check is called with the option's name and value, unless that is None. It returns the value that
the command gets, or raises UserError. No check imports torch, which takes seconds.
"""

import functools
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from .errors import UserError
from .repository import find_root

DTYPES = ("float32", "bfloat16", "float16")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

T = TypeVar("T")
Check = Callable[[str, Any], Any]


def checked(command: Callable[..., None]) -> Callable[..., None]:
    """The command, called with the values that its options' checks return."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(**_checked(command, given))

    return run


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Turns a function that takes a dataclass into a command whose options are the fields."""

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(read(options, **given))

        run.__signature__ = inspect.signature(options)
        return run

    return decorate


def read(options: type[T], **given: Any) -> T:
    """The dataclass with some of its options given and all of them checked."""
    return options(**_checked(options, vars(options(**given))))


def _checked(owner: Any, values: dict[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for name, parameter in inspect.signature(owner).parameters.items():
        for check in filter(callable, getattr(parameter.annotation, "__metadata__", ())):
            if found[name] is not None:
                found[name] = check(f"--{name.replace('_', '-')}", found[name])
    return found


def at_least(least: int) -> Check:
    """The check of a number."""

    def check(option: str, value: int) -> int:
        if value < least:
            raise UserError(f"{option} must be at least {least}; got {value}")
        return value

    return check


def one_of(*known: str) -> Check:
    """The check of a word."""

    def check(option: str, word: str) -> str:
        if word not in known:
            raise UserError(f"{option} must be one of {', '.join(known)}; got {word!r}")
        return word

    return check


def device_name(option: str, name: str) -> str:
    """Checks the name alone; `folding.model.resolve_device` asks torch for the device."""
    if not re.fullmatch(r"(cpu|cuda|xpu)(:(0|[1-9]\d*))?", name):
        raise UserError(f"{option} must be cpu, cuda, cuda:N or xpu; got {name!r}")
    return name


def dtype_name(option: str, name: str) -> str:
    """The dtype's long name."""
    return one_of(*DTYPES)(option, SHORT_DTYPES.get(name, name))


def writable_folder(option: str, folder: Path) -> Path:
    """Refuses a folder that can't be made or can't be written to."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option} {folder}: can't be written to (as {there} can't be)")
    return folder


def writable_file(option: str, path: Path) -> Path:
    """Refuses a folder, and a file whose folder is refused."""
    if path.is_dir():
        raise UserError(f"{option} {path}: can't be written to (Is a directory)")
    writable_folder(option, path.parent)
    return path


def _published(option: str, folder: Path) -> Path:
    if not (folder / "esmfold2_trimul" / "__init__.py").is_file():
        raise UserError(f"{option} {folder}: holds no package esmfold2_trimul")
    return folder


KernelRoot = Annotated[
    Path | None,
    typer.Option(
        "--kernel-root", help="A checkout of the kernel. Default: the tools' own, or the installed."
    ),
    lambda option, folder: find_root(folder),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Commit = Annotated[
    str | None,
    typer.Option("--commit", help="What to record as the commit. Default: git's answer."),
]
Published = Annotated[
    Path | None,
    typer.Option(
        "--published",
        help="The folder that holds the published package, esmfold2_trimul. Default: the Hub.",
    ),
    _published,
]
