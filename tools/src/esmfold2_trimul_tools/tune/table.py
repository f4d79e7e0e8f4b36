"""The table: the fastest setting of each class of lengths, as the kernel package reads them.

A table in torch-ext/esmfold2_trimul_kernel/triton_parts/configs is used by all devices of its
target or, if it is named after a device (NVIDIA_H200.json), by that device alone.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import torch

from ..documents import write_document
from ..repository import load_kernel, submodule
from .candidates import CLASSES, SPLIT_STAGES, STAGES


def fastest(
    rows: list[dict], stage: str, width: int, lengths: tuple[int, ...]
) -> tuple[dict, float] | None:
    """The setting with the least geometric mean of its times at `lengths`, and that mean in ms."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["stage"] == stage and row["width"] == width and row["length"] in lengths:
            key = json.dumps(row["config"], sort_keys=True)
            times.setdefault(key, {})[row["length"]] = row["milliseconds"]
    means = {
        key: math.exp(statistics.fmean(map(math.log, by_length.values())))
        for key, by_length in times.items()
        if len(by_length) == len(lengths)
    }
    if not means:
        return None
    key = min(means, key=means.__getitem__)
    return json.loads(key), means[key]


def chosen(
    rows: list[dict], stage: str, width: int, lengths: tuple[int, ...]
) -> list[tuple[dict, float]]:
    """The fastest setting; after one of a variant also the fastest of the stage's own kernel.

    That one serves the calls that the variant doesn't take.
    """
    own = [row for row in rows if not row["config"].get("kernel")]
    found = [fastest(rows, stage, width, lengths), fastest(own, stage, width, lengths)]
    if found[0] == found[1]:
        del found[1]
    return [one for one in found if one is not None]


def table(
    results: dict,
    base: dict,
    shipped: dict,
    classes: tuple[tuple[int | None, tuple[int, ...]], ...] = CLASSES,
) -> dict:
    """A settings table: `base` with the settings of a kind that were fastest in `results`.

    Of two neighbouring classes of one width with the same settings only the longer is written. The
    `shipped` settings of other widths than those tuned stay, as do the backward's and, above all
    others, those down to the whole transition's and stage 2's variants', which are not timed.
    """
    environment_, kind = results["environment"], results["kind"]
    what = "Settings of float32's split operands" if kind == "split" else "16-bit settings"
    tuned = {
        "note": (
            f"{what} of the forward measured on one {environment_['device']} (torch "
            f"{environment_['torch']}, Triton {environment_['triton']}, {environment_['date']}) "
            "by `esmfold2-trimul tune`; see docs/performance.md."
        )
    }
    for stage in SPLIT_STAGES if kind == "split" else STAGES:
        widths = sorted({row["width"] for row in results["rows"] if row["stage"] == stage})
        entries = []
        for width in widths:
            of_width: list[tuple[int | None, list[dict]]] = []
            for longest, lengths in classes:
                best = chosen(results["rows"], stage, width, lengths)
                if not best:
                    continue
                settings = [_shortest(config) for config, _ in best]
                if of_width and of_width[-1][1] == settings:
                    of_width.pop()
                of_width.append((longest, settings))
            for longest, settings in of_width:
                length = {} if longest is None else {"max_length": longest}
                entries += [{"max_width": width, **length, **setting} for setting in settings]
        ahead, rest = _untimed(shipped[stage][kind])
        entries += [entry for entry in rest if _widest(entry) not in widths]
        entries.sort(key=_widest)  # of equal widths the tuned ones first
        tuned[stage] = {**base.get(stage, {}), kind: ahead + entries}
    return base | tuned


def _widest(entry: dict) -> float:
    return entry.get("max_width", math.inf)


def _untimed(entries: list[dict]) -> tuple[list[dict], list[dict]]:
    """The variants' entries down to the last that is no candidate, and all others."""
    last = [at for at, entry in enumerate(entries, 1) if entry.get("kernel") in ("whole", "both")]
    ahead = [entry for entry in entries[: max(last, default=0)] if "kernel" in entry]
    return ahead, [entry for entry in entries if entry not in ahead]


def _shortest(config: dict) -> dict:
    """The fields that differ from a LaunchConfig's defaults."""
    defaults = {
        "descriptors": False, "held": False, "maxnreg": None,
        "persistent": 0, "split": 1,
    }  # fmt: skip
    return {k: v for k, v in config.items() if k not in defaults or v != defaults[k]}


def write(root: Path, results: dict, out: Path | None, everything: Path | None) -> dict:
    """Writes the table of `results` over the package's own for this target; returns the table."""
    kernel = load_kernel(root)
    target = submodule(kernel, "triton_parts.device").device_target(torch.device("cuda", 0)).target
    configs = root / "torch-ext" / "esmfold2_trimul_kernel" / "triton_parts" / "configs"
    path = configs / f"{target}.json"
    base = json.loads(path.read_text()) if path.is_file() else {"like": "default"}
    settings = table(results, base, submodule(kernel, "triton_parts.settings").settings_of(target))
    for path, document in ((out, settings), (everything, timings(results))):
        if path is not None:
            write_document(document, path)
    return settings


def timings(results: dict) -> dict:
    """The results with a row for each candidate, its times and errors by length."""
    candidates_: dict[str, dict] = {}
    for row in results["rows"]:
        named = {name: row[name] for name in ("stage", "width", "config")}
        key = json.dumps(named, sort_keys=True)
        entry = candidates_.setdefault(key, {**named, "milliseconds": {}, "error": {}})
        for name, digits in (("milliseconds", 5), ("error", 3)):
            entry[name][str(row["length"])] = float(f"{row[name]:.{digits}g}")
    return {
        "environment": results["environment"],
        "kind": results["kind"],
        "candidates": list(candidates_.values()),
        "failed": results["failed"],
    }


def text(results: dict, classes: tuple = CLASSES) -> str:
    """The settings of each stage, width and class, a line each."""
    lines = [f"{results['environment']['device']}: milliseconds, geometric mean of the lengths"]
    for stage, width in sorted({(row["stage"], row["width"]) for row in results["rows"]}):
        for _, lengths in classes:
            for config, milliseconds in chosen(results["rows"], stage, width, lengths):
                timed = ", ".join(map(str, lengths))
                setting = " ".join(f"{k}={v}" for k, v in _shortest(config).items())
                lines.append(f"{stage} C = {width}, L = {timed}: {milliseconds:.4f}  {setting}")
    lines.append(f"{len(results['failed'])} candidates failed")
    return "\n".join(lines)
