"""Uses the kernel in Boltz (1 or 2): one line for the whole model, or the weights of one module.

    python examples/in_boltz.py

The example uses Boltz's own modules where boltz is installed, and otherwise small stand-ins with
the same parameters.
"""

from pathlib import Path

import torch
from kernels import get_local_kernel
from torch import Tensor, nn

try:
    from boltz.model.layers.triangular_mult import (
        TriangleMultiplicationIncoming,
        TriangleMultiplicationOutgoing,
    )

    MODULES = "of boltz"
except ImportError:
    MODULES = "a stand-in for boltz's"

    class TriangleMultiplicationOutgoing(nn.Module):
        equation = "bikd,bjkd->bijd"

        def __init__(self, dim: int = 128) -> None:
            super().__init__()
            self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.p_in = nn.Linear(dim, 2 * dim, bias=False)
            self.g_in = nn.Linear(dim, 2 * dim, bias=False)
            self.p_out = nn.Linear(dim, dim, bias=False)
            self.g_out = nn.Linear(dim, dim, bias=False)

        def forward(self, x: Tensor, mask: Tensor, use_kernels: bool = False) -> Tensor:
            z = self.norm_in(x)
            a, b = (self.p_in(z) * self.g_in(z).sigmoid() * mask[..., None]).chunk(2, dim=-1)
            product = torch.einsum(self.equation, a, b)
            return self.p_out(self.norm_out(product)) * self.g_out(z).sigmoid()

    class TriangleMultiplicationIncoming(TriangleMultiplicationOutgoing):
        equation = "bkid,bkjd->bijd"

        # `patch` recognises a class by the forward that it defines; both of Boltz's define one.
        def forward(self, x: Tensor, mask: Tensor, use_kernels: bool = False) -> Tensor:
            return super().forward(x, mask, use_kernels)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = get_local_kernel(Path(__file__).resolve().parents[1])


class PairLayer(nn.Module):
    """The triangle multiplications of a pairformer's layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tri_mul_out = TriangleMultiplicationOutgoing(dim)
        self.tri_mul_in = TriangleMultiplicationIncoming(dim)

    def forward(self, pair: Tensor, mask: Tensor) -> Tensor:
        pair = pair + self.tri_mul_out(pair, mask=mask)
        return pair + self.tri_mul_in(pair, mask=mask)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([PairLayer(64) for _ in range(2)]).to(DEVICE)
    for parameter in model.parameters():  # at the start Boltz's outputs are zero
        parameter.normal_(std=0.2)
    pair = torch.randn(1, 40, 40, 64, device=DEVICE)
    mask = (torch.rand(1, 40, 40, device=DEVICE) > 0.1).float()
    print("modules:", MODULES)

    wanted = model[1](model[0](pair, mask), mask)
    with kernel.patch(model) as report:  # without the `with`, the patch stays
        print(report)
        got = model[1](model[0](pair, mask), mask)
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"patched model: largest relative difference {difference:.1e}")

    module = model[0].tri_mul_in
    wanted = module(pair, mask)
    arguments = kernel.from_boltz(module)
    got = kernel.triangle_multiplicative_update(pair, mask=mask, **arguments)
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"one module: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
