"""A page for each fold, whole in one file that asks nothing of any network, and an index of many.

The structure is shown by Mol*, in RCSB's build: the installed package dash-molstar has it as one
script, which is put into each page.
"""

import base64
import gzip
import html
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from .complexes import chain_starts
from .fold import Fold
from .plots import PLDDT_BANDS
from .results import INDEX
from .sequences import CHAIN_NAMES

_DATA = Path(__file__).resolve().parents[1] / "data"
_PAE_STEPS = 7  # of a byte, by Å: errors are below 32 Å

Table = list[list[str]]


def page_of(result: Fold, mmcif: str, facts: Table, files: dict[str, str], note: str = "") -> str:
    """The page of a fold's best sample.

    Args:
        mmcif: the sample's structure.
        facts: names and values of the settings and timings, for a table.
        files: names of the files beside the page, by their kinds.
        note: a remark on the weights.
    """
    record, best = result.record, result.best
    headline = f"{record.length} residues, mean pLDDT {100 * result.mean_plddt:.1f}, "
    headline += f"pTM {float(result.ptm[best]):.3f}"
    if result.several:
        headline += f", ipTM {float(result.iptm[best]):.3f}, {len(record.chains)} chains"
    steps = (_PAE_STEPS * result.pae).round().clamp(0, 255).byte()
    data = {
        "chains": [
            {"name": name, "sequence": chain, "start": start}
            for name, chain, start in zip(
                CHAIN_NAMES, record.chains, chain_starts(record), strict=False
            )
        ],
        "bands": [[edge, colour] for edge, colour, _ in PLDDT_BANDS],
        "plddt": [round(value, 1) for value in (100 * result.plddt[best]).tolist()],
        "pae": base64.b64encode(steps.numpy().tobytes()).decode(),
        "pae_steps": _PAE_STEPS,
        "mmcif": mmcif,
    }
    tables = [("Settings and timings", _table(facts)), ("Samples", _samples(result, files))]
    if result.several:
        tables.append(("ipTM by pair of chains", _pairs(result)))
    of_best = {kind: name for kind, name in files.items() if not kind.startswith("rank_")}
    tables.append(("Files", _table([[kind, _link(name)] for kind, name in of_best.items()], True)))
    return _filled(
        "page.html",
        title=html.escape(f"{record.name}, folded by ESMFold2"),
        name=html.escape(record.name),
        headline=headline,
        note=f'<p class="note">{html.escape(note.capitalize())}.</p>' if note else "",
        bands="".join(
            f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
            for _, colour, name in PLDDT_BANDS
        ),
        residue_hint="Point at a residue.",
        tables="\n".join(f"<div><h2>{title}</h2>{table}</div>" for title, table in tables),
        data=json.dumps(data).replace("<", "\\u003c"),  # no </script> within
        viewer=_viewer(),
    )


def index_of(entries: list[dict[str, Any]]) -> str:
    """The page that leads to those of many folds, in the order of the results."""
    rows = []
    for entry in entries:
        page = entry.get("files", {}).get("page")
        name = html.escape(entry["name"])
        numbers = [
            _number(entry.get("chains"), ""),
            _number(entry.get("residues"), ""),
            _number(entry.get("mean_plddt"), ".1f", 100),
            _number(entry.get("ptm"), ".3f"),
            _number(entry.get("iptm"), ".3f"),
            _number(entry.get("seconds"), ".1f"),
        ]
        remark = html.escape("; ".join([entry.get("error") or "", *entry.get("faults", [])]))
        cells = [_link(page, entry["name"]) if page else name, *numbers, remark.strip("; ")]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    folded = sum(entry["status"] == "folded" for entry in entries)
    return _filled(
        INDEX, count=f"{folded} of {len(entries)} proteins folded", rows="\n".join(rows)
    )


@cache
def _viewer() -> str:
    """Mol*, packed by gzip and written in base64: a third of its size.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec("dash_molstar")
    if found is None:
        raise FileNotFoundError("no Mol* here: pip install dash-molstar")
    script = Path(found.origin).with_name("rcsb-molstar.js").read_bytes()
    return base64.b64encode(gzip.compress(script, mtime=0)).decode()


def _filled(template: str, **values: str) -> str:
    text = (_DATA / template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], text)


def _samples(result: Fold, files: dict[str, str]) -> str:
    head = ["rank", "score", "pTM", *(["ipTM"] if result.several else []), "mean pLDDT", "file"]
    rows = [
        [
            str(rank),
            f"{float(result.ranking_scores[sample]):.3f}",
            f"{float(result.ptm[sample]):.3f}",
            *([f"{float(result.iptm[sample]):.3f}"] if result.several else []),
            f"{100 * float(result.plddt[sample].mean()):.1f}",
            _link(files["mmcif" if rank == 1 else f"rank_{rank}_mmcif"]),
        ]
        for rank, sample in enumerate(result.ranked, start=1)
    ]
    return _table([head, *rows], safe=True, head=True)


def _pairs(result: Fold) -> str:
    names = CHAIN_NAMES[: len(result.record.chains)]
    pairs = result.chain_iptm[result.best]
    pairs = pairs.maximum(pairs.T)
    rows = [
        [name, *("" if i == j else f"{float(value):.3f}" for j, value in enumerate(row))]
        for i, (name, row) in enumerate(zip(names, pairs, strict=True))
    ]
    return _table([["", *names], *rows], head=True)


def _table(rows: Table, safe: bool = False, head: bool = False) -> str:
    """Rows as HTML; the first cell of each is a heading, and with `head` so is the first row.

    safe: whether the cells are HTML already.
    """
    lines = []
    for number, row in enumerate(rows):
        cells = [cell if safe else html.escape(cell) for cell in row]
        kind = "th" if head and number == 0 else "td"
        others = "".join(f"<{kind}>{cell}</{kind}>" for cell in cells[1:])
        lines.append(f"<tr><th>{cells[0]}</th>{others}</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _link(name: str, text: str | None = None) -> str:
    # A stem has only letters, digits, dots and the like, so it is a relative address as it is.
    return f'<a href="{name}">{html.escape(text or name)}</a>'


def _number(value: float | None, form: str, factor: int = 1) -> str:
    return "" if value is None else format(value * factor, form)
