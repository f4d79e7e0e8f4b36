"""The wheel: built without a network, installed beside nothing of the checkout, used and removed.

The environment has this one's libraries, but neither the tools nor the kernel.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from esmfold2_trimul_tools.repository import PACKAGE, VARIANT
from fresh_process import HUNG_SECONDS, ROOT, STRIPPED

pytest.importorskip("setuptools")
TOOLS = "esmfold2_trimul_tools"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
COMMAND = "Scripts/esmfold2-trimul.exe" if os.name == "nt" else "bin/esmfold2-trimul"


def output(*command, cwd, **environment: str) -> str:
    """What a command prints, with nothing of this checkout on its search path."""
    removed = ("PYTHONPATH", *STRIPPED)
    variables = {name: value for name, value in os.environ.items() if name not in removed}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True,
        timeout=HUNG_SECONDS,
        env=variables | {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_of(folder: Path) -> dict[str, bytes]:
    """Its files but bytecode, by their paths."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A checkout's files that a wheel is made of."""
    root = tmp_path_factory.mktemp("checkout")
    made_by_pip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "LICENSE")
    shutil.copytree(ROOT / "tools", root / "tools", ignore=made_by_pip)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / VARIANT, root / VARIANT, ignore=ignored)
    shutil.copy(ROOT / "LICENSE", root)
    return root


def wheel_of(source, folder: Path) -> Path:
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    output(*command, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return wheel_of(checkout / "tools", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    output(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    libraries = Path(paths["purelib"], "libraries.pth")
    own = sysconfig.get_paths()  # a path in a .pth file brings no editable installs of its folder
    libraries.write_text("\n".join({own["purelib"], own["platlib"]}))
    return folder


@pytest.fixture(scope="module")
def before(environment) -> dict[str, bytes]:
    return files_of(environment)


@pytest.fixture(scope="module")
def python(environment, before, wheel) -> Path:
    """The Python of an environment that has the wheel."""
    name = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    output(*PIP, "--python", environment, "install", "--no-deps", wheel, cwd=environment)
    return environment / name


def test_the_wheel_has_the_build_and_the_license(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    build = files_of(ROOT / VARIANT)
    assert build.keys() >= {"__init__.py", "metadata.json", "py.typed"}
    own = {name: text for name, text in files.items() if name.startswith(f"{PACKAGE}/")}
    assert own == {f"{PACKAGE}/{name}": text for name, text in build.items()}
    assert f"{TOOLS}/data/ubiquitin.fasta" in files
    (license,) = [text for name, text in files.items() if name.endswith("/LICENSE")]
    assert license == (ROOT / "LICENSE").read_bytes()
    (head,) = [text for name, text in files.items() if name.endswith(".dist-info/METADATA")]
    needed = [line for line in head.decode().splitlines() if line.startswith("Requires-Dist")]
    always = [line.split()[1].split(">")[0] for line in needed if "extra ==" not in line]
    assert always == ["rich", "tomli", "torch", "typer"]


def test_a_source_distribution_gives_the_same_wheel(checkout, wheel, tmp_path):
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    output(sys.executable, "-c", script, cwd=checkout / "tools")
    (archive,) = tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(wheel_of(archive, tmp_path)) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        for name in one.namelist():
            assert name.endswith("/RECORD") or one.read(name) == other.read(name), name
    # Nothing was left outside of what .gitignore names.
    assert {path.name for path in checkout.iterdir()} == {"tools", "build", "LICENSE"}
    assert {path.name for path in (checkout / "build").iterdir()} == {VARIANT.name}


def test_without_a_build_there_is_no_wheel(checkout, tmp_path):
    shutil.copytree(checkout / "tools", tmp_path / "tools")
    shutil.copy(checkout / "LICENSE", tmp_path)
    with pytest.raises(AssertionError, match="torch-universal must hold the kernel's build"):
        wheel_of(tmp_path / "tools", tmp_path)


def readme_block(text: str) -> str:
    """The README's one block of code that has the text."""
    blocks = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if text in block]
    return found


def test_the_kernel_computes_from_anywhere(python, tmp_path):
    """And patches, by the README; also where the kernels library loads a copy of the same build."""
    script = f"""
import sys
from importlib.metadata import version
from pathlib import Path
import esmfold2_trimul_kernel as kernel
sys.path.append({str(ROOT / "tests")!r})
from helpers import make_problem, reference, relative_error, run

problem = make_problem(7, 16, mask="bool", residual=True)
packages = [kernel]
try:
    from kernels import get_local_kernel
    packages += [get_local_kernel(Path(root)) for root in (kernel.__path__[0], {str(ROOT)!r})]
except ImportError:
    pass
for package in packages:
    assert relative_error(run(package, problem), reference(problem)) < 5e-6
print(kernel.__file__)
print(kernel.__version__, version("esmfold2-trimul-tools"))
from folding import tiny_model
model = tiny_model()
exec(sys.argv[1])
"""
    lines = readme_block("kernel.patch(model)")
    where, versions, patched, *_ = output(python, "-c", script, lines, cwd=tmp_path).splitlines()
    assert patched == "triangle multiplications: 10 found, 10 swapped, 0 left"
    assert Path(where).is_relative_to(python.parents[1]) and Path(where).parent.name == PACKAGE
    assert len({*versions.split()}) == 1


def test_the_command_finds_it(python, environment, tmp_path):
    command = environment / COMMAND
    build = json.loads((ROOT / VARIANT / "metadata.json").read_text())
    assert f"build {build['id']}\n" in output(command, "--version", cwd=tmp_path)
    findings = json.loads(output(command, "doctor", "--json", cwd=tmp_path))["findings"]
    said = {finding["name"]: finding["value"] for finding in findings}
    assert said["Kernel"].startswith("installed, ") and str(environment) in said["Kernel"]
    assert said["Kernel build"] == "its digest holds"
    with pytest.raises(AssertionError, match=r"status 2\s+error: .*without its sources"):
        output(command, "build", cwd=tmp_path)


def test_a_new_user_folds_a_file(python, environment, tmp_path):
    """The README's two commands, pip's and this, where the Hub can't be reached.

    Of ten records one is bad and one too long. The weights are random: there are no others here.
    """
    pip, fold = readme_block("pip install").split(), readme_block("fold my.fasta").splitlines()[0]
    assert pip[2].strip('"').startswith(f"{TOOLS.replace('_', '-')}[fold]")
    arguments = fold.replace("--model biohub/ESMFold2", "--random-weights").split()
    assert arguments.pop(0) == "esmfold2-trimul" and "--random-weights" in arguments
    good = ["MQIFVK", "TLTGKTI", "GGSA", "MQI:FVK", "AAAAA", "MKV", "WYF", "mqxk"]
    sequences = [*good[:3], "MQZIFV", *good[3:], "MQIFVKTLTGKTITLEVEPSDTIENV"]
    records = [f">protein_{i}\n{sequence}\n" for i, sequence in enumerate(sequences)]
    (tmp_path / "my.fasta").write_text("".join(records))
    quick = ["--max-length", "20", "--steps", "2", "--samples", "1", "--loops", "1"]
    command = [environment / COMMAND, *arguments, *quick]
    nowhere = "http://127.0.0.1:9"
    # A thread that waits for others takes long on a busy machine.
    variables = {"HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "OMP_NUM_THREADS": "1"}
    with pytest.raises(AssertionError) as ended:
        output(*command, cwd=tmp_path, HF_HUB_OFFLINE="0", **variables)
    said = str(ended.value)
    assert said.startswith("status 1\n") and "Traceback" not in said
    assert "8 of 10 folded: results/summary.csv and results/index.html\n" in said
    assert "unknown residue 'Z' at position 3" in said and "more than --max-length 20\n" in said

    with (tmp_path / "results" / "summary.csv").open() as table:
        rows = {row["name"]: row for row in csv.DictReader(table)}
    assert sorted(rows) == sorted(f"protein_{i}" for i in range(10))
    failed = [name for name, row in rows.items() if row["status"] != "folded"]
    assert sorted(failed) == ["protein_3", "protein_9"]
    assert all(rows[name]["error"] for name in failed)
    pages = sorted(path.name for path in (tmp_path / "results").glob("protein*.html"))
    assert len(pages) == 8
    index = (tmp_path / "results" / "index.html").read_text()
    assert all(f'href="{page}"' in index for page in pages)


def test_what_a_fold_needs_is_asked_for_before_it_begins(environment, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['gemmi'] = None\n")
    with pytest.raises(AssertionError, match=r"status 2\s+error: gemmi not installed"):
        command = [environment / COMMAND, "fold", "MQIFVK", "--random-weights"]
        output(*command, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_uninstalled_nothing_is_left(python, environment, before):
    assert files_of(environment).keys() > before.keys()
    output(*PIP, "--python", environment, "uninstall", "-y", TOOLS, cwd=environment)
    assert files_of(environment) == before
    left = [path.name for path in environment.rglob("esmfold2*")]
    assert left == []
