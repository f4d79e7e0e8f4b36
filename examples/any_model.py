"""Uses the kernel in a model of the AlphaFold family other than ESMFold2.

    python examples/any_model.py

A model that calls cuequivariance_torch's triangle_multiplicative_update (Boltz and others do)
changes one import, because our function takes the same arguments in the same order:

    # before
    from cuequivariance_torch import triangle_multiplicative_update
    # after
    triangle_multiplicative_update = get_local_kernel(ROOT).triangle_multiplicative_update
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from kernels import get_local_kernel
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]  # the kernel repository
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
triangle_multiplicative_update = get_local_kernel(ROOT).triangle_multiplicative_update


class TriangleMultiplication(nn.Module):
    """AlphaFold 2, Algorithm 11 ("outgoing") or 12 ("incoming"); hidden may differ from channels.

    The linear layers have no biases here. The function takes those of a model that has them as
    p_in_bias, g_in_bias, p_out_bias and g_out_bias.
    """

    def __init__(self, channels: int, hidden: int, direction: str) -> None:
        super().__init__()
        self.direction = direction
        self.norm_in, self.norm_out = nn.LayerNorm(channels), nn.LayerNorm(hidden)
        # Rows [0, hidden) of both make the left factor a, the other rows the right factor b.
        self.p_in = nn.Linear(channels, 2 * hidden, bias=False)
        self.g_in = nn.Linear(channels, 2 * hidden, bias=False)
        self.p_out = nn.Linear(hidden, channels, bias=False)
        self.g_out = nn.Linear(channels, channels, bias=False)

    def forward(self, pair: Tensor, mask: Tensor) -> Tensor:
        return triangle_multiplicative_update(
            pair,
            direction=self.direction,
            mask=mask,
            norm_in_weight=self.norm_in.weight,
            norm_in_bias=self.norm_in.bias,
            p_in_weight=self.p_in.weight,
            g_in_weight=self.g_in.weight,
            norm_out_weight=self.norm_out.weight,
            norm_out_bias=self.norm_out.bias,
            p_out_weight=self.p_out.weight,
            g_out_weight=self.g_out.weight,
            eps=self.norm_in.eps,
        )

    def in_plain_pytorch(self, pair: Tensor, mask: Tensor) -> Tensor:
        """The same update without the kernel."""
        z = self.norm_in(pair)
        left, right = (self.p_in(z) * self.g_in(z).sigmoid() * mask[..., None]).chunk(2, dim=-1)
        equation = "bikd,bjkd->bijd" if self.direction == "outgoing" else "bkid,bkjd->bijd"
        product = torch.einsum(equation, left, right)
        return self.p_out(self.norm_out(product)) * self.g_out(z).sigmoid()


class PairBlock(nn.Module):
    """The triangle multiplications and the transition of a pair stack's block."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.outgoing = TriangleMultiplication(channels, hidden, "outgoing")
        self.incoming = TriangleMultiplication(channels, hidden, "incoming")
        self.norm = nn.LayerNorm(channels)
        self.wide = nn.Linear(channels, 2 * channels)
        self.narrow = nn.Linear(2 * channels, channels)

    def forward(self, pair: Tensor, mask: Tensor) -> Tensor:
        pair = pair + self.outgoing(pair, mask)
        pair = pair + self.incoming(pair, mask)
        return pair + self.narrow(F.relu(self.wide(self.norm(pair))))


def main() -> None:
    torch.manual_seed(0)
    block = PairBlock(channels=64, hidden=32).to(DEVICE)
    pair = torch.randn(2, 40, 40, 64, device=DEVICE)
    length = torch.tensor([40, 31], device=DEVICE)  # the second protein is padded
    real = torch.arange(40, device=DEVICE) < length[:, None]
    mask = real[:, :, None] & real[:, None, :]

    with torch.no_grad():
        print("block:", list(block(pair, mask).shape), "on", DEVICE)
        for layer in (block.outgoing, block.incoming):
            wanted = layer.in_plain_pytorch(pair, mask)
            difference = (layer(pair, mask) - wanted).norm() / wanted.norm()
            print(f"{layer.direction}: relative difference from plain PyTorch {difference:.1e}")

    # Training works: every parameter gets a gradient.
    block(pair, mask).square().mean().backward()
    missing = sum(parameter.grad is None for parameter in block.parameters())
    print("parameters without a gradient:", missing)


if __name__ == "__main__":
    main()
