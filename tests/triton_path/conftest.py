"""Fixtures of the tests of the Triton path."""

import pytest
import torch


@pytest.fixture
def meta_call(submodule):
    """meta_call(channels, x): a call of bfloat16 on the meta device."""

    def make(channels, x):
        def meta(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        def norm():
            return meta(channels, dtype=torch.float32)

        square, bundle = meta(channels, channels), meta(4 * channels, channels)
        types = submodule("_call")
        weights = types.Weights(
            norm(), norm(), bundle[: 2 * channels], None, bundle[2 * channels :], None,
            norm(), norm(), square, None, square, None,
        )  # fmt: skip
        return types.Call(
            x=x, direction="outgoing", mask=None, residual=None, drop_mask=None, weights=weights,
            eps_in=1e-5, eps_out=1e-5, precision="fp32", memory="default", recompute="none",
            inplace=False, lengths=None,
        )  # fmt: skip

    return make
