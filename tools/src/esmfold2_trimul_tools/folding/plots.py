"""The picture of a fold: pLDDT by residue, and the maps of predicted error and of distances.

Colours mean the same in every picture: both maps have fixed ranges. Residues are counted over all
chains of a complex, and lines show where chains end.
"""

import warnings
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .complexes import chain_starts
from .fold import Fold
from .sequences import CHAIN_NAMES

# The AlphaFold database's bands: lower edge, colour, name. pLDDT from 0 to 100.
PLDDT_BANDS = (
    (90, "#0053d6", "very high (above 90)"),
    (70, "#65cbf3", "confident (70 to 90)"),
    (50, "#ffdb13", "low (50 to 70)"),
    (0, "#ff7d45", "very low (below 50)"),
)
PAE_RANGE = (0, 32)  # Å, of the model's bins
DISTANCE_RANGE = (2, 52)  # Å, of the distogram's inner edges
_DOTS_PER_INCH = 150
# Names are drawn as they are: a $ begins no formula, whatever a matplotlibrc says.
_PLAIN_TEXT = {"text.parse_math": False, "text.usetex": False}


def band_colour(plddt: float) -> str:
    """The colour of the band that a pLDDT from 0 to 100 is in."""
    return next((colour for edge, colour, _ in PLDDT_BANDS if plddt >= edge), PLDDT_BANDS[-1][1])


@matplotlib.rc_context(_PLAIN_TEXT)
def plot_fold(result: Fold, path: Path, note: str = "") -> None:
    """Write the picture of the fold's best sample as a PNG.

    Args:
        note: a line under the title, for a remark on the weights.
    """
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    record = result.record
    figure.suptitle(
        f"{record.name}, {record.length} residues: mean pLDDT "
        f"{100 * result.mean_plddt:.1f}, pTM {float(result.ptm[result.best]):.3f}"
        + (f", ipTM {float(result.iptm[result.best]):.3f}" if result.several else "")
        + (f"\n{note}" if note else "")
    )
    confidence, errors, distances = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    _draw_plddt(confidence, 100 * result.plddt[result.best].numpy())
    _draw_map(errors, result.pae.numpy(), PAE_RANGE, "Greens_r")
    errors.set(xlabel="Scored residue", ylabel="Aligned residue")
    errors.set_title("Predicted aligned error (PAE)", fontsize="medium")
    _draw_map(distances, result.expected_distances.numpy(), DISTANCE_RANGE, "viridis_r")
    distances.set(xlabel="Residue", ylabel="Residue")
    distances.set_title("Expected Cβ to Cβ distance (Cα for glycine)", fontsize="medium")
    starts = chain_starts(record)
    for axes, colour in ((confidence, "0.3"), (errors, "black"), (distances, "white")):
        for start in starts[1:]:
            axes.axvline(start + 0.5, color=colour, linewidth=0.9)
            if axes is not confidence:
                axes.axhline(start + 0.5, color=colour, linewidth=0.9)
    if result.several:
        for start, name in zip(starts, CHAIN_NAMES, strict=False):
            confidence.text(start + 0.7, 98, name, va="top", fontweight="bold")
    with warnings.catch_warnings():
        # A box stands for a letter that the font lacks; a warning for each would say no more.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(path, dpi=_DOTS_PER_INCH)


def _draw_plddt(axes, plddt) -> None:
    residues = range(1, len(plddt) + 1)
    upper = 100
    for edge, colour, name in PLDDT_BANDS:
        axes.axhspan(edge, upper, color=colour, alpha=0.15, linewidth=0, zorder=0)
        axes.scatter([], [], s=30, color=colour, label=name)
        upper = edge
    axes.plot(residues, plddt, color="0.4", linewidth=0.8, zorder=1)
    # Points shrink with the length, so that a long chain still shows its line.
    size = max(3.0, min(30.0, 3000 / len(plddt)))
    axes.scatter(residues, plddt, s=size, c=[band_colour(value) for value in plddt], zorder=2,
                 edgecolors="0.3", linewidths=0.3)  # fmt: skip
    axes.set(xlabel="Residue", ylabel="pLDDT", ylim=(0, 100), xlim=(0.5, len(plddt) + 0.5))
    axes.xaxis.set_major_locator(_residue_ticks())
    axes.set_title("Predicted confidence by residue", fontsize="medium")
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize="small"
    )


def _draw_map(axes, values, limits, colours) -> None:
    length = len(values)
    # Residue centres on whole numbers, counted from 1 as in the PDB file.
    extent = (0.5, length + 0.5, length + 0.5, 0.5)
    image = axes.imshow(values, cmap=colours, extent=extent, interpolation="nearest",
                        vmin=limits[0], vmax=limits[1])  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_residue_ticks())
    axes.figure.colorbar(image, ax=axes, label="Å", shrink=0.9)


def _residue_ticks() -> MaxNLocator:
    return MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True)
