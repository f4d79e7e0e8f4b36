"""The examples run as they stand, each in a process of its own, and the numbers are right."""

import os
import re
import sys
from pathlib import Path

import pytest
from fresh_process import ROOT, python_output
from peers import esm_peer, peer

pytest.importorskip("kernels")

RUN = (
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
NUMBER = r"(\d\.\de[+-]\d\d)"


def printed_by(example: str, *arguments: str) -> str:
    search_path = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "tools/src"))
    path = str(ROOT / "examples" / example)
    return python_output(RUN, path, *arguments, PYTHONPATH=search_path)


def test_fold_with_kernel():
    pytest.importorskip("transformers")
    output = printed_by("fold_with_kernel.py")
    swapped, sites = re.search(r"(?m)^sites swapped: (\d+) of (\d+)$", output).groups()
    assert swapped == sites == "12"
    rows = re.findall(rf"(?m)^(\w+): \[.*\], at most {NUMBER} from the stock path's$", output)
    assert [name for name, _ in rows] == ["distogram_logits", "plddt", "ptm"]
    assert all(float(difference) < 1e-3 for _, difference in rows)
    # Were the layer not called, the two folds would be equal to the last bit.
    assert float(rows[0][1]) > 0


def test_sharded_pairs():
    """Two processes with the rows of one pair tensor."""
    path = str(ROOT / "examples" / "sharded_pairs.py")
    launch = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
    arguments = ("--standalone", "--nproc-per-node", "2", path, "--length", "17", "--train")
    output = python_output(launch, *arguments, OMP_NUM_THREADS="1")
    devices = r"(?:cpu|cuda:\d)"
    rows = re.findall(rf"(?m)^rank (\d) of 2 on {devices}: \[1, (\d+), 17, 32\]$", output)
    assert sorted(rows) == [("0", "9"), ("1", "8")]
    for what, bound in (("from one process", 1e-6), ("of the parameters' gradients", 5e-6)):
        difference = re.search(rf"(?m)^relative difference {what}: {NUMBER}$", output)[1]
        assert float(difference) <= bound


def test_any_model():
    output = printed_by("any_model.py")
    assert re.search(r"(?m)^block: \[2, 40, 40, 64\] on (cpu|cuda)$", output)
    rows = re.findall(rf"(?m)^(\w+): relative difference from plain PyTorch {NUMBER}$", output)
    assert [direction for direction, _ in rows] == ["outgoing", "incoming"]
    # Twice the budget of one float32 result: plain PyTorch has an error of its own.
    assert all(0 < float(difference) <= 1e-5 for _, difference in rows)
    assert "parameters without a gradient: 0" in output.splitlines()


def printed_by_each(examples: list[str], before: str = "") -> list[str]:
    """The output of several examples, in one process, since most of their time is the imports."""
    script = f"""
        import runpy, sys
        {before}
        for example in sys.argv[1:]:
            runpy.run_path(example, run_name="__main__")
            print("--")
        """
    paths = [str(ROOT / "examples" / f"{example}.py") for example in examples]
    printed = python_output(script, *paths).split("--\n")
    assert printed.pop() == ""
    return printed


def assert_agrees(output: str, swapped: int, of: int) -> None:
    """The report's numbers, and that every result is near the original's."""
    assert f"{of} found, {swapped} swapped, {of - swapped} left\n" in output
    assert "in place: False" not in output
    differences = re.findall(rf"largest relative difference {NUMBER}", output)
    assert differences and all(0 < float(difference) <= 1e-5 for difference in differences)


def test_other_models():
    pytest.importorskip("transformers")
    examples = ["in_boltz", "in_protenix", "in_openfold", "in_chai"]
    boltz, protenix, openfold, chai = printed_by_each(examples)
    assert_agrees(boltz, 4, of=4)
    assert_agrees(protenix, 2, of=2)
    assert_agrees(openfold, 2, of=2)
    assert_agrees(chai, 0, of=1)


def test_other_models_with_their_own_modules():
    """Once more with the peers' modules, which an example takes where it can import them."""
    examples = {"boltz": "in_boltz", "protenix": "in_protenix", "openfold3": "in_openfold"}
    folders = []
    for name in examples:
        peer(name)
        folders.append(str(Path(sys.modules[name].__path__[0]).parent))
    imports = f"from peers import peer; sys.path += {folders}; "
    imports += "; ".join(f"peer({name!r})" for name in examples)
    outputs = printed_by_each([*examples.values()], imports)
    for name, output in zip(examples, outputs, strict=True):
        assert output.startswith(f"modules: of {name}\n")
        assert_agrees(output, *((4, 4) if name == "boltz" else (2, 2)))


def test_esm_with_its_own_modules():
    folder = Path(esm_peer().__file__).parents[3]
    imports = f"sys.path += [{str(folder)!r}]; from peers import esm_peer; esm_peer()"
    (output,) = printed_by_each(["in_esm"], imports)
    for found in ("multiplications: 4", "transitions: 2", "layers: 2"):
        assert re.search(rf"{found} found, {found[-1]} swapped, 0 left\n", output)
    differences = re.findall(rf"largest relative difference {NUMBER}", output)
    assert len(differences) == 3
    assert all(0 < float(difference) <= 1e-5 for difference in differences)


def test_esm_that_is_not_there_is_asked_for():
    script = "import runpy, sys; sys.modules['esm'] = None; runpy.run_path(sys.argv[1])"
    with pytest.raises(AssertionError, match="status 1.*\n*.*pip install esm==3.4.1.post1"):
        python_output(script, str(ROOT / "examples" / "in_esm.py"))


def test_finetune(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "finetune.png"
    output = printed_by("finetune.py", "--length", "14", "--width", "16", "--layers", "1",
                        "--steps", "3", "--device", "cpu", "--out", str(plot))  # fmt: skip
    swapped, sites = re.search(r"(?m)^sites swapped: (\d+) of (\d+)$", output).groups()
    assert swapped == sites
    assert re.search(r"(?m)^modules patched: [1-9]\d*, left: 0$", output)
    losses = re.findall(r"(?m)^([\w, ]+): loss (\d\.\d+) to (\d\.\d+), .* steps a second", output)
    assert [name for name, *_ in losses] == ["ours", "ours, patched", "stock"]
    assert all(float(last) < float(first) for _, first, last in losses)
    difference = float(re.search(rf"the losses differ by at most {NUMBER} of them", output)[1])
    assert 0 <= difference < 1e-5
    assert plot.stat().st_size > 1000
