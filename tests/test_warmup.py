"""warmup: after it no call of its kind brings a kernel that is not compiled yet."""

import logging
import types

import pytest
import torch
from helpers import make_problem


@pytest.fixture
def kernels_of(submodule, on_triton, monkeypatch):
    """kernels_of(function): what it would have compiled for sm_90; nothing is launched."""
    if on_triton == "cuda":
        pytest.skip("calls whose launches are left out can't be told from others by the GPU")
    target = submodule("triton_parts.device").target_of("sm_90", "any")
    monkeypatch.setattr(submodule("triton_parts.device"), "_target_of_real", lambda _: target)
    any_alignment = ("mask_ptr", "moments_ptr", "drop_ptr")  # do_not_specialize in the kernels
    seen = set()

    def note(self, **tensors):
        seen.add(
            (
                self.kernel.fn.__name__,
                *self.constants.items(),
                *self.options.items(),
                *[
                    None if t is None else (t.dtype, name in any_alignment or t.data_ptr() % 16)
                    for name, t in tensors.items()
                ],
            )
        )

    for name in ("launch", "compile"):
        monkeypatch.setattr(submodule("triton_parts.launch").PreparedLaunch, name, note)
    submodule("triton_path.launches")._launches.clear()

    def run(function) -> set:
        seen.clear()
        function()
        return set(seen)

    yield run
    submodule("triton_path.launches")._launches.clear()


def call_lengths(
    kernel, lengths, *, channels, hidden, mask, residual, memory, dtype, training=False
):
    for direction in ("outgoing", "incoming"):
        for length in lengths:
            problem = make_problem(
                length, channels, hidden, dtype=dtype, mask=mask, residual=residual
            )
            # As ESMFold2 has them: one tensor for both input projections.
            bundle = torch.cat([problem.weights["p_in_weight"], problem.weights["g_in_weight"]])
            problem.weights |= {
                "p_in_weight": bundle[: 2 * hidden], "g_in_weight": bundle[2 * hidden :],
            }  # fmt: skip
            for leaf in (problem.x, *problem.weights.values()):
                leaf.requires_grad_(training)
            out = kernel.triangle_multiplicative_update_with_residual(
                problem.x, direction, problem.residual, None, mask=problem.mask,
                **problem.weights, memory=memory,
            )  # fmt: skip
            if training:
                out.backward(torch.zeros_like(out))


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels, hidden, dtype", [
    (128, 128, torch.bfloat16), (64, 32, torch.float16), (16, 24, torch.float32),
])  # fmt: skip
def test_every_length_is_compiled(kernel, kernels_of, memory, residual, channels, hidden, dtype):
    kind = dict(channels=channels, hidden=hidden, dtype=dtype, residual=residual, memory=memory)
    warmed = kernels_of(
        lambda: kernel.warmup(**kind, mask_dtypes=[torch.bool], device="cpu")
    )
    lengths = (1, 64, 76, 97, 160, 161, 321)
    called = kernels_of(lambda: call_lengths(kernel, lengths, **kind, mask="bool"))
    assert called and called <= warmed


def test_lengths_limit_what_is_compiled(kernel, kernels_of):
    all_ = kernels_of(lambda: kernel.warmup(device="cpu"))
    some = kernels_of(lambda: kernel.warmup(device="cpu", lengths=[76]))
    assert some < all_
    kind = dict(channels=256, hidden=256, dtype=torch.bfloat16, residual=False, memory="default")
    assert kernels_of(lambda: call_lengths(kernel, [76], **kind, mask="bool")) <= some


def test_masks_of_every_dtype(kernel, kernels_of):
    def warmed(*dtypes):
        return kernels_of(lambda: kernel.warmup(device="cpu", mask_dtypes=dtypes, lengths=[64]))

    assert len(warmed(torch.bool)) == len(warmed(None)) == 3
    # Stages 2 and 3 have no mask.
    assert len(warmed(torch.bool, torch.float32, None)) == 5


@pytest.mark.parametrize("lengths", [[64, 321], None])
def test_training(kernel, kernels_of, submodule, monkeypatch, lengths):
    """Of lengths that are cut into chunks and groups as on a GPU."""
    gradients = submodule("triton_path.gradients")
    monkeypatch.setattr(gradients, "_CHUNK_PAIRS", 512)
    monkeypatch.setattr(gradients, "_GROUP_ELEMENTS", 1 << 16)
    kind = dict(channels=64, hidden=64, dtype=torch.bfloat16, residual=True, memory="default")
    warmed = kernels_of(lambda: kernel.warmup(
        **kind, mask_dtypes=[torch.bool], device="cpu", lengths=lengths, training=True
    ))  # fmt: skip
    lengths = lengths or [16, 64, 97, 321]
    called = kernels_of(
        lambda: call_lengths(kernel, lengths, **kind, mask="bool", training=True)
    )
    assert len(called) > 10 and called <= warmed


def test_nothing_runs_and_nothing_is_allocated(kernel, on_triton, submodule, monkeypatch):
    compiled = []

    def compile_(self, **tensors):
        assert all(t is None or t.is_meta for t in tensors.values())
        compiled.append(self.stage)

    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "compile", compile_)
    monkeypatch.setattr(launch, "launch", None)
    kernel.warmup(16, device=on_triton, lengths=[5], mask_dtypes=[torch.bool])
    assert compiled == ["fused_dual_gemm", "trimul_einsum", "fused_ln_residual"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_transitions(kernel, kernels_of, submodule, monkeypatch, residual, training):
    """Their launches are compiled for each kind of length, beside the triangles'."""
    path, planned, compiled = submodule("triton_path"), [], []

    class Launch:
        def compile(self, **tensors):
            compiled.append(tensors)

    def launches(call):
        planned.append(call)
        return [(Launch(), {"x": call.x})]

    class Transition:
        plan_training = staticmethod(launches)

        @staticmethod
        def plan(call):
            return types.SimpleNamespace(launches=launches(call))

    monkeypatch.setattr(path, "transition", Transition, raising=False)
    options = dict(
        channels=32, device="cpu", dtype=torch.bfloat16, mask_dtypes=[torch.bool, None],
        residual=residual, training=training, lengths=[20, 400],
    )  # fmt: skip
    triangles = kernels_of(lambda: kernel.warmup(**options))
    assert triangles and not planned
    assert kernels_of(lambda: kernel.warmup(**options, transition_hidden=96)) == triangles
    assert {call.x.shape for call in planned} == {(1, 20, 20, 32), (1, 400, 400, 32)}
    assert len(planned) == len(compiled) == 2  # once, not for each mask
    for call in planned:
        assert call.x.is_meta and call.x.dtype == torch.bfloat16 and call.hidden == 96
        assert (call.residual is call.x) == residual
        gate, up = call.weights.gate_weight, call.weights.up_weight
        assert gate.shape == (96, 32) and gate.dtype == torch.bfloat16
        assert gate.untyped_storage()._cdata == up.untyped_storage()._cdata
        assert call.weights.norm_weight.dtype == torch.float32
        assert call.weights.down_weight.shape == (32, 96) and call.weights.down_bias is None


@pytest.mark.parametrize("changes, error, message", [
    ({"transition_hidden": 0}, ValueError,
     "transition_hidden must be a positive integer; got 0"),
    ({"transition_hidden": True}, ValueError,
     "transition_hidden must be a positive integer; got True"),
    ({"channels": 0}, ValueError, "channels must be a positive integer; got 0"),
    ({"hidden": 2.0}, ValueError, "hidden must be a positive integer; got 2.0"),
    ({"memory": "auto"}, ValueError, "memory must be 'default' or 'lean' for warmup; got 'auto'"),
    ({"memory": "x"}, ValueError, "memory must be 'auto', 'default' or 'lean'; got 'x'"),
    ({"norm_dtype": torch.float64}, TypeError, "norm_dtype must be torch.bfloat16, torch.float16, "
     "torch.float32 or None; got torch.float64"),
    ({"dtype": torch.int8}, TypeError,
     "dtype must be torch.bfloat16, torch.float16 or torch.float32; got torch.int8"),
    ({"precision": "int8"}, ValueError,
     "precision must be None, 'IEEE', 'TF32', 'TF32x3', 'fp16x3' or 'bfloat16', or a member "
     "of cuEquivariance's TriMulPrecision other than MXFP8; got 'int8'"),
    ({"lengths": [0]}, ValueError, "lengths must be positive integers; got [0]"),
    ({"lengths": 5}, TypeError, "lengths must be several, in a list or tuple; got 5"),
    ({"channels": True}, ValueError, "channels must be a positive integer; got True"),
    ({"mask_dtypes": torch.bool}, TypeError,
     "mask_dtypes must be several, in a list or tuple; got torch.bool"),
    ({"mask_dtypes": [torch.complex64]}, TypeError,
     "mask_dtypes must be bool, real or None; got torch.complex64"),
    ({"drop_mask_dtype": "bool"}, TypeError,
     "drop_mask_dtype must be bool, real or None; got 'bool'"),
    ({"device": "nonsense"}, ValueError, "device must be one of this machine; got 'nonsense'"),
])  # fmt: skip
def test_refusals(kernel, on_triton, changes, error, message):
    with pytest.raises(error) as caught:
        kernel.warmup(**{"channels": 16, "device": on_triton, **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize("device, reason", [
    ("cpu", "CPU tensors run the ATen path"), ("cuda", "there is no cuda device here"),
    (torch.device("xpu", 1), "there is no xpu device here"),
])  # fmt: skip
def test_a_machine_without_a_gpu_is_told_once(
    kernel, submodule, monkeypatch, caplog, device, reason
):
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    submodule("paths").say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for channels in (16, 32):
            assert kernel.warmup(channels, device=device) is None
        with pytest.raises(ValueError, match="lengths must be positive"):
            kernel.warmup(16, device=device, lengths=[0])
    assert [record.getMessage() for record in caplog.records] == [
        f"The triangle multiplication is not compiled beforehand: {reason}."
    ]


def test_a_gpu_that_is_not_among_those_there(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device must be one of this machine; got 'cuda:99'"):
        kernel.warmup(16, device="cuda:99")
