import warnings

import matplotlib
import pytest
from esmfold2_trimul_tools.folding import plots
from folding import made_up_fold
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.image import imread


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
    plots.plot_fold(made_up_fold("A" * length), path, "a note")
    height, width, _ = imread(path).shape
    assert (height, width) == (720, 2250)


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
    fold = made_up_fold("AAA", name=name)
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        warnings.simplefilter("error")
        plots.plot_fold(fold, tmp_path / "fold.png")
    assert any(text.startswith(f"{name}, 3 residues") for text in drawn)


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """figure_of(fold): what would be written."""

    def draw(fold, note=""):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
            plots.plot_fold(fold, tmp_path / "fold.png", note)
        return figures[0]

    return draw


def test_picture_says_what_it_shows(figure_of):
    figure = figure_of(made_up_fold("A" * 20), "random weights")
    confidence, errors, distances, *bars = figure.axes
    assert figure.get_suptitle() == (
        "made-up, 20 residues: mean pLDDT 50.0, pTM 0.500\nrandom weights"
    )
    assert (confidence.get_xlabel(), confidence.get_ylabel()) == ("Residue", "pLDDT")
    assert confidence.get_ylim() == (0, 100)
    assert (errors.get_xlabel(), errors.get_ylabel()) == ("Scored residue", "Aligned residue")
    assert [bar.get_ylabel() for bar in bars] == ["Å", "Å"]
    # Residues count from 1, and the mean of the eight equally likely bins 0 to 7 is 3.5.
    (image,) = distances.get_images()
    assert image.get_extent() == [0.5, 20.5, 20.5, 0.5]
    assert image.get_array().min() == image.get_array().max() == pytest.approx(3.5)
    (image,) = errors.get_images()
    assert image.get_array()[3, 2] == pytest.approx(3.2)


def test_colours_mean_the_same_in_every_picture(figure_of):
    for length in (3, 30):
        _, errors, distances, *_ = figure_of(made_up_fold("A" * length)).axes
        assert errors.get_images()[0].get_clim() == (0, 32)
        assert distances.get_images()[0].get_clim() == (2, 52)


def test_lines_show_where_chains_end(figure_of):
    def breaks(axes):
        across = [line.get_xdata()[0] for line in axes.lines if line.get_ydata()[1] == 1]
        down = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]
        return across, down

    figure = figure_of(made_up_fold("AAA:GGGG:AAA"))
    confidence, errors, distances, *_ = figure.axes
    assert "made-up, 10 residues: mean pLDDT 50.0, pTM 0.500, ipTM 0.250" in figure.get_suptitle()
    assert breaks(errors) == breaks(distances) == ([3.5, 7.5], [3.5, 7.5])
    assert breaks(confidence)[0] == [3.5, 7.5]
    assert [text.get_text() for text in confidence.texts] == ["A", "B", "C"]
    assert not any(axes.lines for axes in figure_of(made_up_fold("AAA")).axes[1:3])
