"""Prepared launches: arguments by name."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _scale_kernel(out_ptr, x_ptr, factor, N: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N)
    tl.store(out_ptr + offs, x * factor, mask=offs < N)


@pytest.fixture
def prepare(submodule, on_triton):
    """prepare(**changes): a launch of the kernel above, its names in another order than there."""

    def prepare(**changes):
        named = {
            "tensors": {"x_ptr": None, "out_ptr": None},
            "values": {"factor": 3.0},
            "constants": {"BLOCK": 8, "N": 5},
            "options": {"num_warps": 1},
        }
        launch = submodule("triton_parts.launch")
        return launch.PreparedLaunch(_scale_kernel, 1, **(named | changes))

    return prepare


def test_every_argument_finds_its_parameter(prepare, on_triton):
    x = torch.arange(8.0, device=on_triton)
    prepared = prepare()
    for _ in range(2):  # through Triton's dispatch, and past it
        out = torch.zeros_like(x)
        prepared.launch(x_ptr=x, out_ptr=out)
        assert out.tolist() == [0, 3, 6, 9, 12, 0, 0, 0]
        out.zero_()
        prepared.launch(out_ptr=out, x_ptr=x)
        assert out.tolist() == [0, 3, 6, 9, 12, 0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": {}}, "got without a value factor, and unknown none"),
        ({"values": {"factor": 3.0, "shift": 1}}, "without a value none, and unknown shift"),
        ({"tensors": {"x_ptr": None, "y_ptr": None}}, "without a value out_ptr, and unknown y_ptr"),
        ({"constants": {"BLOCK": 8, "M": 5}}, "without a value N, and unknown M"),
    ],
)
def test_names_that_do_not_fit_the_kernel_are_refused(prepare, changes, message):
    with pytest.raises(TypeError, match=f"_scale_kernel must get its own parameters; .*{message}"):
        prepare(**changes)


def test_a_launch_takes_every_tensor_and_no_other(prepare):
    x = torch.zeros(8)
    message = "tensors must be x_ptr, out_ptr; got "
    with pytest.raises(TypeError, match=message + "x_ptr$"):
        prepare().launch(x_ptr=x)
    with pytest.raises(TypeError, match=message + "x_ptr, y_ptr"):
        prepare().launch(x_ptr=x, y_ptr=x)


def test_a_descriptor_keeps_its_type(submodule):
    """Gluon has a class of its own."""

    class Descriptor:
        def __init__(self):
            self.base, self.shape = None, [4]

    x = torch.zeros(4)
    based = submodule("triton_parts.launch")._based(Descriptor(), x)
    assert type(based) is Descriptor and based.base is x and based.shape == [4]


@pytest.mark.parametrize("shape", [(1, 3), (1, 8), (1, 2, 24), (5, 1, 24), (3, 8)])
def test_a_descriptor_of_any_tensor_that_may_have_one(submodule, shape):
    """An axis of length 1 has a stride that nobody uses, and that TMA would refuse."""
    launch = submodule("triton_parts.launch")
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    assert launch.has_descriptor(tensor)
    made = launch.descriptor_of(tensor, tensor.shape, tensor.stride(), [16] * tensor.ndim)
    for size, stride, own in zip(shape, made.strides, tensor.stride(), strict=True):
        assert stride == own if size > 1 else stride % 8 == 0 < stride
    assert launch.has_descriptor(tensor, stored=True) == (shape[-1] % 8 == 0)
