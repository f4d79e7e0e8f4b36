"""The benchmark's plots."""

from bench_fakes import example_results
from esmfold2_trimul_tools.bench import plots as bench_plots
from esmfold2_trimul_tools.bench.results import read_results
from esmfold2_trimul_tools.bench.rivals import RIVALS
from esmfold2_trimul_tools.documents import write_document
from matplotlib.figure import Figure
from matplotlib.image import imread


def test_plots_are_drawn_from_the_file_alone_and_alike_each_time(tmp_path):
    write_document(example_results(), tmp_path / "results.json")
    files = bench_plots.plot(read_results(tmp_path / "results.json"), tmp_path / "one")
    again = bench_plots.plot(read_results(tmp_path / "results.json"), tmp_path / "two")
    names = [file.name for file in files]
    assert names[:4] == ["time_1.png", "floor_1.png", "memory_1.png", "error_1.png"]
    assert names[4:] == ["time_2.png", "floor_2.png", "memory_2.png"]
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert imread(files[0]).shape[0] > 600


def test_plots_show_what_they_say(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append((path, figure)))
    results = example_results()
    results["rows"] = [row for row in results["rows"] if row["dtype"] == "bfloat16"]
    other = [row | {"C": 256} for row in results["rows"]]
    results["rows"] += other
    bench_plots.plot(results, tmp_path)
    shown = {path.name: figure for path, figure in figures}
    left, right = shown["time.png"].axes
    assert [axes.get_title() for axes in (left, right)] == ["C = 128", "C = 256"]
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert (left.get_xlabel(), left.get_ylabel()) == ("L, residues", "time of a call, ms")
    lines = {line.get_label(): line for line in left.get_lines()}
    assert lines.keys() == {"ours", "in-tree, chunk 64", "published", "three-stage floor"}
    assert lines["ours"].get_xydata().tolist() == [[76, 0.5], [1024, 4.0]]
    assert lines["published"].get_xydata().tolist() == [[76, 1.0]]
    widths = {name: line.get_linewidth() for name, line in lines.items()}
    assert max(widths, key=widths.get) == "ours"
    (legend,) = shown["time.png"].legends
    assert {text.get_text() for text in legend.get_texts()} == lines.keys()
    (floor, _) = shown["floor.png"].axes
    assert floor.get_ylim()[0] == 0 and floor.get_yscale() == "linear"
    assert shown["memory.png"].axes[0].get_ylim()[0] == 0


def test_every_rival_has_a_style_of_its_own():
    styles = [tuple(bench_plots._style(rival.name).items())[1:4] for rival in RIVALS]
    assert len(set(styles)) == len(RIVALS)
    colours = {name: bench_plots._style(name)["color"] for name in ("ours", "published", "else")}
    assert len(set(colours.values())) == 3


def test_lengths_that_would_overlap_share_a_label():
    assert bench_plots._spaced({511, 512, 768, 769, 76, 64}) == [64, 76, 512, 768]
