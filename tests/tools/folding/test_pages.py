"""The pages, by an HTML parser, and by a browser where there is one."""

import base64
import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from esmfold2_trimul_tools.folding.pages import index_of, page_of
from esmfold2_trimul_tools.folding.structures import mmcif_of
from folding import made_up_fold
from fresh_process import HUNG_SECONDS
from matplotlib.image import imread
from transformers.models.esmfold2.protein_utils import PROTEIN_1TO3, PROTEIN_HEAVY_ATOMS

FACTS = [["Model", "biohub/<ESMFold2>"], ["Seconds", "1.50"]]
FILES = {"pdb": "it.pdb", "mmcif": "it.cif", "rank_2_mmcif": "it_rank_2.cif"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Reader(HTMLParser):
    """The page's text, rows of tables, scripts by their ids, and whatever has an address."""

    def __init__(self, page):
        super().__init__()
        self.text, self.rows, self.scripts, self.addresses, self.tags = "", [], {}, [], []
        self._script, self._in_row = None, False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        leading = {"src", "href", "action", "data"} & given.keys()
        self.addresses += [given[name] for name in leading]
        if tag == "script":
            self._script = given.get("id", "code")
        elif tag == "tr":
            self.rows.append([])
            self._in_row = True

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None
        elif tag == "tr":
            self._in_row = False

    def handle_data(self, text):
        if self._script:
            self.scripts[self._script] = self.scripts.get(self._script, "") + text
            return
        self.text += text
        if self._in_row and text.strip():
            self.rows[-1].append(text)


def helices(samples=1, name="made-up"):
    """A made-up complex of two helices side by side."""
    result = made_up_fold("MQIFVKTLTGKTITLEVEPSD:MQIFVKTLTGKTI", samples, name)
    turned = {"N": (1.55, -0.85, -28), "CA": (2.28, 0, 0), "C": (1.66, 1.1, 27), "O": (2, 2.3, 25)}
    atoms = []
    for chain, sequence in enumerate(result.record.chains):
        for number, letter in enumerate(sequence):
            for atom in PROTEIN_HEAVY_ATOMS[PROTEIN_1TO3[letter]]:
                radius, rise, turn = turned.get(atom, (3.5, 0.2, -20))
                angle = math.radians(100 * number + turn)
                x, y = radius * math.cos(angle), radius * math.sin(angle)
                atoms.append((x + 12 * chain, y, 1.5 * number + rise))
    result.coords = torch.tensor(atoms).repeat(samples, 1, 1)
    return result


def page(result, note=""):
    mmcif = mmcif_of(result, result.best, "a model", [])
    return page_of(result, mmcif, FACTS, FILES, note)


def test_the_page_has_all_that_it_shows():
    result = helices(samples=2)
    result.pae[0, 1], result.pae[0, 2] = 31.99, 40
    read = Reader(page(result, "random weights"))
    assert "34 residues, mean pLDDT 50.0, pTM 0.800, ipTM 0.400, 2 chains" in read.text
    assert "Random weights." in read.text
    assert ["Model", "biohub/<ESMFold2>"] in read.rows and ["Seconds", "1.50"] in read.rows
    assert ["1", "0.480", "0.800", "0.400", "50.0", "it.cif"] in read.rows
    assert ["2", "0.300", "0.500", "0.250", "50.0", "it_rank_2.cif"] in read.rows
    assert ["pdb", "it.pdb"] in read.rows and ["mmcif", "it.cif"] in read.rows
    assert ["A", "0.633"] in read.rows and ["B", "0.633"] in read.rows  # of 0.367 and 0.633
    data = json.loads(read.scripts["data"])
    assert [(chain["name"], chain["start"]) for chain in data["chains"]] == [("A", 0), ("B", 21)]
    assert data["mmcif"] == mmcif_of(result, 1, "a model", [])
    assert data["plddt"][:2] == [0, 3] and len(data["plddt"]) == 34
    errors = base64.b64decode(data["pae"])
    assert len(errors) == 34**2
    # Row by row: residue 2 aligned on residue 1 first, then what is beyond the scale.
    assert [error / data["pae_steps"] for error in errors[:4]] == pytest.approx(
        [0, 31.99, 255 / 7, 0.3], abs=0.08
    )
    assert errors[34] / data["pae_steps"] == 1
    assert len(read.scripts["viewer"]) > 10**6


def test_a_single_chain_has_no_word_of_several():
    read = Reader(page(made_up_fold("MQIF")))
    assert "ipTM" not in read.text and "chains" not in read.text


def test_nothing_in_a_page_comes_from_elsewhere():
    for text in (page(helices()), index_of([])):
        read = Reader(text)
        assert set(read.addresses) <= {*FILES.values(), "summary.csv"}
        assert not {"link", "img", "iframe", "object"} & set(read.tags)
        assert "default-src 'none'" in text


@pytest.mark.parametrize("name", ["</script><b>x", "a&b<i>", "{{data}}", 'q"uote', "größe"])
def test_names_are_shown_as_they_are(name):
    read = Reader(page(made_up_fold("MQIF", name=name)))
    assert f"{name}, folded by ESMFold2" in read.text
    assert {"b", "i"} & set(read.tags) <= {"i"} and read.tags.count("i") == 4  # the bands' squares
    assert json.loads(read.scripts["data"])["chains"][0]["sequence"] == "MQIF"
    entry = {"name": name, "status": "failed", "error": name}
    assert Reader(index_of([entry])).rows[-1] == [name, name]


def test_the_index_leads_to_the_pages():
    entries = [
        {"name": "one", "status": "folded", "files": {"page": "one.html"}, "chains": 1,
         "residues": 76, "mean_plddt": 0.5, "ptm": 0.25, "iptm": None, "seconds": 3.25,
         "faults": ["out/one.png: can't be drawn"]},
        {"name": "two", "status": "failed", "error": "two: the sequence is empty"},
    ]  # fmt: skip
    read = Reader(index_of(entries))
    assert "1 of 2 proteins folded" in read.text
    assert read.addresses == ["summary.csv", "one.html"]
    numbers = ["1", "76", "50.0", "0.250", "3.2"]
    assert read.rows[1:] == [
        ["one", *numbers, "out/one.png: can't be drawn"],
        ["two", "two: the sequence is empty"],
    ]


def browse(path, *more):
    """The page's DOM after its scripts have run, and what the console says."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader", "--virtual-time-budget=30000", "--enable-logging=stderr",
         "--v=0", "--window-size=1240,1150", *more, f"file://{path}"],
        capture_output=True, text=True, timeout=HUNG_SECONDS,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    return done.stdout, console


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_the_page_and_asks_for_nothing(tmp_path):
    # What a policy forbids is said on the console, and this one forbids every address.
    path, picture = tmp_path / "it.html", tmp_path / "it.png"
    hover = """
        addEventListener("load", () => {
          const point = (id, across, down) => {
            const part = document.getElementById(id), box = part.getBoundingClientRect();
            part.dispatchEvent(new MouseEvent("mousemove", {
              clientX: box.left + across * box.width, clientY: box.top + down * box.height }));
          };
          point("pae", 0.99, 0.01); point("plddt", 0.98, 0.5);
        });"""
    path.write_text(page(helices()).replace("</body>", f"<script>{hover}</script></body>"))
    dom, console = browse(path, "--dump-dom")
    assert console == []
    assert 'data-drawn="all"' in dom
    assert "B I13, aligned on A M1: 3.3 Å" in dom
    assert "B I13: pLDDT 100.0" in dom
    assert dom.count('class="break"') == 3  # two lines on the map, one in the plot
    assert dom.count("<circle") == 34

    browse(path, f"--screenshot={picture}")
    structure = imread(picture)[220:640, 30:730, :3]
    red, green, blue = structure[..., 0], structure[..., 1], structure[..., 2]
    for band, there in {
        "blue": (blue > red + 0.3) & (blue > green + 0.2),
        "yellow": (red > 0.5) & (green > 0.45) & (blue < 0.3),
        "orange": (red > 0.5) & (green < red - 0.2) & (blue < red - 0.3),
    }.items():
        assert there.sum() > 100, band
    index = tmp_path / "index.html"
    index.write_text(index_of([{"name": "two", "status": "failed", "error": "no"}]))
    dom, console = browse(index, "--dump-dom")
    assert console == [] and ">two<" in dom
