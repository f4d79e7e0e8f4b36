"""The Kernel Hub's benchmark: `kernels benchmark .` (`make env` installs what it needs).

The runner times each workload of each class, and its reference: the same update in plain PyTorch,
rounded to bfloat16 after every operation as a model without the kernel would. Workloads are named
by the protein's length; without a GPU there is the shortest alone, for the runner prints nothing
before the last. It takes torch's build for the machine: without a GPU it needs one for CPUs.
`esmfold2-trimul bench` measures far more.
"""

from functools import partialmethod

import torch
import torch.nn.functional as F
from kernels.benchmark import Benchmark


class _Workloads:
    """x [1, L, L, C] in bfloat16, norms in float32, a mask that hides the last three residues."""

    seed = 0
    channels: int
    direction: str

    def _draw(self, length: int) -> None:
        def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, device=self.device).mul_(scale)

        c = self.channels
        self.x = randn(1, length, length, c, scale=1.5).add_(0.3).bfloat16()
        real = torch.arange(length, device=self.device) < max(1, length - 3)
        self.mask = (real[:, None] & real[None, :])[None]
        self.norms = {
            "norm_in_weight": 1 + randn(c, scale=0.2),
            "norm_in_bias": randn(c, scale=0.2),
            "norm_out_weight": 1 + randn(c, scale=0.2),
            "norm_out_bias": randn(c, scale=0.2),
        }
        # The runner's tolerance is absolute, 0.01, so the output is scaled to about 0.05: then its
        # bfloat16 roundings stay within it, and a wrong result doesn't.
        scales = {"p_in_weight": 1, "g_in_weight": 1, "p_out_weight": 0.1, "g_out_weight": 1}
        self.projections = {
            name: randn(2 * c if "_in_" in name else c, c, scale=scale * c**-0.5).bfloat16()
            for name, scale in scales.items()
        }

    def _update(self) -> None:
        self.out = self.kernel.triangle_multiplicative_update_with_residual(
            self.x, self.direction, None, None, mask=self.mask, **self.norms, **self.projections
        )

    def _reference(self) -> torch.Tensor:
        w = self.projections

        def layer_norm(value: torch.Tensor, name: str) -> torch.Tensor:
            weight, bias = self.norms[f"{name}_weight"], self.norms[f"{name}_bias"]
            return F.layer_norm(value.float(), value.shape[-1:], weight, bias).bfloat16()

        z = layer_norm(self.x, "norm_in")
        gated = F.linear(z, w["p_in_weight"]) * F.linear(z, w["g_in_weight"]).sigmoid()
        a, b = (gated * self.mask.unsqueeze(-1)).movedim(-1, 1).chunk(2, dim=1)  # [1, C, L, L]
        product = a @ b.mT if self.direction == "outgoing" else a.mT @ b
        mixed = layer_norm(product.movedim(1, -1), "norm_out")
        return F.linear(mixed, w["p_out_weight"]) * F.linear(z, w["g_out_weight"]).sigmoid()


HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()
for length in (76, 256, 512, 1024) if HAS_GPU else (76,):
    setattr(_Workloads, f"setup_length_{length}", partialmethod(_Workloads._draw, length))
    setattr(_Workloads, f"benchmark_length_{length}", _Workloads._update)
    setattr(_Workloads, f"verify_length_{length}", _Workloads._reference)


class OutgoingOf128Channels(_Workloads, Benchmark):
    """The width of AlphaFold's pair tensor."""

    channels, direction = 128, "outgoing"


class OutgoingOf256Channels(_Workloads, Benchmark):
    """ESMFold2's width."""

    channels, direction = 256, "outgoing"


class IncomingOf256Channels(_Workloads, Benchmark):
    """ESMFold2's width, the other direction."""

    channels, direction = 256, "incoming"
