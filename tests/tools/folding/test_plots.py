import warnings

import matplotlib
import pytest
import torch
from esmfold2_trimul_tools.folding import plots
from esmfold2_trimul_tools.folding.fold import Fold
from esmfold2_trimul_tools.folding.memory import PeakMemory
from esmfold2_trimul_tools.folding.sequences import Record
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.image import imread


def fake_fold(length: int) -> Fold:
    bins = 8
    return Fold(
        record=Record("fake", "A" * length),
        plddt=torch.linspace(0, 1, length)[None],
        ptm=torch.tensor([0.5]),
        coords=torch.zeros(1, length, 3),
        distogram=torch.full((length, length, bins), 1 / bins),
        bin_centres=torch.arange(float(bins)),
        best=0,
        pdb="",
        seconds=1.0,
        memory=PeakMemory(),
    )


@pytest.mark.parametrize(
    ("plddt", "colour"),
    [(100, "#0053d6"), (90, "#0053d6"), (89.9, "#65cbf3"), (70, "#65cbf3"), (69, "#ffdb13"),
     (50, "#ffdb13"), (49, "#ff7d45"), (0, "#ff7d45")],
)  # fmt: skip
def test_bands_are_the_alphafold_databases(plddt, colour):
    assert plots.band_colour(plddt) == colour


@pytest.mark.parametrize("length", [1, 2, 300])
def test_picture_is_written_for_any_length(tmp_path, length):
    path = tmp_path / "fold.png"
    plots.plot_fold(fake_fold(length), path, "a note")
    height, width, _ = imread(path).shape
    assert (height, width) == (720, 1650)


# matplotlib would read the first three as formulas: two that are wrong, and one that isn't.
NAMES = ["Ba$$in", "lib$a_{$b", "$x^2$", r"a\b", "a_b^c", "{x", "%s#&~", "日本語", "n" * 300]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [{}, {"text.usetex": True}], ids=["as it is", "TeX"])
def test_names_are_drawn_as_they_are(tmp_path, monkeypatch, name, settings):
    drawn = []
    real = RendererAgg.draw_text

    def draw_text(renderer, context, x, y, text, *others, **keywords):
        drawn.append(text)
        return real(renderer, context, x, y, text, *others, **keywords)

    monkeypatch.setattr(RendererAgg, "draw_text", draw_text)
    fold = fake_fold(3)
    fold.record = Record(name, "AAA")
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        warnings.simplefilter("error")
        plots.plot_fold(fold, tmp_path / "fold.png")
    assert any(text.startswith(f"{name}, 3 residues") for text in drawn)


def test_picture_says_what_it_shows(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plots.plot_fold(fake_fold(20), tmp_path / "fold.png", "random weights")
    (figure,) = figures
    confidence, distances, colourbar = figure.axes
    assert figure.get_suptitle().startswith("fake, 20 residues: mean pLDDT 50.0, pTM 0.500")
    assert figure.get_suptitle().endswith("random weights")
    assert (confidence.get_xlabel(), confidence.get_ylabel()) == ("Residue", "pLDDT")
    assert confidence.get_ylim() == (0, 100)
    assert colourbar.get_ylabel() == "Å"
    # Residues count from 1, and the mean of the eight equally likely bins 0 to 7 is 3.5.
    (image,) = distances.get_images()
    assert image.get_extent() == [0.5, 20.5, 20.5, 0.5]
    assert image.get_array().min() == image.get_array().max() == pytest.approx(3.5)
