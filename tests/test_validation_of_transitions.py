"""Every message that callers of `swiglu_transition` can get, word by word."""

import math

import numpy as np
import pytest
import torch
from cuequivariance_enums import Mxfp8
from good_call import TRANSITION_SHAPES, B, C, H, L, TransitionCall

META = torch.device("meta")
THREE_DTYPES = "torch.bfloat16, torch.float16 or torch.float32"
PROJECTIONS = ("gate_weight", "up_weight", "down_weight")
SYMBOLS = {
    "norm_weight": "[C] = [4]",
    "norm_bias": "[C] = [4]",
    "gate_bias": "[H] = [6]",
    "up_weight": "[H, C] = [6, 4]",
    "up_bias": "[H] = [6]",
    "down_weight": "[C, H] = [4, 6]",
    "down_bias": "[C] = [4]",
}
VECTORS = tuple(name for name, shape in TRANSITION_SHAPES.items() if len(shape) == 1)
X = (B, L, L, C)


@pytest.fixture(params=[False, True], ids=["no_grad", "grad"])
def call(kernel, request) -> TransitionCall:
    return TransitionCall(kernel, request.param)


def test_good_arguments_are_accepted(call):
    assert call().shape == X


@pytest.mark.parametrize("shape", [(), (0,), (B, L, L, 0)])
def test_shape_of_x(call, shape):
    message = f"x must be [..., C] with C of at least 1; got {shape}"
    call.assert_refuses(ValueError, message, x=torch.ones(shape))


@pytest.mark.parametrize("shape", [(C,), (L, C), (B, L, L + 1, C), (B, L, L, 0), ()])
def test_shape_of_x_beside_lengths(call, shape):
    message = f"x must be [..., L, L, C] with C of at least 1; got {shape}"
    call.assert_refuses(ValueError, message, x=torch.ones(shape), lengths=torch.tensor([L, 1]))


def test_pairs_past_32_bit_planes_are_refused_beside_lengths(call):
    x = torch.empty(1, 46_337, 46_337, C, device="meta")
    message = (
        "x may have at most 46336 residues, as one plane of L * L elements is indexed in 32 bits; "
        "got L = 46337"
    )
    call.assert_refuses(NotImplementedError, message, x=x, lengths=torch.tensor([1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_dtype_of_x(call, dtype):
    message = f"x must be {THREE_DTYPES}; got {dtype}"
    call.assert_refuses(TypeError, message, x=torch.ones(X, dtype=dtype))


@pytest.mark.parametrize("name", ["x", "residual", *TRANSITION_SHAPES])
@pytest.mark.parametrize("value", [[1.0], 0.5, np.ones(3)])
def test_an_argument_that_is_no_tensor(call, name, value):
    message = f"{name} must be a torch.Tensor; got {type(value).__name__}"
    call.assert_refuses(TypeError, message, **{name: value})


@pytest.mark.parametrize("name", ["x", *PROJECTIONS])
def test_x_and_the_projections_are_required(call, name):
    message = f"{name} must be a torch.Tensor; got NoneType"
    call.assert_refuses(TypeError, message, **{name: None})


@pytest.mark.parametrize("shape", [(0, C), (H, C + 1), (H,), (2, H, C), (C, H), ()])
def test_shape_of_gate_weight(call, shape):
    message = f"gate_weight must be [H, C] with C = 4, the channels of x; got {shape}"
    call.assert_refuses(ValueError, message, gate_weight=torch.ones(shape))


def wrong_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One more along each axis, one axis more and, of a matrix, transposed."""
    wrong = [(*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]) for axis in range(len(shape))]
    wrong.append((1, *shape))
    if len(shape) > 1:
        wrong.append(shape[::-1])
    return wrong


@pytest.mark.parametrize("name", SYMBOLS)
def test_shapes_of_the_other_parameters(call, name):
    for shape in wrong_shapes(TRANSITION_SHAPES[name]):
        message = f"{name} must be {SYMBOLS[name]}; got {shape}"
        call.assert_refuses(ValueError, message, **{name: torch.ones(shape)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_have_the_dtype_of_x(call, name, dtype):
    message = f"{name} must have the dtype of x, torch.float32; got {dtype}"
    weight = torch.ones(TRANSITION_SHAPES[name], dtype=dtype)
    call.assert_refuses(TypeError, message, **{name: weight})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("name", VECTORS)
def test_dtypes_of_vectors(call, name, dtype):
    message = f"{name} must be {THREE_DTYPES}; got {dtype}"
    vector = torch.ones(TRANSITION_SHAPES[name], dtype=dtype)
    call.assert_refuses(TypeError, message, **{name: vector})


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_may_be_in_another_of_the_three_dtypes_or_absent(call, name):
    shape = TRANSITION_SHAPES[name]
    for dtype in (torch.bfloat16, torch.float16):
        assert call(**{name: torch.ones(shape, dtype=dtype)}).dtype == torch.float32
    default = torch.ones if name == "norm_weight" else torch.zeros
    torch.testing.assert_close(call(**{name: None}), call(**{name: default(shape)}))


@pytest.mark.parametrize("name", ["residual", *TRANSITION_SHAPES])
def test_another_device(call, name):
    message = f"{name} must be on the device of x, cpu; got meta"
    value = torch.ones(TRANSITION_SHAPES.get(name, X), device=META)
    call.assert_refuses(ValueError, message, **{name: value})


@pytest.mark.parametrize("shape", [(B, L, L), (1, L, L, C), (B, L, L, 1), (B * L * L, C)])
def test_shape_of_the_residual(call, shape):
    message = f"residual must have the shape of x, [2, 3, 3, 4]; got {shape}"
    call.assert_refuses(ValueError, message, residual=torch.ones(shape))


def test_dtype_of_the_residual(call):
    message = "residual must have the dtype of x, torch.float32; got torch.bfloat16"
    call.assert_refuses(TypeError, message, residual=torch.ones(X, dtype=torch.bfloat16))


@pytest.mark.parametrize("eps", [0, -1e-9, math.nan, math.inf, True, "1e-5", None, 1e-39, 10**400])
def test_eps(call, eps):
    message = f"eps must be a positive finite number, in float32 too; got {eps!r}"
    call.assert_refuses(ValueError, message, eps=eps)


def test_eps_may_be_an_int(call):
    torch.testing.assert_close(call(eps=1), call(eps=1.0))
    assert not torch.allclose(call(eps=1), call(eps=2))


@pytest.mark.parametrize("precision", ["highest", "", True, 4, torch.float32, Mxfp8.MXFP8])
def test_precision(call, precision):
    message = (
        "precision must be None, 'IEEE', 'TF32', 'TF32x3', 'fp16x3' or 'bfloat16', or a member "
        f"of cuEquivariance's TriMulPrecision other than MXFP8; got {precision!r}"
    )
    call.assert_refuses(ValueError, message, precision=precision)


def test_float16_has_no_bfloat16_precision(call):
    half = {name: torch.ones(TRANSITION_SHAPES[name]).half() for name in PROJECTIONS}
    message = (
        "precision must be another word than 'bfloat16' where x is torch.float16; got 'bfloat16'"
    )
    call.assert_refuses(
        ValueError, message, precision="bfloat16", x=torch.ones(X).half(), **half
    )


@pytest.mark.parametrize("shape", [(3,), (B, 1), (0,), (1, B)])
def test_shape_of_lengths(call, shape):
    message = f"lengths must broadcast to [2], one for each sequence of x; got {shape}"
    call.assert_refuses(ValueError, message, lengths=torch.ones(shape, dtype=torch.int32))


def test_lengths_of_one_sequence(call):
    message = "lengths must be one number, as x is one sequence; got (1,)"
    call.assert_refuses(
        ValueError, message, x=torch.ones(L, L, C), lengths=torch.ones(1, dtype=torch.int32)
    )


def test_lengths_of_another_kind(call):
    message = "lengths must be a torch.Tensor on cpu, made once for many calls; got list"
    call.assert_refuses(TypeError, message, lengths=[3, 2])
    message = "lengths must be torch.int32 or torch.int64; got torch.float32"
    call.assert_refuses(TypeError, message, lengths=torch.ones(B))
    message = "lengths must be on the device of x, cpu; got meta"
    call.assert_refuses(
        ValueError, message, lengths=torch.ones(B, dtype=torch.int32, device=META)
    )


@pytest.mark.parametrize("lengths", [(2**32 + 1, 2**40), (-(2**32) + 2, -(2**31) - 3)])
def test_lengths_of_64_bits_keep_their_meaning(call, lengths):
    inside = torch.tensor(lengths).clamp(0, L)
    assert torch.equal(call(lengths=torch.tensor(lengths)), call(lengths=inside))


@pytest.mark.parametrize("inplace", [1, 0, None, "yes"])
def test_inplace_is_a_bool(call, inplace):
    message = f"inplace must be a bool; got {type(inplace).__name__}"
    call.assert_refuses(TypeError, message, inplace=inplace, residual=torch.ones(X))


class TestInPlace:
    @pytest.fixture
    def call(self, kernel) -> TransitionCall:
        return TransitionCall(kernel, with_grad=False)

    def test_without_a_residual(self, call):
        message = "inplace writes the result over residual, which must be given; got None"
        call.assert_refuses(ValueError, message, inplace=True)

    @pytest.mark.parametrize("make", [
        lambda: torch.ones(X).transpose(1, 2), lambda: torch.ones(1, L, L, C).expand(X),
        lambda: torch.ones(B, L, L, C + 1)[..., 1:],
    ])  # fmt: skip
    def test_strides(self, call, make):
        residual = make()
        message = (
            f"residual must be contiguous with inplace=True; got strides {residual.stride()}"
        )
        call.assert_refuses(ValueError, message, inplace=True, residual=residual)

    @pytest.mark.parametrize("name, view", {
        "x": lambda r: r.transpose(1, 2),
        "lengths": lambda r: r.view(-1)[:B].view(torch.int32),
        "norm_weight": lambda r: r[0, 0, 0],
        "norm_bias": lambda r: r[0, 0, 0],
        "gate_weight": lambda r: r.view(-1, C)[:H],
        "gate_bias": lambda r: r.view(-1)[:H],
        "up_weight": lambda r: r.view(-1, C)[:H],
        "up_bias": lambda r: r.view(-1)[:H],
        "down_weight": lambda r: r.view(-1)[: C * H].view(C, H),
        "down_bias": lambda r: r.view(-1)[:C],
    }.items())  # fmt: skip
    def test_shared_memory(self, call, name, view):
        residual = torch.ones(X)
        message = (
            "residual must be x itself, or share no memory with another argument, with "
            f"inplace=True; got memory of {name}"
        )
        before = residual.clone()
        changes = {"inplace": True, "residual": residual, name: view(residual)}
        call.assert_refuses(ValueError, message, **changes)
        assert torch.equal(residual, before)

    def test_x_itself_by_another_view_of_it(self, call):
        residual = torch.randn(X)
        wanted = call(x=residual.clone(), residual=residual.clone())
        got = call(x=residual.view(X), residual=residual, inplace=True)
        assert got is residual and torch.equal(got, wanted)
