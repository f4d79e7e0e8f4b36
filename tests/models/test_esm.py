"""biohub's esm, patched: its pair-update blocks as a whole, its wrappers, and its own backends."""

import copy
import pickle

import pytest
import torch
from helpers import assert_no_worse
from pair_layers import INFERENCE, TRAINING, TRIANGLES
from peer_modules import (
    CHANNELS,
    assert_near,
    distance,
    gradients,
    in_float64,
    make_mask,
    make_pair,
)
from peers import esm_peer, randomized
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
ENGINES = [f"{name}._engine" for name in TRIANGLES]


def make_block(seed: int = 0) -> nn.Module:
    block = esm_peer().PairUpdateBlock(CHANNELS, 2)
    block.set_chunk_size(3)
    return randomized(block, seed).eval()


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """What of esm's own kernels has run; there seem to be a GPU, its kernels and cuEquivariance."""
    layers, names = esm_peer(), []

    class FusedLNLinearSwiGLU(nn.Module):
        def __init__(self, d_model, d_inner, has_ln_bias, device, dtype):
            super().__init__()
            self.W12 = nn.Parameter(torch.zeros(d_model, 2 * d_inner, dtype=dtype))
            self.LN_W, self.LN_B = (nn.Parameter(torch.zeros(d_model)) for _ in range(2))
            self.half = d_inner

        def forward(self, x: Tensor) -> Tensor:
            names.append("swiglu")
            return x.new_zeros(*x.shape[:-1], self.half)

    def triangle(name: str):
        def run(pair: Tensor, *_, **__) -> Tensor:
            names.append(name)
            return pair

        return run

    monkeypatch.setattr(layers, "TRITON_KERNELS_AVAILABLE", True)
    monkeypatch.setattr(layers, "CUE_AVAILABLE", True)
    monkeypatch.setattr(layers, "_FusedLNLinearSwiGLU", FusedLNLinearSwiGLU)
    monkeypatch.setattr(layers, "_fused_trimul_with_residual", triangle("fused"))
    monkeypatch.setattr(layers, "_cue_tri_mul", triangle("cuequivariance"))
    monkeypatch.setattr(
        layers, "_fused_pair_stack_active", lambda part, _: part._kernel_backend == "fused"
    )
    return names


@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
def test_result_and_gradients(kernel, calls, masked):
    block, pair = make_block(), make_pair(2)
    mask = None if masked is None else make_mask(2).to(masked)
    wanted = gradients(block, lambda x: block(x, mask), pair)
    with kernel.patch(block):
        got = gradients(block, lambda x: block(x, pair_attention_mask=mask), pair)
        assert calls == TRAINING
        calls.clear()
        before = pair.clone()
        with torch.no_grad():
            inference = block(pair, mask)
        assert calls == INFERENCE and torch.equal(pair, before)
    assert_near(got, wanted, 1e-5)
    assert distance(inference, wanted["output"]) <= 1e-5
    again = gradients(block, lambda x: block(x, mask), pair)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_beside_the_blocks_own(kernel, calls, dtype, whole):
    """Against float64. Its own code runs 16 bits under autocast alone, as its model does.

    The pair is in float32 there, and so the sums are its own, or `whole` in autocast's dtype.
    """
    draws = []
    for seed in range(8):
        block, pair, mask = make_block(seed), make_pair(1), make_mask(1)
        pair = pair.to(dtype if whole else torch.float32)
        exact = in_float64(block)
        wanted = gradients(exact, lambda x: exact(x, mask), pair.double())  # noqa: B023

        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return block(x, mask)  # noqa: B023

        original = gradients(block, run, pair)
        with kernel.patch(block):
            got = gradients(block, run, pair)
        assert all(got[name].dtype == original[name].dtype for name in wanted)
        draws.append((got, original, wanted))
    assert_no_worse(draws, 1.1)
    assert calls == (TRAINING * 8 if whole or dtype == torch.float32 else [])


def test_wrappers_are_passed_over_in_silence(kernel):
    trunk = esm_peer().FoldingTrunk(n_layers=2, d_pair=CHANNELS, expansion_ratio=2)
    with kernel.patch(trunk) as report:
        blocks = [f"blocks.{i}" for i in (0, 1)]
        assert report.left == {} and set(report.swapped.values()) == {"esm"}
        assert [*report.swapped] == [
            *(f"{block}.{engine}" for block in blocks for engine in ENGINES),
            *(f"{block}.pair_transition" for block in blocks),
            *blocks,
        ]
        assert kernel.patch(trunk).found == report.found
    with kernel.patch(trunk, families="esmfold2") as report:
        assert report.swapped == {} and {*report.left.values()} == {"families leaves esm out"}


def test_a_trunk_that_checkpoints_its_blocks(kernel, calls):
    trunk = esm_peer().FoldingTrunk(n_layers=2, d_pair=CHANNELS, expansion_ratio=2)
    randomized(trunk)
    pair, mask = make_pair(1), make_mask(1)
    wanted = gradients(trunk, lambda x: trunk(x, mask), pair)
    with kernel.patch(trunk):
        assert_near(gradients(trunk, lambda x: trunk(x, mask), pair), wanted, 1e-5)
    assert calls == TRAINING * 4


@torch.no_grad()
@pytest.mark.parametrize("backend", ["fused", "cuequivariance"])
@pytest.mark.parametrize("first", [False, True])
def test_its_own_backends_do_not_pass_over_a_swapped_block(kernel, calls, ran, backend, first):
    """Whether chosen before the patch or after it; and left again."""
    block, pair = make_block(), make_pair(1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        own = block(pair)
        if first:
            block.set_kernel_backend(backend)
        with kernel.patch(block) as report:
            assert report.left == {}
            block.set_kernel_backend(backend)
            assert distance(block(pair), own) <= 2e-2 and ran == [] and calls == INFERENCE
            # A hook of a wrapper: the block's modules are called, still ours.
            with block.tri_mul_in.register_forward_hook(lambda *_: None):
                assert distance(block(pair), own) <= 2e-2 and ran == []
            assert calls == INFERENCE
        block(pair)
        assert [*dict.fromkeys(ran)] == (["fused", "swiglu"] if backend == "fused" else [backend])
        block.set_kernel_backend(None)  # leaves a part that is None
        with kernel.patch(block) as report:
            assert report.left == {} and distance(block(pair), own) <= 2e-2


PASSED_OVER = (
    "its backend runs kernels of its own in place of its swapped triangles, on a GPU in bfloat16; "
    "set_kernel_backend(None) lets ours run"
)


@torch.no_grad()
def test_a_block_whose_backend_passes_over_its_triangles_is_named(kernel, ran):
    block, pair = make_block(), make_pair(1, dtype=torch.bfloat16)
    with kernel.patch(block, parts="triangle") as report:
        assert report.left == {}
    block.set_kernel_backend("cuequivariance")
    with kernel.patch(block, parts="triangle") as report:
        assert report.left == {}
    block.set_kernel_backend("fused")
    with kernel.patch(block, parts="transition") as report:
        assert report.left == {}
    with kernel.patch(block, parts=["triangle", "transition"]) as report:
        assert report.left == {"": PASSED_OVER} and report.parts[""] == "residual"
        assert f"left the model: {PASSED_OVER}" in str(report)
        with torch.autocast("cpu", torch.bfloat16):
            block(pair)
        assert ran == ["fused", "fused"]
    with block.tri_mul_out._engine.register_forward_hook(lambda *_: None):
        report = kernel.patch(block)
        assert report.left == {
            "": f"tri_mul_out has a hook, which would not run; {PASSED_OVER}"
        }
    assert kernel.patch(block).swapped == {"": "esm"}  # with the hook gone


@pytest.mark.parametrize("part", [*TRIANGLES, *ENGINES, "pair_transition", "row_drop"])
@torch.no_grad()
def test_hooks_of_the_modules_run(kernel, part):
    block, pair, seen = make_block(), make_pair(1), []
    wanted = block(pair)
    with kernel.patch(block):
        with block.get_submodule(part).register_forward_hook(lambda *_: seen.append(part)):
            assert distance(block(pair), wanted) <= 1e-5
    assert seen and {*seen} == {part}


def test_dropout_of_rows_in_training(kernel, calls):
    """Its model sets none. With some the block adds by its own module, with its own draws."""
    block, pair = make_block().train(), make_pair(1)
    block.row_drop = esm_peer().DropoutResidual(0.5, batch_dim=1)

    def seeded_call(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return block(x)

    wanted = gradients(block, seeded_call, pair)
    with kernel.patch(block):
        assert_near(gradients(block, seeded_call, pair), wanted, 1e-5)
        assert calls == []
        with torch.no_grad():
            inference = block.eval()(pair)
    assert calls == INFERENCE and distance(inference, wanted["output"]) > 1e-2


def changed(change) -> nn.Module:
    block = make_block()
    change(block)
    return block


def test_what_is_not_understood_is_left(kernel):
    wanted = "tri_mul_out, tri_mul_in, pair_transition, row_drop"
    block = changed(lambda block: delattr(block, "row_drop"))
    assert kernel.patch(block).left == {"": f"it must have {wanted}; got none named row_drop"}
    block = changed(lambda block: setattr(block, "extra", nn.Identity()))
    assert kernel.patch(block).left == {"": f"it must have no part but {wanted}; got extra"}
    block = changed(lambda block: setattr(block.tri_mul_out._engine, "flow", "both"))
    assert kernel.patch(block).left == {
        "tri_mul_out._engine": "module.flow must be 'outgoing' or 'incoming'; got 'both'",
        "": "its tri_mul_out is not swapped",
    }
    block = changed(lambda block: setattr(block.pair_transition, "ffn", nn.Linear(2, 2)))
    assert kernel.patch(block).left == {
        "pair_transition": "ffn must be of a class named SwiGLUMLP; got "
        "torch.nn.modules.linear.Linear"
    }
    block = changed(lambda block: setattr(block.tri_mul_in, "forward", lambda z, mask=None: z))
    assert kernel.patch(block).left == {"": "its tri_mul_in is not swapped"}


@torch.no_grad()
def test_copies_pickles_and_unpatch(kernel):
    block, pair = make_block(), make_pair(1)
    wanted, keys = block(pair), list(block.state_dict())
    report = kernel.patch(block)
    patched = block(pair)
    assert list(block.state_dict()) == keys and not torch.equal(patched, wanted)
    twin, loaded = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    assert torch.equal(twin(pair), patched) and torch.equal(loaded(pair), wanted)
    names = ["", *ENGINES, "pair_transition"]
    assert kernel.unpatch(twin) == kernel.unpatch(loaded) == names
    report.undo()
    assert torch.equal(block(pair), wanted) and kernel.unpatch(block) == []


def test_compiles_into_one_graph(kernel):
    block, pair, mask = make_block(), make_pair(1), make_mask(1)
    with kernel.patch(block):
        wanted = gradients(block, lambda x: block(x, mask), pair)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        assert_near(gradients(block, lambda x: compiled(x, mask), pair), wanted, 0)


@torch.no_grad()
@pytest.mark.parametrize("module", ["model", "experimental"])
def test_a_block_of_the_msa_encoder_keeps_its_own_code(kernel, module):
    block = esm_peer(module).MSAEncoderBlock(8, CHANNELS, 4, 2, 4)
    randomized(block).eval()
    pair, mask, msa = make_pair(1), make_mask(1), torch.randn(1, 7, 3, 8)
    wanted = block(msa, pair, torch.ones(1, 7, 3), mask)
    with kernel.patch(block) as report:
        assert report.left == {}
        assert [*report.swapped] == [*ENGINES, "msa_transition", "pair_transition"]
        got = block(msa, pair, torch.ones(1, 7, 3), mask)
    for mine, its in zip(got, wanted, strict=True):
        assert 0 < distance(mine, its) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("memory", ["default", "lean"])
def test_on_the_triton_path(kernel, calls, on_triton, memory):
    """Under autocast, in bfloat16, as its model calls the block on a GPU."""
    block, mask = make_block().to(on_triton), make_mask(2).to(on_triton)
    pair = make_pair(2, dtype=torch.bfloat16).to(on_triton)
    exact = in_float64(block)(pair.double(), mask)
    with torch.autocast(on_triton, torch.bfloat16):
        original = block(pair, mask)
        with kernel.patch(block, memory=memory):
            got = block(pair, mask)
    assert calls == INFERENCE
    assert_no_worse([(got.cpu(), original.cpu(), exact.cpu())], 1.1)


@pytest.mark.parametrize("module, name", [
    ("model", "EsmFold2Model"), ("experimental", "EsmFold2ExperimentalModel"),
])  # fmt: skip
def test_a_whole_model(kernel, module, name):
    """All but the conditioned transitions of the diffusion head, which the report names."""
    config = esm_peer("config").EsmFold2Config()
    with torch.device("meta"):
        model = getattr(esm_peer(module), name)(config)
    report = kernel.patch(model)
    kinds = {name: type(model.get_submodule(name)).__name__ for name in report.found}
    assert {kinds[name] for name in report.left} == {"ConditionedTransitionBlock"}
    blocks = [part for part in model.modules() if isinstance(part, esm_peer().PairUpdateBlock)]
    counts = [[*kinds.values()].count(kind) for kind in ("PairUpdateBlock", "Transition")]
    assert counts == [len(blocks)] * 2 and len(blocks) >= 24
    triangles = [name for name in report.swapped if report.parts[name] == "triangle"]
    assert len(triangles) == 2 * len(blocks)
