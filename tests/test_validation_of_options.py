"""The messages and meanings of eps, precision, lengths and inplace."""

import math
from types import SimpleNamespace

import pytest
import torch
from cuequivariance_enums import Mxfp8, TriMulPrecision
from good_call import FUNCTIONS, PROJECTIONS, WEIGHT_SHAPES, B, C, Call, L
from torch import Tensor

META = torch.device("meta")
THREE_DTYPES = "torch.bfloat16, torch.float16 or torch.float32"


@pytest.fixture(params=[False, True], ids=["no_grad", "grad"])
def with_grad(request) -> bool:
    return request.param


@pytest.fixture(params=FUNCTIONS)
def call(kernel, request, with_grad) -> Call:
    return Call(kernel, request.param, with_grad)


@pytest.fixture
def call_with_residual(kernel, with_grad) -> Call:
    return Call(kernel, "triangle_multiplicative_update_with_residual", with_grad)


@pytest.fixture
def call_with_biases(kernel, with_grad) -> Call:
    return Call(kernel, "triangle_multiplicative_update", with_grad)


# The last three are not positive and finite, or are no normal number, in float32.
BAD_EPS = [0, 0.0, -1e-9, -1, math.nan, math.inf, True, "1e-5", None, 1e-5j, 1e-39, 1e39, 10**400]


@pytest.mark.parametrize("eps", BAD_EPS)
def test_eps(call, eps):
    message = f"eps must be a positive finite number, in float32 too; got {eps!r}"
    call.assert_refuses(ValueError, message, eps=eps)


@pytest.mark.parametrize("eps", [eps for eps in BAD_EPS if eps is not None])
def test_eps_out(call_with_residual, eps):
    message = f"eps_out must be a positive finite number, in float32 too; got {eps!r}"
    call_with_residual.assert_refuses(ValueError, message, eps_out=eps)


def test_eps_may_be_an_int(call):
    torch.testing.assert_close(call(eps=1), call(eps=1.0))
    assert not torch.allclose(call(eps=1), call(eps=2))


def half(dtype: torch.dtype) -> dict[str, Tensor]:
    """The pair tensor and the projections in `dtype`."""
    shapes = {name: WEIGHT_SHAPES[name] for name in PROJECTIONS} | {"pair": (B, L, L, C)}
    return {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "precision", ["highest", "", True, 4, 6, torch.float32, "mxfp8", Mxfp8.MXFP8]
)
def test_precision(call, precision):
    message = (
        "precision must be None, 'IEEE', 'TF32', 'TF32x3', 'fp16x3' or 'bfloat16', or a member "
        f"of cuEquivariance's TriMulPrecision other than MXFP8; got {precision!r}"
    )
    call.assert_refuses(ValueError, message, precision=precision)


@pytest.mark.parametrize(
    "word, spellings",
    {
        "default": (None, "none", "NONE", TriMulPrecision.NONE, -1),
        "tf32": ("default", TriMulPrecision.DEFAULT, 0, "TF32", "tf32", TriMulPrecision.TF32, 1),
        "tf32x3": ("TF32x3", "tf32x3", TriMulPrecision.TF32x3, 2),
        "fp16x3": ("fp16x3", "FP16x3"),
        "ieee": ("IEEE", "ieee", TriMulPrecision.IEEE, 3),
        "bf16": ("bfloat16", "BF16", TriMulPrecision.BFLOAT16, 5),
    }.items(),
)
def test_spellings_of_precision(submodule, word, spellings):
    resolve = submodule("validation").resolve_precision
    assert {resolve(spelling, "x", torch.ones(1)) for spelling in spellings} == {word}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_word_splits_16_bit_inputs(submodule, dtype):
    """Nor where float32 inputs are split if nothing is said, as on Hopper GPUs."""
    validation, device = submodule("validation"), submodule("triton_parts.device")
    x, hopper = torch.empty(1, dtype=dtype, device="meta"), device.target_of("sm_90", "any", 132)
    words = [None, *validation.PRECISIONS, *TriMulPrecision]
    words += [value for value in range(-1, 6) if value != 4]
    of_bfloat16 = ("bfloat16", "bf16", TriMulPrecision.BFLOAT16, 5)
    for word in words:
        if dtype == torch.float16 and word in of_bfloat16:
            continue
        call = SimpleNamespace(x=x, precision=validation.resolve_precision(word, "x", x))
        with device.standing_in(hopper):
            assert not submodule("triton_path.launches").wants_split(call), word


def test_float16_has_no_bfloat16_precision(call):
    message = (
        "precision must be another word than 'bfloat16' where {pair} is torch.float16; "
        "got 'bfloat16'"
    )
    call.assert_refuses(ValueError, message, precision="bfloat16", **half(torch.float16))


@pytest.mark.parametrize("precision", [None, "IEEE", "TF32", "TF32x3", "bfloat16"])
def test_precisions_that_fit(call, precision):
    assert call(precision=precision).dtype == torch.float32
    assert call(precision=precision, **half(torch.bfloat16)).dtype == torch.bfloat16
    if precision != "bfloat16":
        assert call(precision=precision, **half(torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_execution_path_of_a_dtype_that_nothing_computes_in(submodule, dtype):
    execution_path = submodule("paths").execution_path
    with pytest.raises(TypeError) as caught:
        execution_path(torch.device("cpu"), dtype)
    assert str(caught.value) == f"dtype must be {THREE_DTYPES}; got {dtype}"


@pytest.mark.parametrize("shape", [(3,), (B, 1), (0,)])
def test_lengths_shape(call, shape):
    message = (
        f"lengths must broadcast to [2], one for each sequence of {{pair}}; got {shape}"
    )
    call.assert_refuses(ValueError, message, lengths=torch.ones(shape, dtype=torch.int32))


@pytest.mark.parametrize("name", ["mask", "drop_mask", "lengths"])
def test_inplace_with_an_argument_that_is_no_tensor(kernel, name):
    call = Call(kernel, "triangle_multiplicative_update_with_residual", with_grad=False)
    wanted = "lengths must be a torch.Tensor on cpu, made once for many calls"
    wanted = wanted if name == "lengths" else f"{name} must be a torch.Tensor"
    changes = {"residual": torch.zeros(B, L, L, C), "inplace": True, name: [1]}
    call.assert_refuses(TypeError, f"{wanted}; got list", **changes)


@pytest.mark.parametrize("lengths", [(2**32 + 1, 2**40), (-(2**32) + 2, -(2**31) - 3)])
def test_lengths_of_64_bits_keep_their_meaning(call, lengths):
    inside = torch.tensor(lengths).clamp(0, L)
    assert torch.equal(call(lengths=torch.tensor(lengths)), call(lengths=inside))


def test_lengths_of_one_sequence(call_with_biases):
    message = "lengths must be one number, as x is one sequence; got (1,)"
    call_with_biases.assert_refuses(
        ValueError, message, pair=torch.ones(L, L, C), lengths=torch.ones(1, dtype=torch.int32)
    )


def test_lengths_of_another_kind(call):
    message = "lengths must be a torch.Tensor on cpu, made once for many calls; got list"
    call.assert_refuses(TypeError, message, lengths=[3, 2])
    message = "lengths must be torch.int32 or torch.int64; got torch.float32"
    call.assert_refuses(TypeError, message, lengths=torch.ones(B))
    message = "lengths must be on the device of {pair}, cpu; got meta"
    call.assert_refuses(
        ValueError, message, lengths=torch.ones(B, dtype=torch.int32, device=META)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.int64])
def test_lengths_from_mask(kernel, submodule, dtype):
    lengths = torch.tensor([[5, 0, 1], [3, 4, 5]])
    mask = submodule("validation").pairs_within(lengths, 5).to(dtype)
    found = kernel.lengths_from_mask(mask)
    assert found.dtype == torch.int32 and torch.equal(found, lengths.int())
    assert kernel.lengths_from_mask(mask[0, 0]).shape == ()
    assert kernel.lengths_from_mask(mask[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("where, value", [((0, 1, 2), 0), ((1, 3, 0), 1), ((0, 4, 4), 1)])
def test_masks_that_are_no_lengths(kernel, submodule, where, value):
    mask = submodule("validation").pairs_within(torch.tensor([4, 3]), 6).float()
    mask[where] = value
    message = "mask must be 1 where both residues are within a sequence's length and 0 elsewhere; "
    with pytest.raises(ValueError) as caught:
        kernel.lengths_from_mask(mask)
    assert str(caught.value).startswith(message + "got ")
    mask[where] = 0.5
    with pytest.raises(ValueError, match="got "):
        kernel.lengths_from_mask(mask)


def test_what_is_no_pair_mask_has_no_lengths(kernel):
    with pytest.raises(ValueError, match=r"mask must be \[\.\.\., L, L\]; got \(2, 3\)"):
        kernel.lengths_from_mask(torch.ones(2, 3))
    with pytest.raises(TypeError, match="mask must be a torch.Tensor; got list"):
        kernel.lengths_from_mask([[1]])
    with pytest.raises(ValueError, match="mask must be on a device that has numbers; got meta"):
        kernel.lengths_from_mask(torch.ones(2, 2, device=META))
    with pytest.raises(TypeError, match="mask must be bool or real; got torch.complex64"):
        kernel.lengths_from_mask(torch.ones(2, 2, dtype=torch.complex64))


def test_no_inplace_under_a_transform(kernel):
    weights = {name: torch.ones(shape) for name, shape in WEIGHT_SHAPES.items()}
    function = kernel.triangle_multiplicative_update_with_residual

    def call(x):
        return function(x, "outgoing", x, None, inplace=True, **weights)

    message = "inplace must be False under the transforms of torch.func; got True"
    with pytest.raises(ValueError, match=message):
        torch.vmap(call)(torch.ones(2, B, L, L, C))
