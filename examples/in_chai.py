"""Uses the kernel for Chai-1's triangle multiplication: two calls, one for each direction.

    python examples/in_chai.py

Chai-1 is shipped as TorchScript, whose modules can't be patched. `from_chai` reads one of its
blocks, or the same parameters in a port of it. Here a small block with these parameters stands in.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from kernels import get_local_kernel
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = get_local_kernel(Path(__file__).resolve().parents[1])


class TriangleMultiplication(nn.Module):
    """The parameters and the formula of Chai-1's block, both directions in one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layernorm_z_in = nn.LayerNorm(dim)
        self.merged_linear_p = nn.Linear(dim, 4 * dim, bias=False)
        self.merged_linear_g = nn.Linear(dim, 5 * dim, bias=False)
        self.linear_z_out = nn.Linear(dim, dim, bias=False)

    def forward(self, pair: Tensor, mask: Tensor) -> Tensor:
        z = self.layernorm_z_in(pair)
        gates = self.merged_linear_g(z).sigmoid()
        dim = z.shape[-1]
        a, b, c, d = (self.merged_linear_p(z) * gates[..., :-dim]).chunk(4, dim=-1)
        mask, turned = mask[..., None], mask.transpose(1, 2)[..., None]
        outgoing = torch.einsum("bikd,bjkd->bijd", a * mask, b * mask)
        incoming = torch.einsum("bkid,bkjd->bijd", c * turned, d * turned)
        total = F.layer_norm(outgoing, (dim,)) + F.layer_norm(incoming, (dim,))
        return self.linear_z_out(total) * gates[..., -dim:]


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    block = TriangleMultiplication(64).to(DEVICE)
    pair = torch.randn(1, 40, 40, 64, device=DEVICE)
    mask = torch.rand(1, 40, 40, device=DEVICE) > 0.1
    wanted = block(pair, mask)
    print("modules: a stand-in for Chai-1's")
    print(kernel.patch(nn.ModuleDict({"triangle_multiplication": block})))

    outgoing, incoming = kernel.from_chai(block)
    got = kernel.triangle_multiplicative_update(pair, mask=mask, **outgoing)
    got += kernel.triangle_multiplicative_update(pair, mask=mask.transpose(1, 2), **incoming)
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"two calls: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
