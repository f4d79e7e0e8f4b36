"""The conformance suite's options: their checks, and their defaults on this machine."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..options import (
    AsJson,
    Commit,
    KernelRoot,
    Published,
    at_least,
    device_name,
    writable_file,
)
from ..repository import find_root
from ..triton_cache import check_cache
from . import implementations
from .cases import DTYPES, EVERY_CASE, Case, TransitionCase
from .implementations import Implementation


def _implementations(option: str, chosen: list[str]) -> tuple[Implementation, ...]:
    """The implementations of these names, or all without names."""
    every = implementations.IMPLEMENTATIONS
    names = [one.name for one in every]
    for name in chosen:
        if name not in names:
            raise UserError(f"--implementation must be one of {'; '.join(names)}; got {name!r}")
    return tuple(one for one in every if not chosen or one.name in chosen)


def _cases(option: str, parts: list[str]) -> tuple[Case | TransitionCase, ...]:
    """The cases whose name contains one of the parts, or all without parts."""
    for part in parts:
        if not any(part in case.name for case in EVERY_CASE):
            raise UserError(f"--case must be a part of a case's name; got {part!r}, in none")
    return tuple(
        case for case in EVERY_CASE if not parts or any(part in case.name for part in parts)
    )


@dataclass(frozen=True)
class Settings:
    """Which cases, for which implementations, on which device, and what becomes of the results.

    The annotations are those of the options' text, which checks convert.
    """

    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:N or xpu. Default: a GPU if there is one."),
        device_name,
    ] = None
    implementations: Annotated[
        list[str],
        typer.Option(
            "--implementation", help="Hold this one to the cases instead of all; may be repeated."
        ),
        _implementations,
    ] = ()
    cases: Annotated[
        list[str],
        typer.Option(
            "--case", help="Cases whose name has this in it, instead of all; may be repeated."
        ),
        _cases,
    ] = ()
    published: Published = None
    seed: Annotated[int, typer.Option(help="Of the random inputs."), at_least(0)] = 0
    kernel_root: KernelRoot = None
    commit: Commit = None
    out: Annotated[
        Path | None, typer.Option(help="Write the results to this file."), writable_file
    ] = None
    results: Annotated[
        Path | None, typer.Option(help="Run nothing: show the results in this file.")
    ] = None
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the report of docs/conformance.md.")
    ] = False
    as_json: AsJson = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        return DTYPES

    @property
    def root(self) -> Path:
        return find_root(self.kernel_root)

    def on_this_machine(self) -> "Settings":
        """The settings with torch's device."""
        find_root(self.kernel_root)  # before torch is imported
        from ..folding.model import resolve_device

        device = resolve_device(self.device)
        if device.type != "cpu":
            check_cache()
        return replace(self, device=device)
