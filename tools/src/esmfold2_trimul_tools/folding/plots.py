"""The picture of a fold: pLDDT by residue, and the map of expected distances."""

import warnings
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .fold import Fold

# The AlphaFold database's bands: lower edge, colour, name. pLDDT from 0 to 100.
PLDDT_BANDS = (
    (90, "#0053d6", "very high (above 90)"),
    (70, "#65cbf3", "confident (70 to 90)"),
    (50, "#ffdb13", "low (50 to 70)"),
    (0, "#ff7d45", "very low (below 50)"),
)
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
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    record = result.record
    figure.suptitle(
        f"{record.name}, {len(record.sequence)} residues: mean pLDDT "
        f"{100 * result.mean_plddt:.1f}, pTM {float(result.ptm[result.best]):.3f}"
        + (f"\n{note}" if note else "")
    )
    confidence, distances = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _draw_plddt(confidence, 100 * result.plddt[result.best].numpy())
    _draw_distances(distances, result.expected_distances.numpy())
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


def _draw_distances(axes, distances) -> None:
    length = len(distances)
    # Residue centres on whole numbers, counted from 1 as in the PDB file.
    extent = (0.5, length + 0.5, length + 0.5, 0.5)
    image = axes.imshow(distances, cmap="viridis_r", extent=extent, interpolation="nearest")
    axes.set(xlabel="Residue", ylabel="Residue")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_residue_ticks())
    axes.set_title("Expected Cβ to Cβ distance (Cα for glycine)", fontsize="medium")
    axes.figure.colorbar(image, ax=axes, label="Å", shrink=0.9)


def _residue_ticks() -> MaxNLocator:
    return MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True)
