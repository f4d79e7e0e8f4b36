"""Every message about tensors that callers of the two public functions can get, word by word.

The functions share their checks and differ in what they call the pair tensor: `pair` and `x`.
"""

import numpy as np
import pytest
import torch
from good_call import FUNCTIONS, PROJECTIONS, WEIGHT_SHAPES, B, C, Call, D, L

META = torch.device("meta")
THREE_DTYPES = "torch.bfloat16, torch.float16 or torch.float32"
BIAS_SHAPES = {
    "p_in_bias": (2 * D,),
    "g_in_bias": (2 * D,),
    "p_out_bias": (C,),
    "g_out_bias": (C,),
}
SYMBOLS = {
    "norm_in_weight": "[C] = [4]",
    "norm_in_bias": "[C] = [4]",
    "p_in_bias": "[2D] = [10]",
    "g_in_weight": "[2D, C] = [10, 4]",
    "g_in_bias": "[2D] = [10]",
    "norm_out_weight": "[D] = [5]",
    "norm_out_bias": "[D] = [5]",
    "p_out_weight": "[C, D] = [4, 5]",
    "p_out_bias": "[C] = [4]",
    "g_out_weight": "[C, C] = [4, 4]",
    "g_out_bias": "[C] = [4]",
}


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


def test_good_arguments_are_accepted(call):
    assert call().shape == (B, L, L, C)


@pytest.mark.parametrize("direction", ["Outgoing", "", None, np.array(["incoming"] * 2)])
def test_direction(call, direction):
    message = f"direction must be 'outgoing' or 'incoming'; got {direction!r}"
    call.assert_refuses(ValueError, message, direction=direction)


@pytest.mark.parametrize("shape", [(L, C), (B, L, L + 1, C), (B, L, L, 0), (C,), ()])
def test_pair_shape(call, shape):
    message = f"{{pair}} must be [{{leading}}, L, L, C] with C of at least 1; got {shape}"
    call.assert_refuses(ValueError, message, pair=torch.ones(shape))


@pytest.mark.parametrize("shape", [(L, L, C), (1, B, L, L, C)])
def test_only_one_leading_dimension_beside_a_residual(call_with_residual, shape):
    message = f"pair must be [B, L, L, C] with C of at least 1; got {shape}"
    call_with_residual.assert_refuses(ValueError, message, pair=torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_pair_dtype(call, dtype):
    pair = torch.ones(B, L, L, C, dtype=dtype)
    call.assert_refuses(TypeError, f"{{pair}} must be {THREE_DTYPES}; got {dtype}", pair=pair)


@pytest.mark.parametrize("name", ["pair", "mask", *WEIGHT_SHAPES])
def test_an_argument_that_is_no_tensor(call, name):
    shown = "{pair}" if name == "pair" else name
    call.assert_refuses(TypeError, f"{shown} must be a torch.Tensor; got list", **{name: [1.0]})


@pytest.mark.parametrize("name", BIAS_SHAPES)
def test_a_bias_that_is_no_tensor(call_with_biases, name):
    call_with_biases.assert_refuses(
        TypeError, f"{name} must be a torch.Tensor; got int", **{name: 1}
    )


@pytest.mark.parametrize("name", ["residual", "drop_mask"])
def test_a_residual_or_drop_mask_that_is_no_tensor(call_with_residual, name):
    message = f"{name} must be a torch.Tensor; got float"
    call_with_residual.assert_refuses(TypeError, message, **{name: 0.5})


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_required_beside_a_residual(call_with_residual, name):
    message = f"{name} must be a torch.Tensor; got NoneType"
    call_with_residual.assert_refuses(TypeError, message, **{name: None})


@pytest.mark.parametrize("shape", [(2 * D + 1, C), (0, C), (2 * D, C + 1), (2 * D,), (2, D, C)])
def test_p_in_weight_shape(call, shape):
    message = f"p_in_weight must be [2D, C] with C = 4, the channels of {{pair}}; got {shape}"
    call.assert_refuses(ValueError, message, p_in_weight=torch.ones(shape))


@pytest.mark.parametrize("name, shape", [("g_in_weight", (0, C)), ("p_out_weight", (C, 0))])
def test_a_projection_without_channels_beside_made_ones(call_with_biases, name, shape):
    """It says nothing of D, and the message names it and not one that was made."""
    hidden = {"p_in_weight": None, "g_in_weight": None, "p_out_weight": None}
    given = {"norm_out_weight": None, "norm_out_bias": None}
    symbols = {"g_in_weight": "[2D, C]", "p_out_weight": "[C, D]"}[name]
    message = f"{name} must be {symbols} with C = 4; got {shape}"
    call_with_biases.assert_refuses(
        ValueError, message, **hidden | given | {name: torch.ones(shape)}
    )


@pytest.mark.parametrize("name", ["p_in_weight", "g_in_weight", "p_out_weight"])
def test_a_wrong_projection_beside_made_ones_and_right_biases(call_with_biases, name):
    """It is what would say D: the biases, right as they are, must not be blamed."""
    made = {"p_in_weight": None, "g_in_weight": None, "p_out_weight": None}
    message = f"{name} must be a torch.Tensor; got list"
    call_with_biases.assert_refuses(TypeError, message, **made | {name: [1.0]})


def wrong_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """One more along each axis, one axis more and, of a matrix, transposed."""
    wrong = [(*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]) for axis in range(len(shape))]
    wrong.append((1, *shape))
    if len(set(shape)) > 1:
        wrong.append(shape[::-1])
    return wrong


@pytest.mark.parametrize("name", [name for name in WEIGHT_SHAPES if name != "p_in_weight"])
def test_other_weights_shapes(call, name):
    for shape in wrong_shapes(WEIGHT_SHAPES[name]):
        message = f"{name} must be {SYMBOLS[name]}; got {shape}"
        call.assert_refuses(ValueError, message, **{name: torch.ones(shape)})


@pytest.mark.parametrize("name", BIAS_SHAPES)
def test_bias_shapes(call_with_biases, name):
    for shape in wrong_shapes(BIAS_SHAPES[name]):
        message = f"{name} must be {SYMBOLS[name]}; got {shape}"
        call_with_biases.assert_refuses(ValueError, message, **{name: torch.ones(shape)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_have_the_dtype_of_the_pair_tensor(call, name, dtype):
    message = f"{name} must have the dtype of {{pair}}, torch.float32; got {dtype}"
    weight = torch.ones(WEIGHT_SHAPES[name], dtype=dtype)
    call.assert_refuses(TypeError, message, **{name: weight})


NORM_SHAPES = {name: shape for name, shape in WEIGHT_SHAPES.items() if name.startswith("norm_")}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("name", NORM_SHAPES)
def test_norm_dtypes(call, name, dtype):
    message = f"{name} must be {THREE_DTYPES}; got {dtype}"
    call.assert_refuses(TypeError, message, **{name: torch.ones(NORM_SHAPES[name], dtype=dtype)})


@pytest.mark.parametrize("name", BIAS_SHAPES)
def test_bias_dtypes(call_with_biases, name):
    bias = torch.ones(BIAS_SHAPES[name], dtype=torch.float64)
    message = f"{name} must be {THREE_DTYPES}; got torch.float64"
    call_with_biases.assert_refuses(TypeError, message, **{name: bias})


@pytest.mark.parametrize("name", NORM_SHAPES)
def test_norms_may_be_in_another_of_the_three_dtypes_or_absent(call, name):
    for dtype in (torch.bfloat16, torch.float16):
        assert call(**{name: torch.ones(NORM_SHAPES[name], dtype=dtype)}).dtype == torch.float32
    default = torch.ones if name.endswith("weight") else torch.zeros
    torch.testing.assert_close(call(**{name: None}), call(**{name: default(NORM_SHAPES[name])}))


@pytest.mark.parametrize("name", WEIGHT_SHAPES)
def test_weights_on_another_device(call, name):
    message = f"{name} must be on the device of {{pair}}, cpu; got meta"
    call.assert_refuses(ValueError, message, **{name: torch.ones(WEIGHT_SHAPES[name], device=META)})


@pytest.mark.parametrize("name", BIAS_SHAPES)
def test_biases_on_another_device(call_with_biases, name):
    message = f"{name} must be on the device of x, cpu; got meta"
    bias = torch.ones(BIAS_SHAPES[name], device=META)
    call_with_biases.assert_refuses(ValueError, message, **{name: bias})


@pytest.mark.parametrize("shape", [
    (), (0,), (L,), (1, L), (B, L), (L, 1), (1, 1, L), (B, 1, L), (B, L, 1), (1, L, 1), (1, 1, 1),
    (B, L, L + 1), (B, L, L, 1), (B, 1, 1, L),
])  # fmt: skip
def test_a_mask_of_residues_is_not_taken_for_one_of_pairs(call, shape):
    message = (
        f"mask must be [..., L, L] with L = 3, a number for each pair of residues; got {shape}. A "
        "mask of residues? Use m[..., :, None] * m[..., None, :], or lengths="
    )
    call.assert_refuses(ValueError, message, mask=torch.ones(shape))


@pytest.mark.parametrize("shape", [(3, L, L), (2, 3, L, L)])
def test_mask_shape(call, shape):
    message = f"mask must broadcast to [2, 3, 3], {{pair}} without its channels; got {shape}"
    call.assert_refuses(ValueError, message, mask=torch.ones(shape))


def test_a_residual_leaves_the_mask_no_further_dimensions(call_with_residual):
    message = "mask must broadcast to [2, 3, 3], pair without its channels; got (1, 2, 3, 3)"
    call_with_residual.assert_refuses(ValueError, message, mask=torch.ones(1, B, L, L))


def test_mask_dtype_and_device(call):
    mask = torch.ones(B, L, L)
    message = "mask must be bool or real; got torch.complex64"
    call.assert_refuses(TypeError, message, mask=mask.to(torch.complex64))
    message = "mask must be on the device of {pair}, cpu; got meta"
    call.assert_refuses(ValueError, message, mask=mask.to(META))


@pytest.mark.parametrize("shape", [(L, L), (1, L, L), (B, L, L)])
def test_masks_that_broadcast(call, shape):
    mask = torch.rand(shape)
    torch.testing.assert_close(call(mask=mask), call(mask=mask.expand(B, L, L).contiguous()))


def test_a_mask_broadcasts_over_all_leading_dimensions(call_with_biases):
    pair = torch.randn(2, 1, 3, L, L, C)
    mask = torch.rand(3, L, L)
    out = call_with_biases(pair=pair, mask=mask)
    assert out.shape == pair.shape
    for index in range(3):
        alone = call_with_biases(pair=pair[:, 0, index], mask=mask[index])
        torch.testing.assert_close(out[:, 0, index], alone)


@pytest.mark.parametrize("shape", [(B, L, L), (1, L, L, C), (B, L, L, 1)])
def test_residual_shape(call_with_residual, shape):
    message = f"residual must have the shape of pair, [2, 3, 3, 4]; got {shape}"
    call_with_residual.assert_refuses(ValueError, message, residual=torch.ones(shape))


def test_residual_dtype_and_device(call_with_residual):
    residual = torch.ones(B, L, L, C)
    message = "residual must have the dtype of pair, torch.float32; got torch.bfloat16"
    call_with_residual.assert_refuses(TypeError, message, residual=residual.bfloat16())
    message = "residual must be on the device of pair, cpu; got meta"
    call_with_residual.assert_refuses(ValueError, message, residual=residual.to(META))


@pytest.mark.parametrize("shape", [(B, L, C), (B, L, 1, C), (1, 1, L, C), (L, C), (B * L, 1)])
def test_drop_mask_shape(call_with_residual, shape):
    message = f"drop_mask must be [B, 1, L, C] = [2, 1, 3, 4] or [B*L, C] = [6, 4]; got {shape}"
    call_with_residual.assert_refuses(ValueError, message, drop_mask=torch.ones(shape))


def test_drop_mask_dtype_and_device(call_with_residual):
    drop_mask = torch.ones(B * L, C)
    message = "drop_mask must be bool or real; got torch.complex128"
    call_with_residual.assert_refuses(TypeError, message, drop_mask=drop_mask.to(torch.complex128))
    message = "drop_mask must be on the device of pair, cpu; got meta"
    call_with_residual.assert_refuses(ValueError, message, drop_mask=drop_mask.to(META))


def test_both_shapes_of_a_drop_mask_mean_the_same(call_with_residual):
    drop_mask = torch.rand(B, 1, L, C)
    out = call_with_residual(drop_mask=drop_mask)
    torch.testing.assert_close(out, call_with_residual(drop_mask=drop_mask.view(B * L, C)))
    torch.testing.assert_close(out, drop_mask * call_with_residual())
    kept = drop_mask > 0.5
    torch.testing.assert_close(call_with_residual(drop_mask=kept), kept * call_with_residual())
