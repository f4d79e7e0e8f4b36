"""Uses the kernel in OpenFold, OpenFold 3 and ESMFold with `patch(model)`, training included.

    python examples/in_openfold.py

The example uses the modules of OpenFold 3 or OpenFold where one is installed. Otherwise it uses
those of ESMFold in transformers, which have OpenFold's parameters under the same names.
"""

from pathlib import Path
from types import SimpleNamespace

import torch
from kernels import get_local_kernel
from torch import Tensor, nn

try:
    try:
        from openfold3.core.model.layers.triangular_multiplicative_update import (
            TriangleMultiplicativeUpdate,
        )

        MODULES = "of openfold3"
    except ImportError:
        from openfold.model.triangular_multiplicative_update import TriangleMultiplicativeUpdate

        MODULES = "of openfold"
except ImportError:
    from transformers.models.esm.modeling_esmfold import EsmFoldTriangleMultiplicativeUpdate

    MODULES = "of ESMFold in transformers"

    def TriangleMultiplicativeUpdate(c_z: int, c_hidden: int, _outgoing: bool) -> nn.Module:
        config = SimpleNamespace(pairwise_state_dim=c_z)
        return EsmFoldTriangleMultiplicativeUpdate(config, _outgoing)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = get_local_kernel(Path(__file__).resolve().parents[1])


class PairBlock(nn.Module):
    """The triangle multiplications of an Evoformer block."""

    def __init__(self, c_z: int, c_hidden: int) -> None:
        super().__init__()
        self.tri_mul_out = TriangleMultiplicativeUpdate(c_z, c_hidden, _outgoing=True)
        self.tri_mul_in = TriangleMultiplicativeUpdate(c_z, c_hidden, _outgoing=False)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = z + self.tri_mul_out(z, mask=mask)
        return z + self.tri_mul_in(z, mask=mask)


def result_and_gradient(block: PairBlock, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    block.zero_grad()
    out = block(z, mask)
    out.square().mean().backward()
    return out.detach(), block.tri_mul_out.linear_z.weight.grad


def main() -> None:
    torch.manual_seed(0)
    block = PairBlock(c_z=64, c_hidden=32).to(DEVICE)
    with torch.no_grad():
        for parameter in block.parameters():  # at the start the outputs are zero
            parameter.normal_(std=0.2)
    z = torch.randn(1, 40, 40, 64, device=DEVICE)
    mask = (torch.rand(1, 40, 40, device=DEVICE) > 0.1).float()
    print("modules:", MODULES)

    original = result_and_gradient(block, z, mask)
    with kernel.patch(block) as report:  # without the `with`, the patch stays
        print(report)
        patched = result_and_gradient(block, z, mask)
    for name, got, wanted in zip(("result", "gradient"), patched, original, strict=True):
        difference = (got - wanted).abs().max() / wanted.abs().max()
        print(f"{name} of the patched model: largest relative difference {difference:.1e}")

    wanted = block.tri_mul_in(z, mask)
    arguments = kernel.from_openfold(block.tri_mul_in)
    got = kernel.triangle_multiplicative_update(z, mask=mask, **arguments)
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"one module: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
