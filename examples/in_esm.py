"""Uses the kernel in biohub's esm, its ESMFold2: one line for the whole model, or one module.

    python examples/in_esm.py

The example needs esm 3.4.1, which needs Python 3.12 or newer. A whole model is patched like the
trunk here: kernel.patch(EsmFold2Model.from_pretrained(...)).
"""

from pathlib import Path

import torch
from kernels import get_local_kernel

try:
    from esm.models.esmfold2.layers import FoldingTrunk
except ImportError as error:
    raise SystemExit(f"biohub's esm is missing ({error}): pip install esm==3.4.1.post1") from None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = get_local_kernel(Path(__file__).resolve().parents[1])


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    trunk = FoldingTrunk(n_layers=2, d_pair=64).to(DEVICE).eval()
    pair = torch.randn(1, 40, 40, 64, device=DEVICE)
    mask = (torch.rand(1, 40, 40, device=DEVICE) > 0.1).float()

    wanted = trunk(pair, mask)
    with kernel.patch(trunk) as report:  # without the `with`, the patch stays
        print(report)
        got = trunk(pair, mask)
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"patched trunk: largest relative difference {difference:.1e}")

    module = trunk.blocks[0].tri_mul_in._engine
    wanted = module(pair, mask)
    got = kernel.triangle_multiplicative_update(pair, mask=mask, **kernel.from_esm(module))
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"one triangle: largest relative difference {difference:.1e}")

    transition = trunk.blocks[0].pair_transition
    wanted = transition(pair)
    got = kernel.swiglu_transition(pair, residual=pair, **kernel.transition_from_esm(transition))
    difference = (got - wanted).abs().max() / wanted.abs().max()
    print(f"one transition: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
