from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from esmfold2_trimul_tools import doctor
from esmfold2_trimul_tools.links import Links
from fresh_process import ROOT
from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2TriangleMultiplicativeUpdate

VERSIONS = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "numpy": "2.3.5",
    "transformers": "5.22.2",
    "kernels": "0.17.2",
}


def explanation(path: str, reason: str, peak: float) -> SimpleNamespace:
    return SimpleNamespace(path=path, reason=reason, peak=peak)


ON_GPU = explanation("triton", "a cuda device", 3.0)


@pytest.fixture
def machine(monkeypatch):
    """A machine without faults; machine(gpu="cuda", triton=None) changes what the doctor finds."""

    def change(**changes):
        versions = {**VERSIONS, **{name: changes.pop(name) for name in VERSIONS if name in changes}}
        cache_fault = changes.pop("cache_fault", "")
        monkeypatch.setattr(doctor.triton_cache, "cache_folder", lambda: Path("the", "cache"))
        monkeypatch.setattr(doctor.triton_cache, "cache_fault", lambda folder: cache_fault)
        probes = {
            "triton_version": (versions.pop("triton"), ""),
            "triton_distribution": "triton",
            "gpu": None,
            "gpu_description": "a GPU",
            "device_count": 1 if changes.get("gpu") else 0,
            "gloo_available": True,
            "nccl_version": "2.28.9",
            "peer_access": [[True] * 3] * 3,
            "links": (64 << 20, Links(2.5e11, "", "")),
            "nvidia_driver_present": False,
            "swap_problem": "",
            "esmfold2_problem": "",
            "has_local_kernel": True,
            "hub_answers": True,
            "load_kernel": (ROOT, "the kernel"),
            "explain_call": explanation("aten", "a cpu device", 2.0),
            "build_problems": [],
            "c_compiler": "gcc",
            "python_header": "Python.h",
            "cuda_header": "cuda.h",
            "weights_cached": True,
            **({"explain_call": ON_GPU} if changes.get("gpu") else {}),
            **changes,
        }
        monkeypatch.setattr(doctor, "_version", versions.get)
        for name, answer in probes.items():
            monkeypatch.setattr(doctor, f"_{name}", lambda *_, answer=answer: answer)
        return {finding.name: finding for finding in doctor.examine()}

    return change


RECIPES = ("patch(model)", "KernelConfig", "use_kernels=True")


def without_recipes(findings):
    """The findings whose status doesn't depend on whether there is a GPU."""
    return [finding for name, finding in findings.items() if name not in RECIPES]


@pytest.mark.parametrize(
    ("changes", "statuses", "values"),
    [
        ({"gpu": "cuda"}, "ok ok ok", ("works", "works", "works, with the Hub")),
        (
            {}, "ok note note",
            ("works", *["not here: transformers takes kernels on a GPU alone"] * 2),
        ),
        (
            {"gpu": "cuda", "hub_answers": False}, "ok ok note",
            ("works", "works", "the Hub does not answer, which it asks for other kernels too"),
        ),
        (
            {"gpu": "cuda", "has_local_kernel": False}, "ok ok note",
            ("works", "works", "takes the published kernel, from the Hub"),
        ),
        (
            {"gpu": "cuda", "swap_problem": "no layer can be swapped"}, "ok note note",
            ("works", *["not here: transformers and kernels don't fit each other"] * 2),
        ),
        (
            {"gpu": "cuda", "esmfold2_problem": "none", "swap_problem": "none"}, "note note note",
            ("for other models: no ESMFold2", *["not here: no ESMFold2 in transformers"] * 2),
        ),
    ],
)  # fmt: skip
def test_the_recipes_that_work_here(machine, changes, statuses, values):
    findings = machine(**changes)
    recipes = [findings[name] for name in RECIPES]
    assert [recipe.status for recipe in recipes] == statuses.split()
    for recipe, value in zip(recipes, values, strict=True):
        assert recipe.value.startswith(value)
    assert bool(recipes[2].mend) == (recipes[1].status == "ok" and recipes[2].status == "note")


def test_a_machine_without_faults_can_fold(machine):
    for gpu in (None, "cuda"):
        findings = machine(gpu=gpu)
        assert {finding.status for finding in without_recipes(findings)} == {"ok"}
        assert not any(finding.mend for finding in findings.values())
        assert doctor.can_fold(findings.values())
    assert findings["Device"].value == "a GPU"
    assert findings["Path in bfloat16"].value == (
        "triton: a cuda device; 3.00 pair tensors at once"
    )


@pytest.mark.parametrize(
    ("changes", "name", "status", "value", "mend"),
    [
        ({"torch": None}, "PyTorch", "problem", "not installed", "pip install torch"),
        (
            {"nvidia_driver_present": True},
            "Device", "warning", "torch 2.13.0 sees no GPU", "install a CUDA build of torch",
        ),
        ({"triton": None}, "Triton", "note", "not installed: the ATen path", ""),
        ({"triton": None, "gpu": "cuda"}, "Triton", "warning", "not installed", "pip install tri"),
        ({"triton": "3.5.1"}, "Triton", "warning", "3.5.1: the kernels need 3.6", "triton>=3.6"),
        (
            {"triton": "3.5", "triton_distribution": "triton-windows"},
            "Triton", "warning", "3.5: the kernels need 3.6", 'pip install "triton-windows>=3.6"',
        ),
        (
            {"triton": "3.5", "triton_distribution": "triton-xpu"},
            "Triton", "warning", "3.5: the kernels need 3.6", "a newer torch, which brings a newer",
        ),
        (
            {"triton_version": (None, "no libz")},
            "Triton", "note", "can't be imported (no libz): the ATen path", "reinstall triton",
        ),
        (
            {"triton_version": (None, "no libz"), "gpu": "cuda"},
            "Triton", "warning", "can't be imported (no libz)", "reinstall triton",
        ),
        (
            {"cache_fault": "is read-only"},
            "Triton's cache", "note", "the/cache is read-only; needed only", "TRITON_CACHE_DIR",
        ),
        (
            {"cache_fault": "is read-only", "gpu": "xpu"},
            "Triton's cache", "problem", "the/cache is read-only", "TRITON_CACHE_DIR",
        ),
        (
            {"triton": "3.6.0", "numpy": "2.4.1"},
            "NumPy", "warning", "2.4.1: Triton 3.6's interpreter", "numpy<2.4",
        ),
        ({"numpy": None}, "NumPy", "problem", "not installed", "pip install numpy"),
        (
            {"swap_problem": "no layer can be swapped: because"},
            "Swapping layers", "note", "transformers 5.22.2, kernels 0.17.2: only", "because",
        ),
        ({"esmfold2_problem": "too old"}, "ESMFold2", "problem", "transformers: 5.22.2", "too old"),
        ({"kernels": None}, "Kernel build", "note", "not checked", "pip install kernels"),
        (
            {"build_problems": ["_call.py differs", "digest: more"]},
            "Kernel build", "warning", "_call.py differs, and 1 more", "esmfold2-trimul build",
        ),
        (
            {"c_compiler": None},
            "C compiler", "note", "needed only where a GPU runs the kernels", "install gcc",
        ),
        ({"c_compiler": None, "gpu": "cuda"}, "C compiler", "problem", "not found", "install gcc"),
        ({"python_header": None, "gpu": "cuda"}, "Python headers", "problem", "not found", "-dev"),
        ({"cuda_header": None, "gpu": "cuda"}, "CUDA headers", "problem", "not found", "triton"),
        ({"weights_cached": False}, "Model weights", "note", "not in the local", "--random-weigh"),
    ],
)  # fmt: skip
def test_each_fault_is_found_with_its_mend(machine, changes, name, status, value, mend):
    findings = machine(**changes)
    finding = findings[name]
    assert finding.status == status
    assert value in finding.value
    assert mend in finding.mend and bool(mend) == bool(finding.mend)
    # No other finding is raised by it, and only a problem keeps the machine from folding.
    others = [other.status for other in without_recipes(findings) if other is not finding]
    assert {*others} == {"ok"}
    assert doctor.can_fold(findings.values()) == (status != "problem")


def test_one_device_is_said_to_be_one(machine):
    assert machine()["Many GPUs"].value == "the CPU; gloo is there for ranks on CPUs"
    finding = machine(gpu="cuda", gloo_available=False)["Many GPUs"]
    assert finding.value == "1 cuda device; gloo is not there for ranks on CPUs"
    assert machine(gpu="xpu", device_count=2)["Many GPUs"].value.startswith("2 xpu devices; ")


MANY = {"gpu": "cuda", "device_count": 3}
WHAT = "64 MiB from each of 3 GPUs to each other"


def test_many_gpus_have_links(machine):
    findings = machine(**MANY)
    assert "Many GPUs" not in findings
    assert {
        name: (finding.status, finding.value, finding.mend)
        for name, finding in findings.items()
        if name in ("Peer access", "NCCL", "All-to-all", "Symmetric memory")
    } == {
        "Peer access": ("ok", "of 3 GPUs, row by column:\n- y y\ny - y\ny y -", ""),
        "NCCL": ("ok", "2.28.9", ""),
        "All-to-all": ("ok", f"250 GB/s in each direction of a GPU, {WHAT}", ""),
        "Symmetric memory": ("ok", "every GPU writes into the next one's", ""),
    }


@pytest.mark.parametrize(
    ("changes", "name", "status", "value", "mend"),
    [
        (
            {"peer_access": [[True, True, False], [True] * 3, [False, True, True]]},
            "Peer access", "warning", ":\n- y n\ny - y\nn y -", "nvidia-smi topo",
        ),
        ({"nccl_version": None}, "NCCL", "warning", "not in this torch", "a torch that has"),
        (
            {"links": (64 << 20, Links(None, "not done after 120 s", ""))},
            "All-to-all", "warning", f"{WHAT}: not done after 120 s", "NCCL_DEBUG=INFO",
        ),
        (
            {"links": (64 << 20, Links(1e9, "", "no such allocator"))},
            "Symmetric memory", "note", "not to be had: no such allocator", "",
        ),
    ],
)  # fmt: skip
def test_faults_of_links(machine, changes, name, status, value, mend):
    findings = machine(**MANY, **changes)
    finding = findings[name]
    assert finding.status == status and value in finding.value
    assert mend in finding.mend and bool(mend) == bool(finding.mend)
    others = [other.status for other in without_recipes(findings) if other is not finding]
    assert {*others} == {"ok"} and doctor.can_fold(findings.values())


def test_libraries_that_write_the_files_are_looked_for(machine, monkeypatch):
    assert "Files of a fold" not in machine()
    for absent, status in ((["gemmi", "dash_molstar"], "problem"), (["matplotlib"], "warning")):
        monkeypatch.setattr(doctor, "missing", lambda *names, absent=absent: absent)
        finding = machine()["Files of a fold"]
        assert (finding.status, finding.value) == (status, f"no {', '.join(absent)}")
        assert finding.mend == f"pip install {' '.join(absent).replace('_', '-')}"


def test_numpy_2_4_is_well_with_another_triton(machine):
    assert machine(numpy="2.4.1", triton="3.7.1")["NumPy"].status == "ok"


def test_a_gpu_that_takes_the_slow_path_is_warned_of(machine):
    findings = machine(gpu="cuda", explain_call=explanation("aten", "too old", 2.0))
    assert findings["Path in float32"].status == "warning"
    assert findings["Path in float32"].value == "aten: too old; 2.00 pair tensors at once"


def test_newer_triton_needs_no_compiler(machine):
    findings = machine(triton="3.8.0", gpu="cuda", c_compiler=None, python_header=None)
    assert findings["Triton's launcher"].status == "ok"
    assert "C compiler" not in findings
    assert doctor.can_fold(findings.values())


@pytest.mark.parametrize(
    ("found", "numbers"),
    [
        ("3.9.0", (3, 9)),
        ("3.9rc1", (3, 9)),
        ("3.10.0.post26", (3, 10)),
        ("3.9.0+git1a2b3c", (3, 9)),
        ("4", (4,)),
    ],
)
def test_versions_of_any_form_are_read(machine, found, numbers):
    assert doctor._numbers(found) == numbers
    findings = machine(triton=found, gpu="cuda", c_compiler=None)
    assert findings["Triton"].value == f"{found}, from triton"
    assert findings["Triton's launcher"].status == "ok"


@pytest.mark.parametrize(
    "distribution",
    ["triton-windows", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-xpu"],
)
def test_triton_of_any_distribution_is_found(monkeypatch, distribution):
    module = pytest.importorskip("triton")

    def version(name):
        if "triton" in name and name != distribution:
            raise PackageNotFoundError(name)
        return "0"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"triton": [distribution]})
    (finding,) = doctor._triton("cuda")
    assert finding.status == "ok"
    assert finding.value == f"{module.__version__}, from {distribution}"


def test_what_is_no_triton_is_not_taken_for_it(monkeypatch):
    def find(spec):
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
        return doctor._triton_version()

    assert find(None) == (None, "")
    assert find(ModuleSpec("triton", None, is_package=True)) == (None, "")  # a folder

    def fail(name):
        raise ImportError("libtriton.so: cannot open\nand more")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    found = find(ModuleSpec("triton", None, origin="triton/__init__.py"))
    assert found == (None, "libtriton.so: cannot open")


def test_intel_gpus_need_no_cuda_headers(machine):
    assert "CUDA headers" not in machine(gpu="xpu", cuda_header=None)


def test_a_kernel_that_cant_be_loaded_is_a_problem(machine, monkeypatch):
    machine()

    def fail(_):
        raise FileNotFoundError("no build here\nand more")

    monkeypatch.setattr(doctor, "_load_kernel", fail)
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["Kernel build"].status == "problem"
    assert findings["Kernel build"].value == "no build here"
    assert findings["Kernel build"].mend == "esmfold2-trimul build, or install the tools again"
    assert "Path in float32" not in findings and not findings.keys() & {*RECIPES}
    assert not doctor.can_fold(findings.values())


def test_the_probes_answer_for_this_machine(monkeypatch, tmp_path):
    assert doctor._version("torch").startswith("2.")
    assert doctor._version("no-such-package") is None
    assert doctor._swap_problem() == doctor._esmfold2_problem() == ""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not doctor._hub_answers()
    for value, has in (("", False), ("other/kernel=a", False), ("biohub/esmfold2-trimul=a", True)):
        monkeypatch.setenv("LOCAL_KERNELS", value)
        assert doctor._has_local_kernel() == has
    root, kernel = doctor._load_kernel(None)
    assert (root / "build.toml").is_file()
    found = doctor._explain_call(kernel, torch.device("cpu"), torch.bfloat16)
    assert (found.path, found.peak) == ("aten", 2.0)
    assert isinstance(doctor._build_problems(root), list)
    assert doctor._cuda_header() in (None, "cuda.h, from Triton's wheel")
    assert doctor._device_count(None) == 0 and doctor._gloo_available()
    monkeypatch.delattr(EsmFold2TriangleMultiplicativeUpdate, "kernel_layer_name")
    assert "no layer can be swapped" in doctor._swap_problem()


def test_the_compiler_is_the_one_triton_would_call(monkeypatch, tmp_path):
    for name in ("gcc", "clang", "mycc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert doctor._c_compiler() == str(tmp_path / "gcc")
    (tmp_path / "gcc").unlink()
    assert doctor._c_compiler() == str(tmp_path / "clang")
    monkeypatch.setenv("CC", "mycc")
    assert doctor._c_compiler() == str(tmp_path / "mycc")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert doctor._c_compiler() is None
    monkeypatch.delenv("CC")
    (tmp_path / "clang").unlink()
    assert doctor._c_compiler() is None
    # triton-windows brings one.
    spec = ModuleSpec("triton", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    brought = tmp_path / "runtime" / "tcc" / "tcc.exe"
    brought.parent.mkdir(parents=True)
    brought.write_text("")
    assert doctor._c_compiler() == str(brought)


def test_the_python_header_is_looked_for_where_the_compiler_would(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert doctor._python_header() is None
    (tmp_path / "Python.h").write_text("")
    assert doctor._python_header() == str(tmp_path / "Python.h")


def test_weights_are_cached_when_their_config_is(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert not doctor._weights_cached("biohub/ESMFold2")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "config.json")
    assert doctor._weights_cached("biohub/ESMFold2")
