"""Uses the kernel in Protenix: one line for the whole model, in-place sums included.

    python examples/in_protenix.py

The example uses Protenix's own modules where it is installed, and otherwise small stand-ins with
the same parameters. Protenix's pair tensor has no batch dimension, and in inference its triangle
multiplications add to it in place.
"""

from pathlib import Path

import torch
from kernels import get_local_kernel
from torch import Tensor, nn

try:
    from protenix.model.triangular.triangular import (
        TriangleMultiplicationIncoming,
        TriangleMultiplicationOutgoing,
    )

    MODULES = "of protenix"
except ImportError:
    MODULES = "a stand-in for protenix's"

    class TriangleMultiplicativeUpdate(nn.Module):
        def __init__(self, c_z: int, c_hidden: int, _outgoing: bool = True) -> None:
            super().__init__()
            self._outgoing = _outgoing
            self.layer_norm_in, self.layer_norm_out = nn.LayerNorm(c_z), nn.LayerNorm(c_hidden)
            self.linear_a_p = nn.Linear(c_z, c_hidden, bias=False)
            self.linear_a_g = nn.Linear(c_z, c_hidden, bias=False)
            self.linear_b_p = nn.Linear(c_z, c_hidden, bias=False)
            self.linear_b_g = nn.Linear(c_z, c_hidden, bias=False)
            self.linear_z = nn.Linear(c_hidden, c_z, bias=False)
            self.linear_g = nn.Linear(c_z, c_z, bias=False)

        def forward(
            self,
            z: Tensor,
            mask: Tensor | None = None,
            inplace_safe: bool = False,
            _add_with_inplace: bool = False,
            _inplace_chunk_size: int | None = 256,
            triangle_multiplicative: str = "torch",
        ) -> Tensor:
            x = self.layer_norm_in(z)
            a = self.linear_a_p(x) * self.linear_a_g(x).sigmoid() * mask[..., None]
            b = self.linear_b_p(x) * self.linear_b_g(x).sigmoid() * mask[..., None]
            equation = "ikd,jkd->ijd" if self._outgoing else "kid,kjd->ijd"
            update = self.linear_z(self.layer_norm_out(torch.einsum(equation, a, b)))
            update = update * self.linear_g(x).sigmoid()
            return z.add_(update) if inplace_safe and _add_with_inplace else update

    class TriangleMultiplicationOutgoing(TriangleMultiplicativeUpdate):
        pass

    class TriangleMultiplicationIncoming(TriangleMultiplicativeUpdate):
        def __init__(self, c_z: int, c_hidden: int) -> None:
            super().__init__(c_z, c_hidden, _outgoing=False)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = get_local_kernel(Path(__file__).resolve().parents[1])


class PairBlock(nn.Module):
    """The triangle multiplications of a pairformer's block, in inference."""

    def __init__(self, c_z: int, c_hidden: int) -> None:
        super().__init__()
        self.tri_mul_out = TriangleMultiplicationOutgoing(c_z, c_hidden)
        self.tri_mul_in = TriangleMultiplicationIncoming(c_z, c_hidden)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = self.tri_mul_out(z, mask=mask, inplace_safe=True, _add_with_inplace=True)
        return self.tri_mul_in(z, mask=mask, inplace_safe=True, _add_with_inplace=True)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    block = PairBlock(c_z=64, c_hidden=32).to(DEVICE)
    for parameter in block.parameters():  # at the start Protenix's outputs are zero
        parameter.normal_(std=0.2)
    z = torch.randn(40, 40, 64, device=DEVICE)
    mask = (torch.rand(40, 40, device=DEVICE) > 0.1).float()
    print("modules:", MODULES)

    wanted = block(z.clone(), mask)
    with kernel.patch(block) as report:  # without the `with`, the patch stays
        print(report)
        pair = z.clone()
        got = block(pair, mask)
    print("in place:", got is pair)
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"patched model: largest relative difference {difference:.1e}")

    wanted = block.tri_mul_in(z, mask)
    arguments = kernel.from_protenix(block.tri_mul_in)
    got = kernel.triangle_multiplicative_update(z, mask=mask, **arguments)
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"one module: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
