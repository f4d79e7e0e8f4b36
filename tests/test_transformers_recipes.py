"""The ways of docs/use.md to put the kernel into transformers' model, with the network blocked."""

import re

import pytest
from conftest import HAS_GPU
from fresh_process import ROOT, python_output
from selection import slow

pytest.importorskip("kernels")
pytest.importorskip("transformers")

# transformers takes kernels on a GPU alone: without one it is told that the CPU is one, and the
# layer's ATen path computes.
PREPARE = """
    import socket, sys
    import torch
    from folding import tiny_model
    from transformers.integrations import hub_kernels
    from transformers.utils import kernel_config

    asked = []

    def refuse(*arguments, **named):
        asked.append(arguments)
        raise OSError("the network is blocked")

    socket.getaddrinfo = socket.socket.connect = socket.socket.connect_ex = refuse
    model = tiny_model()
    if torch.cuda.is_available():
        model.to("cuda")
    else:
        hub_kernels.get_device_type = kernel_config.get_device_type = lambda device: "cuda"
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
    sites = [part for part in model.modules()
             if type(part).__name__ == "EsmFold2TriangleMultiplicativeUpdate"]

    def swapped():
        return sum(site.forward.__func__ is not type(site).forward for site in sites)

    def results():
        site, generator = sites[0], torch.Generator().manual_seed(0)
        x = torch.randn(1, 9, 9, 16, generator=generator).to(model.device).requires_grad_()
        out = site(x)
        weight = site.proj_bundle.weight
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, weight])]

    def compare(wanted):
        differences = [float((a - b).norm() / b.norm()) for a, b in zip(results(), wanted)]
        print(len(sites), swapped(), "trains" if model.training else "infers", max(differences))

    wanted = results()
    """


def blocks(document: str) -> list[str]:
    """The document's Python code, with this repository for the path that it names."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    return [block.replace("/path/to/esmfold2-trimul-kernel", str(ROOT)) for block in code]


def block_with(document: str, text: str) -> str:
    (block,) = [block for block in blocks(document) if text in block]
    return block


def printed_after(argument: str, script: str, **environment: str) -> list[list[str]]:
    """The words of each line that the script prints; sys.argv[1] is the argument."""
    output = python_output(f"{PREPARE}\n{script}", argument, **environment)
    return [line.split() for line in output.splitlines()]


@pytest.mark.parametrize("offline", ["1", slow("0")])
def test_patch(offline):
    code = 'kernel = kernels.get_local_kernel(Path(root))\nreport = kernel.patch(model)'
    assert code.splitlines()[1] in block_with("docs/use.md", "report.undo()")
    script = f"""
    import kernels
    from pathlib import Path
    root = {str(ROOT)!r}
    exec(sys.argv[1])
    for mode in (model.train, model.eval):
        mode()
        compare(wanted)
    print(len(report.left), len(asked))
    """
    *rows, last = printed_after(code, script, HF_HUB_OFFLINE=offline)
    assert [row[:3] for row in rows] == [["10", "10", "trains"], ["10", "10", "infers"]]
    assert all(0 < float(row[3]) < 1e-5 for row in rows) and last == ["0", "0"]


@pytest.mark.parametrize(
    "document, offline",
    [("docs/use.md", "0"), ("CARD.md", "1"), slow("docs/use.md", "1"), slow("CARD.md", "0")],
)
def test_kernel_config(document, offline):
    """Set in training mode, as it stands there, it serves both; set in eval mode, inference."""
    code = block_with(document, "KernelConfig(")
    assert code.count("model.train()") == 1
    script = """
    exec(sys.argv[1])
    compare(wanted)
    for mode in (model.train, model.eval):
        mode()
        compare(wanted)
    exec(sys.argv[1].replace("model.train()", "model.eval()"))
    compare(wanted)
    model.train()
    compare(wanted)
    print(len(asked))
    """
    *rows, last = printed_after(code, script, HF_HUB_OFFLINE=offline)
    assert [row[1:3] for row in rows] == [
        ["10", "infers"], ["10", "trains"], ["10", "infers"], ["10", "infers"], ["0", "trains"],
    ]  # fmt: skip
    assert all(0 < float(row[3]) < 1e-5 for row in rows[:-1])
    assert float(rows[-1][3]) == 0 and last == ["0"]


def test_the_layer_mapped_by_hand():
    code = block_with("CARD.md", "LocalLayerRepository(")
    if not HAS_GPU:  # as it says there
        code = code.replace('"cuda"', '"cpu"')
    script = """
    exec(sys.argv[1])
    compare(wanted)
    """
    (row,) = printed_after(code, script)
    assert row[:3] == ["10", "10", "infers"] and 0 < float(row[3]) < 1e-5


def test_lines_that_load_a_clone():
    code = [
        block_with("CARD.md", "from kernels import get_local_kernel"),
        block_with("docs/cuequivariance.md", "get_local_kernel("),
    ]
    script = """
    for code in sys.argv[1].split("---"):
        exec(code)
    print(triangle_multiplicative_update is kernel.triangle_multiplicative_update, kernel.__file__)
    """
    (row,) = printed_after("---".join(code), script)
    assert row == ["True", str(ROOT / "build" / "torch-universal" / "__init__.py")]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_environment_variable_needs_the_hub(offline, tmp_path):
    """It raises before our layer is put in, for another kernel that it asks the Hub for."""
    text = (ROOT / "docs" / "use.md").read_text()
    name = re.search(r"export LOCAL_KERNELS=(\S+)=/path/to", text)[1]
    script = """
    try:
        model.set_use_kernels(True)
    except Exception as error:
        print(swapped(), bool(asked), str(error))
    """
    found = {"LOCAL_KERNELS": f"{name}={ROOT}", "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path)}
    row, *_ = printed_after("", script, **found)
    assert row[:2] == ["0", str(offline == "0")]
    assert ("offline mode" if offline == "1" else "the network is blocked") in " ".join(row)


def test_a_config_serves_one_call_and_not_from_pretrained(tmp_path):
    """What docs/use.md says of transformers 5.22.2, which a newer one may do better."""
    script = f"""
    from transformers import EsmFold2Model

    hub_kernels.get_device_type = kernel_config.get_device_type = lambda device: "cuda"
    layer = {f"{ROOT}:ESMFold2TriangleMultiplication"!r}
    make = lambda: kernel_config.KernelConfig(
        {{"EsmFold2TriangleMultiplication": layer}}, use_local_kernel=True
    )
    model.save_pretrained(sys.argv[1])
    config = make()
    model.set_use_kernels(True, config)
    for what in (
        lambda: model.set_use_kernels(True, config),
        lambda: EsmFold2Model.from_pretrained(
            sys.argv[1], use_kernels=True, kernel_config=make()
        ),
    ):
        try:
            what()
            print("works")
        except (ValueError, AttributeError) as error:
            print(type(error).__name__)
    """
    printed = printed_after(str(tmp_path / "model"), script)
    assert printed == [["ValueError"], ["AttributeError"]]
