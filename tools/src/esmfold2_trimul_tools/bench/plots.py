"""The benchmark's results as plots: time, share of the floor, peak memory and error against L."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from .report import groups
from .results import Results, Row
from .rivals import OURS

_DOTS_PER_INCH = 150
_LEGEND_COLUMNS = 4
# Okabe and Ito's colours, which colour-blind readers can distinguish: one for each family of
# rivals. Line and marker distinguish its members. A name takes the first entry that it begins with.
_STYLES = (
    ("ours, torch.compile", "#D55E00", ":", "s"),
    ("ours, CUDA graph", "#D55E00", "--", "D"),
    ("ours, lean", "#D55E00", "-.", "p"),
    ("ours, recompute all", "#D55E00", "-.", "*"),
    ("ours, plain, CUDA graph", "#E69F00", "--", "x"),
    ("ours, plain", "#E69F00", "-", "x"),
    ("ours, TF32x3", "#E69F00", ":", "x"),
    ("ours", "#D55E00", "-", "o"),
    ("in-tree, chunk 64", "#0072B2", "-", "v"),
    ("in-tree, unchunked", "#0072B2", "--", "^"),
    ("in-tree, torch.compile", "#56B4E9", "-", "<"),
    ("in-tree, max-autotune", "#56B4E9", "--", ">"),
    ("in-tree", "#56B4E9", ":", "d"),
    ("published, CUDA graph", "#009E73", "--", "X"),
    ("published", "#009E73", "-", "P"),
    ("cuequivariance, bf16", "#CC79A7", "-", "h"),
    ("cuequivariance, fp32", "#CC79A7", "--", "H"),
    ("cuequivariance", "#CC79A7", ":", "8"),
    ("", "0.5", "-", "."),
)


class _Quantity(NamedTuple):
    """One figure: a row's value against L. `form` formats the numbers on the axis."""

    name: str  # of the files
    label: str
    form: str
    scale: str  # "log", "linear", or "wide" for log where the values differ by more than 20 times
    value: Callable[[Row], float | None]


_QUANTITIES = (
    _Quantity("time", "time of a call, ms", "g", "log", lambda row: row["device_ms"]["median"]),
    _Quantity("floor", "three-stage floor / time", ".0%", "linear", itemgetter("floor_share")),
    _Quantity("memory", "peak memory, pair tensors", "g", "linear", itemgetter("peak_pairs")),
    _Quantity("error", "relative L2 error against float64", ".1e", "wide", itemgetter("error")),
)


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw the results into `folder`, each figure as PNG, and return the files.

    Equal results give equal files. A figure without a number is left out; with several dtypes,
    directions or masks each has figures of its own, numbered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    all_groups = list(groups(results))
    for number, (group, rows) in enumerate(all_groups, start=1):
        measured = [row for row in rows if row["status"] == "measured"]
        suffix = f"_{number}" if len(all_groups) > 1 else ""
        title = f"{results['environment']['device']}, {group}"
        for quantity in _QUANTITIES:
            shown = [row for row in measured if quantity.value(row) is not None]
            if shown:
                figure = _draw(quantity, shown, title)
                files.append(folder / f"{quantity.name}{suffix}.png")
                figure.savefig(files[-1], dpi=_DOTS_PER_INCH)
    return files


def _draw(quantity: _Quantity, rows: list[Row], title: str) -> Figure:
    """A panel for each C, a line for each rival, one legend below; with times their floor."""
    widths = list(dict.fromkeys(row["C"] for row in rows))
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    with_floor = quantity.name == "time" and all(row["floor_ms"] is not None for row in rows)
    lines_of_legend = -(-(len(rivals) + with_floor) // _LEGEND_COLUMNS)
    size = (1 + 5 * max(len(widths), 1.4), 4.6 + 0.25 * lines_of_legend)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="medium")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axes, channels in zip(panels, widths, strict=True):
        here = [row for row in rows if row["C"] == channels]
        for rival in rivals:
            line = sorted((row["L"], quantity.value(row)) for row in here if row["rival"] == rival)
            axes.plot([x for x, _ in line], [y for _, y in line], **_style(rival))
        if with_floor:
            line = sorted({(row["L"], row["floor_ms"]) for row in here})
            axes.plot([x for x, _ in line], [y for _, y in line], color="0.3", linewidth=1.2,
                      linestyle=(0, (1, 1)), label="three-stage floor", zorder=1)  # fmt: skip
        axes.set_title(f"C = {channels}", fontsize="medium")
        axes.grid(color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        _scale_lengths(axes, {row["L"] for row in here})
        _scale_values(axes, quantity, [quantity.value(row) for row in rows])
    panels[0].set_ylabel(quantity.label)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_LEGEND_COLUMNS,
                  frameon=False, fontsize="small", handlelength=3)  # fmt: skip
    return figure


def _scale_lengths(axes: Any, lengths: set[int]) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("L, residues")
    axes.xaxis.set_major_locator(FixedLocator(_spaced(lengths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=45)


def _scale_values(axes: Any, quantity: _Quantity, values: list[float]) -> None:
    ratio = max(values) / max(min(values), 1e-30)
    if quantity.scale == "log" or (quantity.scale == "wide" and ratio > 20):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if ratio > 100 else (1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="minor", axis="y", color="0.95", linewidth=0.5)
    else:
        axes.set_ylim(0, 1.08 * (max(values) or 1))
    number = f"{{:{quantity.form}}}".format
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value) if value else "0"))


def _spaced(lengths: set[int]) -> list[int]:
    """The lengths that can be labelled side by side on a logarithmic axis, round ones first."""
    kept: list[int] = []
    for length in sorted(lengths, key=lambda length: (length % 64 != 0, length)):
        if all(max(length, other) > 1.15 * min(length, other) for other in kept):
            kept.append(length)
    return sorted(kept)


def _style(rival: str) -> dict[str, Any]:
    _, colour, line, marker = next(style for style in _STYLES if rival.startswith(style[0]))
    emphasised = rival == OURS
    return {
        "label": rival,
        "color": colour,
        "linestyle": line,
        "marker": marker,
        "linewidth": 2.8 if emphasised else 1.3,
        "markersize": 6 if emphasised else 4.5,
        "zorder": 4 if emphasised else 3 if rival.startswith(OURS) else 2,
    }
