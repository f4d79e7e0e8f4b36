"""What each way changes in a model, and that it takes the change back."""

import sys
import textwrap

import pytest
import torch
from bench_fakes import with_variants
from esmfold2_trimul_tools.bench.rivals import Absent, find_esm
from esmfold2_trimul_tools.bench.whole import ways as subject
from esmfold2_trimul_tools.bench.whole.ways import TRIANGLES
from esmfold2_trimul_tools.folding.fold import Settings, fold
from folding import SHORT, ZERO_LAYER
from whole_fakes import BY_NAME, LENGTH, tiny_bench

pytestmark = pytest.mark.usefixtures("one_thread")

ON_CPU = [way.name for way in subject.WAYS if way.on_cpu]


@pytest.fixture(scope="module")
def bench(kernel):
    return tiny_bench(kernel)


def changes(bench):
    """What a way may leave behind."""
    modules = [*bench.model.modules()]
    return (
        [vars(part).get("forward") for part in modules],
        [getattr(part, "chunk_size", None) for part in modules],
        [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in modules],
    )


def updated(bench):
    """What the trunk makes of a pair tensor, and the MSA encoder's first layer of the same."""
    torch.manual_seed(0)
    model, pair = bench.model, torch.randn(1, LENGTH, LENGTH, 16, dtype=bench.dtype)
    msa = torch.randn(1, LENGTH, 1, 32, dtype=bench.dtype)
    mask = torch.ones(1, LENGTH, LENGTH)
    with torch.no_grad():
        trunk = model.folding_trunk(pair.clone(), pair_attention_mask=mask)
        layer = bench.msa_layers[0]
        return trunk, layer(msa, pair.clone(), torch.ones(1, LENGTH, 1), mask.bool())[1]


@pytest.mark.parametrize("name", ON_CPU)
def test_a_way_gives_the_stock_models_numbers_and_is_taken_back(bench, name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    before, wanted = changes(bench), updated(bench)
    with BY_NAME[name].install(bench):
        assert (changes(bench) == before) == (name == "stock")
        for got, want in zip(updated(bench), wanted, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert changes(bench) == before
    with pytest.raises(ZeroDivisionError), BY_NAME[name].install(bench):
        raise ZeroDivisionError
    assert changes(bench) == before


def test_unchunked_leaves_no_chunk_anywhere(bench):
    with subject.unchunked(bench):
        assert not any(getattr(part, "chunk_size", None) for part in bench.model.modules())


def test_compiled_compiles_the_layers_of_the_loops_for_each_length(bench, monkeypatch):
    asked = []

    def compile_(function, **options):
        asked.append((function.__qualname__, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    with subject.compiled(bench) as installed:
        assert asked == [("EsmFold2PairUpdateLayer.forward", {"dynamic": False})]
        replaced = [layer for layer in bench.layers if "forward" in vars(layer)]
        confident = [*bench.model.confidence_head.folding_trunk.layers]
        assert len(replaced) == 3 == len(bench.layers) - len(bench.msa_layers) - len(confident)
        assert installed.note.startswith("torch.compile of the forward of 3 pair-update layers")


def test_ours_says_what_patch_did(bench, monkeypatch):
    with subject.ours(bench) as installed:
        swapped = int(installed.note.split()[0])
        assert swapped > 0 and "left" not in installed.note
    with bench.sources.kernel.patch(bench.model), pytest.raises(RuntimeError, match=" 0 swapped"):
        with subject.ours(bench):
            pass


def test_ours_without_variants_or_absent(bench, monkeypatch):
    before, wanted = changes(bench), updated(bench)
    with pytest.raises(Absent, match="no variant of a stage runs here"):
        with subject.ours_plain(bench):
            pass
    hopper = with_variants(monkeypatch, bench.sources.kernel)
    with subject.ours_plain(bench) as installed:
        assert hopper.plain_only() and installed.has_our_ops
        assert installed.note.endswith("swapped by patch; no variants of stages")
        assert changes(bench) != before
        for got, want in zip(updated(bench), wanted, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not hopper.plain_only() and changes(bench) == before


def test_a_denoiser_that_is_not_captured_is_a_failure(bench):
    with pytest.raises(RuntimeError, match="without a CUDA graph: it runs on cpu"):
        with subject.ours_graph(bench) as installed:
            assert installed.has_our_ops
            assert installed.note.endswith("swapped by patch; the denoiser as a CUDA graph")
            fold(bench.model, SHORT, Settings(loops=0, samples=1, steps=1))
    assert not any("forward" in vars(part) for part in bench.model.modules())


def test_the_published_layer_takes_every_triangle(kernel, tmp_path):
    package = tmp_path / "esmfold2_trimul"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "trimul_with_residual.py").touch()
    (package / "layers.py").write_text(
        "class ESMFold2TriangleMultiplication:\n"
        f"    def forward(self, pair_grid, visibility=None):\n        {ZERO_LAYER}\n"
    )
    bench = tiny_bench(kernel, torch.bfloat16, published=tmp_path)
    with subject.published(bench):
        x = torch.ones(1, 3, 3, 16, dtype=torch.bfloat16)
        assert len(bench.triangles) == 2 * len(bench.layers)
        assert not any(site(x).any() for site in bench.triangles)
    assert bench.triangles[0](x).any()
    with pytest.raises(Absent, match="computes in bfloat16 alone"):
        with subject.published(tiny_bench(kernel, published=tmp_path)):
            pass
    (tmp_path / "none").mkdir()
    broken = tiny_bench(kernel, torch.bfloat16, published=tmp_path / "none")
    for name in [name for name in sys.modules if name.startswith("esmfold2_trimul.")]:
        del sys.modules[name]
    del sys.modules["esmfold2_trimul"]
    with pytest.raises(Absent, match="No module named 'esmfold2_trimul'"):
        with subject.published(broken):
            pass


# The parts of biohub's layers that the way uses, with transformers' formula for the triangle.
FAKE_ESM = """
    import torch
    from torch import nn

    TRITON_KERNELS_AVAILABLE = True

    class Engine(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm_start, self.norm_mix = nn.LayerNorm(width), nn.LayerNorm(width)
            self.proj_bundle = nn.Linear(width, 4 * width, bias=False)
            self.proj_emit = nn.Linear(width, width, bias=False)
            self.proj_gate = nn.Linear(width, width, bias=False)

    class Update(nn.Module):
        def __init__(self, width):
            super().__init__()
            self._engine = Engine(width)

    class Transition(nn.Module):
        def __init__(self, width, ratio):
            super().__init__()
            self.norm, self.ffn = nn.LayerNorm(width), nn.Module()
            self.ffn.w12 = nn.Linear(width, 2 * ratio * width, bias=False)
            self.ffn.w3 = nn.Linear(ratio * width, width, bias=False)

        def forward(self, x):
            z = nn.functional.layer_norm(x.float(), x.shape[-1:], self.norm.weight, self.norm.bias)
            gate, up = self.ffn.w12(z.to(x.dtype)).chunk(2, -1)
            return x + self.ffn.w3(nn.functional.silu(gate) * up)

    class PairUpdateBlock(nn.Module):
        def __init__(self, width, ratio):
            super().__init__()
            self.tri_mul_out, self.tri_mul_in = Update(width), Update(width)
            self.pair_transition = Transition(width, ratio)

        def set_kernel_backend(self, backend):
            assert backend == "fused" and not self.pair_transition.norm.weight.is_meta

        def forward(self, pair, pair_attention_mask=None):
            return self.pair_transition(pair)
"""


def without_esm() -> dict:
    """Takes every module of esm out of those that are imported."""
    names = [name for name in sys.modules if name.partition(".")[0] == "esm"]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def esm_folder(tmp_path):
    """A folder with a package whose own __init__ can't be imported."""
    folder = tmp_path / "esm" / "models" / "esmfold2"
    folder.mkdir(parents=True)
    (tmp_path / "esm" / "__init__.py").write_text('__version__ = "3.4.1"\nimport no_such_thing\n')
    (folder / "__init__.py").write_text("import no_such_thing")
    (folder / "layers.py").write_text(textwrap.dedent(FAKE_ESM))
    real = without_esm()  # of tests that ran before
    yield tmp_path
    without_esm()
    sys.modules.update(real)


def test_esms_layers_are_imported_alone_and_read_the_models_own_weights(kernel, esm_folder):
    bench = tiny_bench(kernel, torch.bfloat16, esm=esm_folder)
    with torch.no_grad(), subject.esm(bench) as installed:
        assert "of esm 3.4.1 with the fused" in installed.note
        assert len(installed.transitions) == len(bench.plain_layers)
        for layer, theirs in zip(bench.plain_layers, installed.transitions, strict=True):
            x = torch.randn(1, 5, 5, 16).bfloat16()
            assert torch.equal(layer(x), layer.pair_transition(x))
            read = installed.blocks[layer]
            assert all("pair_transition.norm." + name in read for name in ("weight", "bias"))
            owns = (theirs.ffn.w3.weight, layer.pair_transition.mlp.down_proj.weight)
            assert owns[0].data_ptr() == owns[1].data_ptr()
        assert all("forward" not in vars(layer) for layer in bench.msa_layers)
    assert not any("forward" in vars(layer) for layer in bench.layers)
    assert all(hasattr(layer, name) for layer in bench.layers for name in TRIANGLES)


def test_what_a_fused_block_of_esms_reads(esm_folder):
    """Not what its transition has copied."""
    block = find_esm(esm_folder).PairUpdateBlock(16, 2)
    every = dict(block.named_parameters())
    assert subject._parameters_read(block) == every
    block.pair_transition._fused_swiglu = torch.nn.Linear(2, 2)
    read = subject._parameters_read(block)
    names = {f"pair_transition.{name}" for name in ("norm.weight", "norm.bias", "ffn.w12.weight")}
    assert every.keys() - read.keys() == names
    assert "pair_transition._fused_swiglu.weight" in read


def test_why_esm_is_absent(kernel, esm_folder, tmp_path):
    def reason(**options):
        with pytest.raises(Absent) as caught, subject.esm(tiny_bench(kernel, **options)):
            pass
        return str(caught.value)

    half = {"dtype": torch.bfloat16}
    assert reason(esm=esm_folder) == "its fused kernels compute in bfloat16 alone"
    assert reason(**half) == "not given: --esm names the folder that holds the package esm"
    find_esm(esm_folder).TRITON_KERNELS_AVAILABLE = False
    assert reason(esm=esm_folder, **half) == "its fused kernels can't be imported here"
    del sys.modules["esm.models.esmfold2.layers"], sys.modules["esm.models.esmfold2"]
    other = tmp_path / "other"
    (other / "esm" / "models" / "esmfold2").mkdir(parents=True)
    (other / "esm" / "models" / "esmfold2" / "layers.py").write_text("import no_such_thing")
    known = set(sys.modules)
    assert reason(esm=other, **half) == "ModuleNotFoundError: No module named 'no_such_thing'"
    assert set(sys.modules) <= known
