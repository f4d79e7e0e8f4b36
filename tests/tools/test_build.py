"""build/torch-universal and the command that makes it: equal to the sources, and loadable."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from esmfold2_trimul_tools.build import build_variant, check_variant
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.repository import ROOT_VARIABLE, VARIANT, find_root, load_kernel
from fresh_process import ROOT, python_output
from helpers import PUBLIC_NAMES
from kernels._rust import Backend, Digest, DigestAlgorithm, Metadata

PACKAGE = "esmfold2_trimul_kernel"
SOURCES = Path("torch-ext", PACKAGE)
FOLDERS = {
    "aten_path", "carriers", "configs", "hopper", "models", "sharded_schedule", "triton_parts",
    "triton_path", PACKAGE,
}  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A kernel repository of its own, with its variant built, to change at will."""
    root = tmp_path / "repository"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "torch-ext", root / "torch-ext", ignore=ignored)
    shutil.copy(ROOT / "build.toml", root)
    build_variant(root)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, bytecode included."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_checked_in_variant_equals_the_sources():
    assert check_variant(ROOT) == []


def test_build_is_deterministic(copy: Path):
    first = build_variant(copy)
    assert first.written == ()
    before = contents(first.variant)
    shutil.rmtree(first.variant)

    again = build_variant(copy)
    assert again.build_id == first.build_id
    assert contents(again.variant) == before
    assert before.keys() == set(again.files) == set(again.written)


def test_build_has_the_files_that_the_hub_wants(copy: Path):
    result = build_variant(copy)
    sources = {
        path.relative_to(copy / SOURCES).as_posix()
        for path in (copy / SOURCES).rglob("*")
        if path.suffix in (".py", ".json", ".typed")
    }
    assert "triton_parts/configs/default.json" in sources and "layers.py" in sources
    assert set(result.files) == sources | {"_ops.py", "metadata.json", f"{PACKAGE}/__init__.py"}
    for name in sources:
        assert (result.variant / name).read_bytes() == (copy / SOURCES / name).read_bytes()


def test_kinds_of_file_that_build_toml_does_not_list_stay_out(copy: Path):
    (copy / SOURCES / "notes.txt").write_text("not for the Hub")
    assert check_variant(copy) == []
    text = (copy / "build.toml").read_text()
    (copy / "build.toml").write_text(text.replace('"py",', '"py", "txt",'))
    assert f"{VARIANT.as_posix()}/notes.txt is missing" in check_variant(copy)
    assert "notes.txt" in build_variant(copy).files


def test_metadata_says_what_build_toml_says(copy: Path):
    result = build_variant(copy)
    metadata = Metadata.read_from_file(result.variant / "metadata.json")
    assert metadata.id == result.build_id and metadata.id.isidentifier()
    assert metadata.name.python_name == PACKAGE
    assert (metadata.version, metadata.license) == (1, "Apache-2.0")
    version = f'__version__ = "{metadata.version}.'  # build.toml has the first number alone
    assert version in (result.variant / "__init__.py").read_text()
    assert metadata.python_depends == []
    assert metadata.backend.backend_type == Backend.CUDA
    assert metadata.backend.archs == ["8.0+PTX"]


@pytest.mark.parametrize("capability, supported", [
    ((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 1), True),
])  # fmt: skip
def test_the_hubs_library_refuses_gpus_that_the_kernels_do_not_run_on(
    submodule, monkeypatch, capability, supported
):
    from kernels.validate import ArchValidator

    assert submodule("paths")._MIN_CAPABILITY == (8, 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    check = ArchValidator().validate_metadata
    metadata = Metadata.read_from_file(ROOT / VARIANT / "metadata.json")
    if supported:
        check(metadata=metadata, variant=VARIANT.name)
    else:
        with pytest.raises(RuntimeError, match="CUDA capability 7.5 .* is not supported"):
            check(metadata=metadata, variant=VARIANT.name)


def test_recorded_digest_holds_and_counts_no_bytecode(copy: Path):
    variant = build_variant(copy).variant
    (variant / "__pycache__").mkdir()
    (variant / "__pycache__" / "layers.cpython-311.pyc").write_bytes(b"bytecode")

    recorded = Metadata.read_from_file(variant / "metadata.json").digest
    assert recorded.algorithm == DigestAlgorithm.SHA256
    recorded.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    assert recorded.files.keys() == contents(variant).keys() - {
        "metadata.json",
        "__pycache__/layers.cpython-311.pyc",
    }
    assert check_variant(copy) == []


def test_check_reports_a_changed_source(copy: Path):
    with (copy / SOURCES / "layers.py").open("a") as source:
        source.write("# changed\n")
    problems = check_variant(copy)
    assert f"{VARIANT.as_posix()}/layers.py differs from what the sources give" in problems
    # The id follows the sources, so the files that carry it differ too.
    assert f"{VARIANT.as_posix()}/_ops.py differs from what the sources give" in problems
    assert not any("is missing" in problem or "is extra" in problem for problem in problems)


def test_check_reports_missing_and_extra_files_and_the_digest(copy: Path):
    variant = copy / VARIANT
    (variant / "_call.py").unlink()
    (variant / "stale.py").write_text("")
    assert check_variant(copy) == [
        f"{VARIANT.as_posix()}/_call.py is missing",
        f"{VARIANT.as_posix()}/stale.py is extra: the sources don't give it",
        "digest: Missing file: _call.py",
        "digest: Unknown file: stale.py",
    ]


def test_check_reports_unreadable_metadata_and_a_missing_digest(copy: Path):
    metadata = copy / VARIANT / "metadata.json"
    metadata.write_text("{")
    assert any(problem.startswith("metadata.json can't be read") for problem in check_variant(copy))
    metadata.write_text(
        '{"name": "k1", "id": "k1", "version": 1, "license": "Apache-2.0", '
        '"python-depends": [], "backend": {"type": "cuda"}}'
    )
    assert "metadata.json has no digest" in check_variant(copy)


def test_check_reports_a_variant_that_was_never_built(copy: Path):
    shutil.rmtree(copy / "build")
    problems = check_variant(copy)
    assert f"{VARIANT.as_posix()}/__init__.py is missing" in problems
    assert not (copy / "build").exists()


def test_build_removes_what_does_not_belong(copy: Path):
    variant = copy / VARIANT
    stale = ["stale.py", "old/deep/stale.json"]
    for stray in (*stale, "__pycache__/x.pyc", "models/__pycache__/y.pyc"):
        (variant / stray).parent.mkdir(parents=True, exist_ok=True)
        (variant / stray).write_text("")

    result = build_variant(copy)
    assert sorted(result.removed) == sorted(stale)
    assert contents(variant).keys() == set(result.files)
    assert {path.name for path in variant.rglob("*") if path.is_dir()} == FOLDERS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("edition = 5", "edition = 99"), "build.toml: .*edition"),
        (("torch-noarch", "torch"), r"must have a \[torch-noarch\] section.*are general, torch"),
        (("esmfold2-trimul-kernel", "other-kernel"), "torch-ext/other_kernel has no __init__.py"),
    ],
)
def test_a_build_toml_that_does_not_fit_is_refused(copy: Path, change, message: str):
    # Without the entry that another section may not have.
    text = re.sub("cuda_capabilities.*", "", (copy / "build.toml").read_text())
    (copy / "build.toml").write_text(text.replace(*change))
    with pytest.raises(UserError, match=message):
        build_variant(copy)


def test_a_missing_build_toml_is_refused(copy: Path):
    (copy / "build.toml").unlink()
    with pytest.raises(UserError, match="build.toml is missing: it describes the kernel"):
        check_variant(copy)


@pytest.mark.parametrize("order", ["flat first", "nested alone"])
def test_both_import_layouts_export_the_same_symbols(order: str):
    # Libraries from before the flat layout import the folder of the kernel's name.
    script = """
        import sys
        from pathlib import Path
        from fresh_process import import_package
        from kernels import get_local_kernel

        root, folder, order = sys.argv[1:]
        flat = get_local_kernel(Path(root)) if order == "flat first" else None
        nested = import_package("older_library", folder)
        if flat is None:
            flat = sys.modules[nested.layers.__name__.rpartition(".")[0]]
        assert nested.__all__ == list(flat.__all__), (nested.__all__, flat.__all__)
        assert nested.__version__ == flat.__version__
        assert all(getattr(nested, name) is getattr(flat, name) for name in flat.__all__)
        print(*nested.__all__)
    """
    printed = python_output(script, str(ROOT), str(ROOT / VARIANT / PACKAGE), order)
    assert printed.split() == PUBLIC_NAMES


def test_kernels_info_describes_the_repository():
    # `kernels info .`, without relying on where its script was installed.
    command = "import sys; from kernels.cli import main; sys.argv[0] = 'kernels'; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "info", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Name: esmfold2-trimul-kernel" in done.stdout
    assert "Version: 1\n" in done.stdout and "License: Apache-2.0" in done.stdout
    assert "Backends: universal" in done.stdout


def test_two_builds_live_in_one_process(copy: Path):
    with (copy / SOURCES / "_call.py").open("a") as source:
        source.write("# another build\n")
    other = build_variant(copy)
    own = Metadata.read_from_file(ROOT / VARIANT / "metadata.json").id
    assert other.build_id != own

    script = """
        import sys
        from pathlib import Path
        import torch
        from kernels import get_local_kernel
        from helpers import make_problem, reference, relative_error, run

        kernels = [get_local_kernel(Path(root)) for root in sys.argv[1:]]
        print(*(kernel.__name__ for kernel in kernels))
        problem = make_problem(5, 16)
        results = [run(kernel, problem) for kernel in kernels]
        assert torch.equal(*results)
        assert relative_error(results[0], reference(problem)) < 5e-6
    """
    names = python_output(script, str(ROOT), str(copy)).split()
    assert names == [own, other.build_id]


def test_one_build_loads_from_two_paths(copy: Path, tmp_path: Path):
    # LOCAL_KERNELS and get_local_kernel may spell the same folder differently.
    (tmp_path / "link").symlink_to(copy)
    script = """
        import sys
        from pathlib import Path
        import torch
        from kernels import get_local_kernel
        from helpers import make_problem, run

        first, second = (get_local_kernel(Path(root)) for root in sys.argv[1:])
        assert first.layers is second.layers
        problem = make_problem(5, 16)
        print(torch.equal(run(first, problem), run(second, problem)))
    """
    assert python_output(script, str(copy), str(tmp_path / "link")).strip() == "True"


def test_root_is_found_by_argument_then_variable_then_checkout(copy: Path, monkeypatch):
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    assert find_root() == ROOT
    monkeypatch.setenv(ROOT_VARIABLE, str(copy))
    assert find_root() == copy.resolve()
    assert find_root(ROOT) == ROOT


def test_a_root_that_is_none_is_refused_by_the_name_of_its_source(tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match="--kernel-root must name the kernel repository.*got"):
        find_root(tmp_path)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=f"{ROOT_VARIABLE} must name the kernel repository.*got"):
        find_root()


def test_loading_says_when_the_kernel_was_never_built(copy: Path):
    shutil.rmtree(copy / "build")
    with pytest.raises(UserError, match="run `esmfold2-trimul build` first"):
        load_kernel(copy)


def test_without_the_kernels_library_the_build_loads_under_the_same_name():
    script = """
        import sys
        sys.modules["kernels"] = None
        from pathlib import Path
        from esmfold2_trimul_tools.repository import load_kernel
        from helpers import make_problem, reference, relative_error, run

        kernel = load_kernel(Path(sys.argv[1]))
        assert load_kernel(Path(sys.argv[1])) is kernel
        problem = make_problem(5, 16)
        assert relative_error(run(kernel, problem), reference(problem)) < 5e-6
        print(kernel.__name__, kernel.layers.__name__)
    """
    folders = f"{ROOT / 'tests'}{os.pathsep}{ROOT / 'tools' / 'src'}"
    own = Metadata.read_from_file(ROOT / VARIANT / "metadata.json").id
    printed = python_output(script, str(ROOT), PYTHONPATH=folders)
    assert printed.split() == [own, f"{own}.layers"]


def test_load_kernel_gives_the_checked_in_build():
    metadata = Metadata.read_from_file(ROOT / VARIANT / "metadata.json")
    kernel = load_kernel(ROOT)
    assert kernel.__name__ == metadata.id
    assert Path(kernel.__file__) == ROOT / VARIANT / "__init__.py"
