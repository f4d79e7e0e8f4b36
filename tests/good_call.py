"""A call of either public function with good arguments, any of which can be replaced."""

import pytest
import torch
from torch import Tensor

B, L, C, D = 2, 3, 4, 5
# For each function its name for the pair tensor, and the axes before L, L, C.
FUNCTIONS = {
    "triangle_multiplicative_update": ("x", "..."),
    "triangle_multiplicative_update_with_residual": ("pair", "B"),
}
WEIGHT_SHAPES = {
    "norm_in_weight": (C,),
    "norm_in_bias": (C,),
    "p_in_weight": (2 * D, C),
    "g_in_weight": (2 * D, C),
    "norm_out_weight": (D,),
    "norm_out_bias": (D,),
    "p_out_weight": (C, D),
    "g_out_weight": (C, C),
}
PROJECTIONS = ("p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight")


class Call:
    """One public function with good arguments."""

    def __init__(self, kernel, name: str, with_grad: bool) -> None:
        self.function = getattr(kernel, name)
        self.pair_name, self.leading = FUNCTIONS[name]
        self.with_grad = with_grad

    def __call__(self, **changes) -> Tensor:
        """The function's value with these arguments in place of the good ones."""
        torch.manual_seed(0)
        arguments = {"pair": torch.randn(B, L, L, C), "direction": "outgoing"}
        arguments |= {name: torch.randn(shape) for name, shape in WEIGHT_SHAPES.items()}
        if self.pair_name == "pair":
            arguments |= {"residual": None, "drop_mask": None}
        arguments |= changes
        if self.with_grad:
            for name, value in arguments.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    arguments[name] = value.detach().requires_grad_()
        arguments[self.pair_name] = arguments.pop("pair")
        return self.function(**arguments)

    def assert_refuses(self, error: type[Exception], message: str, **changes) -> None:
        with pytest.raises((TypeError, ValueError)) as caught:
            self(**changes)
        wanted = message.replace("{pair}", self.pair_name).replace("{leading}", self.leading)
        assert (caught.type, str(caught.value)) == (error, wanted)


H = 6
TRANSITION_SHAPES = {
    "norm_weight": (C,),
    "norm_bias": (C,),
    "gate_weight": (H, C),
    "gate_bias": (H,),
    "up_weight": (H, C),
    "up_bias": (H,),
    "down_weight": (C, H),
    "down_bias": (C,),
}


class TransitionCall:
    """`swiglu_transition` with good arguments."""

    def __init__(self, kernel, with_grad: bool) -> None:
        self.function = kernel.swiglu_transition
        self.with_grad = with_grad

    def __call__(self, **changes) -> Tensor:
        """The function's value with these arguments in place of the good ones."""
        torch.manual_seed(0)
        arguments = {"x": torch.randn(B, L, L, C)}
        arguments |= {name: torch.randn(shape) for name, shape in TRANSITION_SHAPES.items()}
        arguments |= changes
        if self.with_grad:
            for name, value in arguments.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    arguments[name] = value.detach().requires_grad_()
        return self.function(**arguments)

    def assert_refuses(self, error: type[Exception], message: str, **changes) -> None:
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
            self(**changes)
        assert (caught.type, str(caught.value)) == (error, message)
