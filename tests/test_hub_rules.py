"""The Kernel Hub's rules for a package: its imports, its layers, what importing it may touch.

The rules are those of "Kernel requirements" in the documentation of the kernels library. The built
variant, which the Hub serves, must obey them.
"""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.folding.model import check_swappable
from fresh_process import ROOT, python_output
from helpers import PUBLIC_NAMES

VARIANT = ROOT / "build" / "torch-universal"
MODULES = sorted(path.relative_to(VARIANT).as_posix() for path in VARIANT.rglob("*.py"))
METADATA = json.loads((VARIANT / "metadata.json").read_text())
BUILD_ID = METADATA["id"]
# The modules that import Triton, or a module that does: the three stages, and two whole folders.
STAGES = {"fused_dual_gemm.py", "fused_ln_residual.py", "trimul_einsum_triton.py"}
WITHOUT_TRITON = {f"triton_parts/{name}.py" for name in ("__init__", "device", "settings")}
NEEDS_TRITON = STAGES | {
    module for module in MODULES
    if module.startswith(("triton_path/", "triton_parts/", "hopper/"))
    and module not in WITHOUT_TRITON
}  # fmt: skip
LAYER_VARIABLES = {"can_torch_compile", "has_backward"}


def parse(module: str) -> ast.Module:
    return ast.parse((VARIANT / module).read_text(), filename=module, feature_version=(3, 10))


def imported(node: ast.AST) -> set[str]:
    """The packages that an import statement names; "." for the package itself."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {"."} if node.level else {node.module.partition(".")[0]}
    return set()


def test_the_variant_is_a_package_of_several_modules():
    assert {"__init__.py", "_ops.py", "layers.py", *NEEDS_TRITON} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_code_is_python_3_10_and_imports_only_what_the_hub_allows(module: str):
    packages = set().union(*(imported(node) for node in ast.walk(parse(module))))
    assert packages <= sys.stdlib_module_names | {".", "torch", "triton"}


@pytest.mark.parametrize("module", MODULES)
def test_triton_is_imported_by_the_stages_alone(module: str):
    tree = parse(module)
    at_import = set().union(*(imported(node) for node in tree.body))
    assert module in NEEDS_TRITON or "triton" not in at_import

    # The other modules import those that need Triton only inside a function.
    needed = {name.removesuffix(".py").removesuffix("/__init__") for name in NEEDS_TRITON}
    folder = Path(module).parent
    from_the_package = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (folder if node.level == 1 else folder.parent) / (node.module or "").replace(
                ".", "/"
            )
            from_the_package |= {base.as_posix(), *[
                (base / alias.name).as_posix() for alias in node.names
            ]}
    assert module in NEEDS_TRITON or not from_the_package & needed


def test_layers_are_pure():
    layers = [node for node in parse("layers.py").body if isinstance(node, ast.ClassDef)]
    assert [layer.name for layer in layers] == ["ESMFold2TriangleMultiplication"]
    for layer in layers:
        methods, variables = set(), set()
        for node in layer.body:
            if isinstance(node, ast.FunctionDef):
                methods.add(node.name)
            elif isinstance(node, ast.Assign):
                variables |= {target.id for target in node.targets}
            elif isinstance(node, ast.AnnAssign):
                # A bare annotation names a member of the adopting module; a value makes a variable.
                variables |= {node.target.id} if node.value is not None else set()
            else:
                assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert methods == {"forward"}
        assert variables <= LAYER_VARIABLES


def test_layers_are_exported_and_of_the_right_kind(kernel):
    assert kernel.__all__ == PUBLIC_NAMES
    layer = kernel.layers.ESMFold2TriangleMultiplication
    assert issubclass(layer, torch.nn.Module)
    assert layer.__init__ is torch.nn.Module.__init__
    assert (layer.has_backward, layer.can_torch_compile) == (True, True)
    assert all(callable(getattr(kernel, name)) for name in kernel.__all__ if name != "layers")


def test_import_is_inert():
    script = """
        import json, logging, random, sys, warnings
        import torch
        from fresh_process import import_package

        def state():
            return {
                "warning filters": list(map(repr, warnings.filters)),
                "logging": [logging.root.level, list(map(repr, logging.root.handlers))],
                "import hooks": [repr(hook) for hook in (*sys.meta_path, *sys.path_hooks)],
                "sys.path": list(sys.path),
                "random": [repr(random.getstate()), repr(torch.get_rng_state().sum())],
                "float32 matmul precision": torch.get_float32_matmul_precision(),
                "cuda tf32": torch.backends.cuda.matmul.allow_tf32,
                "cudnn": [torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark],
                "default dtype": str(torch.get_default_dtype()),
                "default device": str(torch.get_default_device()),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "grad": torch.is_grad_enabled(),
                "threads": torch.get_num_threads(),
                "cuda started": torch.cuda.is_initialized(),
                "triton imported": any(name.partition(".")[0] == "triton" for name in sys.modules),
            }

        # What Python reports of the import. Equal environments would not do: the test process has
        # imported the kernel already, and hands its own environment to this one.
        watched = ("open", "os.listdir", "os.putenv", "os.unsetenv", "socket.connect",
                   "subprocess.Popen")
        events, watching = [], False
        def audit(event, arguments):
            if watching and event in watched:
                events.append([event, str(arguments[0])])
        sys.addaudithook(audit)

        asked = []
        def spy(name):
            def asked_for(*arguments, **keywords):
                asked.append(name)
                return original(*arguments, **keywords)
            original = getattr(torch.cuda, name)
            setattr(torch.cuda, name, asked_for)
        for name in ("is_available", "device_count", "current_device", "get_device_capability",
                     "get_device_name", "get_device_properties"):
            spy(name)

        before = state()
        watching = True
        import_package(*sys.argv[1:])
        watching = False
        print(json.dumps([before, state(), events, asked]))
    """
    before, after, events, asked = json.loads(python_output(script, BUILD_ID, str(VARIANT)))
    assert not before["triton imported"] and not before["cuda started"]
    assert after == before
    assert asked == []
    opened = [Path(name) for event, name in events if event == "open"]
    assert any(path.name.startswith("layers.") for path in opened)
    assert [path for path in opened if path.suffix not in (".py", ".pyc")] == []
    # The import system lists the package's own folders to find its modules.
    others = [event for event in events if event[0] != "open"]
    assert {event for event, _ in others} == {"os.listdir"}
    assert all(Path(name).is_relative_to(VARIANT) for _, name in others)


def test_the_kernel_computes_where_triton_is_absent():
    script = """
        import sys
        from fresh_process import import_package

        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, NoTriton())

        from helpers import make_problem, reference, relative_error, run
        kernel = import_package(*sys.argv[1:])
        for direction in ("outgoing", "incoming"):
            problem = make_problem(7, 16, direction=direction, mask="bool", residual=True)
            assert relative_error(run(kernel, problem), reference(problem)) < 5e-6
        assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
        print("computed")
    """
    assert python_output(script, BUILD_ID, str(VARIANT)).strip() == "computed"


def test_every_op_carries_the_id_of_the_build():
    script = """
        import sys
        import torch
        from fresh_process import import_package

        before = set(torch._C._dispatch_get_all_op_names())
        import_package(*sys.argv[1:])
        print(*sorted(set(torch._C._dispatch_get_all_op_names()) - before))
    """
    names = python_output(script, BUILD_ID, str(VARIANT)).split()
    assert f"{BUILD_ID}::trimul_fwd" in names
    assert [name for name in names if not name.startswith(f"{BUILD_ID}::")] == []


def test_transformers_takes_this_kernel_for_its_own():
    try:
        check_swappable()
    except UserError as versions_that_do_not_fit:
        pytest.skip(str(versions_that_do_not_fit))
    # The repository, revision and layer are whatever transformers asks the kernels library for.
    script = """
        import inspect
        from kernels import Mode, get_kernel
        from transformers.integrations.hub_kernels import get_kernel_mapping_transformers

        asked = get_kernel_mapping_transformers()["EsmFold2TriangleMultiplication"]["cuda"]
        layer = asked[Mode.INFERENCE].load()
        assert layer.__name__ == "ESMFold2TriangleMultiplication", layer
        kernel = get_kernel("biohub/esmfold2-trimul", revision="main")
        assert kernel.layers.ESMFold2TriangleMultiplication is layer
        print(inspect.getfile(layer))
    """
    where = python_output(script, LOCAL_KERNELS=f"biohub/esmfold2-trimul={ROOT}")
    assert Path(where.strip()) == VARIANT / "layers.py"


def test_the_card_has_the_front_matter_of_the_hub():
    card = (ROOT / "CARD.md").read_text()
    empty, front_matter, body = card.split("---\n", 2)
    entries = yaml.safe_load(front_matter)
    assert empty == "" and body.lstrip().startswith("# esmfold2-trimul-kernel")
    assert entries["library_name"] == "kernels"
    assert entries["license"] == METADATA["license"].lower()
    # kernel-builder fills in the card as a template: all that looks like a tag is taken for one.
    assert not any(tag in card for tag in ("{{", "{%", "{#"))


def test_get_kernel_takes_the_version_of_build_toml(tmp_path):
    """From the Hub's cache, with the network away: laid out as the Hub's client does."""
    (call,) = re.findall(r"kernels\.get_kernel\(.*\)", (ROOT / "docs" / "use.md").read_text())
    repository = re.search(r'repo-id = "(.*)"', (ROOT / "build.toml").read_text())[1]
    version = METADATA["version"]
    assert call == f'kernels.get_kernel("{repository}", version={version})'
    cached, commit = tmp_path / f"kernels--{repository.replace('/', '--')}", "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / f"v{version}").write_text(commit)
    shutil.copytree(VARIANT, cached / "snapshots" / commit / "build" / VARIANT.name)
    script = """
        import sys
        import kernels
        from helpers import make_problem, reference, relative_error, run

        kernel = eval(sys.argv[1])
        problem = make_problem(7, 16)
        assert relative_error(run(kernel, problem), reference(problem)) < 5e-6
        print(kernel.__name__, kernel.__file__)
        try:
            eval(sys.argv[1].replace("version=1", "version=2"))
        except ValueError as error:
            print(error)
    """
    printed = python_output(script, call, KERNELS_CACHE=str(tmp_path)).splitlines()
    name, file = printed[0].split()
    assert name == BUILD_ID and Path(file).is_relative_to(cached)
    assert printed[1].startswith(f"Version {version + 1} not found, available versions: {version}")
