"""Stand-ins for the triangle multiplications of Fold-CP and of esm's port of it, over ranks.

They have these modules' names, parts and arguments, and check their placements, but gather the pair
tensor and write the formula out.
"""

import enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

BLOCKS = (Shard(0), Shard(1), Shard(2))


class _Direction(enum.Enum):
    Outgoing = enum.auto()
    Incoming = enum.auto()


def _replicated(tensor: Tensor, mesh) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim))


class LinearParamsReplicated(nn.Module):
    """Fold-CP's casts its weight to the dtype of x; esm's does not, which here `casts` says."""

    def __init__(self, rows: int, columns: int, mesh, casts: bool) -> None:
        super().__init__()
        self.weight, self.bias = _replicated(torch.randn(rows, columns) / columns**0.5, mesh), None
        self.casts = casts

    def forward(self, x: Tensor) -> Tensor:
        if self.casts:
            return F.linear(x, self.weight.to_local().to(x.dtype))
        self._w_local = self.weight.to_local()  # esm's keeps this, and so has one parameter more
        return F.linear(x, self._w_local)


class LayerNormParamsReplicated(nn.Module):
    def __init__(self, channels: int, mesh) -> None:
        super().__init__()
        self.weight = _replicated(1 + 0.3 * torch.randn(channels), mesh)
        self.bias = _replicated(0.3 * torch.randn(channels), mesh)
        self.normalized_shape, self.eps = [channels], 1e-5

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to_local().to(x.dtype), self.bias.to_local().to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class _OverRanks(nn.Module):
    """What both do: the formula, on whole tensors."""

    norms: tuple[str, str]

    def __init__(self, mesh, direction: str, channels: int = 8, hidden: int = 6) -> None:
        super().__init__()
        self._direction = _Direction[direction.capitalize()]
        self.add_module(self.norms[0], LayerNormParamsReplicated(channels, mesh))
        self.add_module(self.norms[1], LayerNormParamsReplicated(hidden, mesh))
        self.calls = 0

    def run(self, x: DTensor, mask: DTensor | None) -> DTensor:
        self.calls += 1
        for value in (x, mask):
            if value is not None and value.placements != BLOCKS:
                raise ValueError(f"placements must be {BLOCKS}; got {value.placements}")
        whole, m = x.full_tensor(), None if mask is None else mask.full_tensor()[..., None]
        norm_in, norm_out = (self._modules[name] for name in self.norms)
        normed = norm_in(whole)
        values, gates, out_gate = self.projections(normed)
        gated = values * gates.sigmoid()
        a, b = (gated if m is None else gated * m).chunk(2, dim=-1)
        equation = "bikd,bjkd->bijd"
        if self._direction is _Direction.Incoming:
            equation = "bkid,bkjd->bijd"
        update = self.emit(norm_out(torch.einsum(equation, a, b))) * out_gate.sigmoid()
        everywhere = [Replicate()] * x.device_mesh.ndim
        whole = DTensor.from_local(update, x.device_mesh, everywhere, run_check=False)
        return whole.redistribute(placements=x.placements)


class TriangleMultiplicativeBlockDistributed(_OverRanks):
    norms = ("norm_start", "norm_mix")

    def __init__(self, mesh, direction: str, channels: int = 8, hidden: int = 6) -> None:
        super().__init__(mesh, direction, channels, hidden)
        self.proj_bundle = LinearParamsReplicated(4 * hidden, channels, mesh, False)
        self.proj_emit = LinearParamsReplicated(channels, hidden, mesh, False)
        self.proj_gate = LinearParamsReplicated(channels, channels, mesh, False)

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        return *self.proj_bundle(x).chunk(2, dim=-1), self.proj_gate(x)

    def emit(self, x: Tensor) -> Tensor:
        return self.proj_emit(x)

    def forward(self, pair: DTensor, mask: DTensor | None = None) -> DTensor:
        return self.run(pair, mask)


class TriangleMultiplication(_OverRanks):
    norms = ("norm_in", "norm_out")

    def __init__(self, mesh, direction: str, channels: int = 8, hidden: int = 6) -> None:
        super().__init__(mesh, direction, channels, hidden)
        self.p_in = LinearParamsReplicated(2 * hidden, channels, mesh, True)
        self.g_in = LinearParamsReplicated(2 * hidden, channels, mesh, True)
        self.p_out = LinearParamsReplicated(channels, hidden, mesh, True)
        self.g_out = LinearParamsReplicated(channels, channels, mesh, True)

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.p_in(x), self.g_in(x), self.g_out(x)

    def emit(self, x: Tensor) -> Tensor:
        return self.p_out(x)

    def forward(self, x: DTensor, mask: DTensor) -> DTensor:
        return self.run(x, mask)


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    def __init__(self, mesh, **sizes) -> None:
        super().__init__(mesh, "outgoing", **sizes)


class TriangleMultiplicationIncoming(TriangleMultiplication):
    def __init__(self, mesh, **sizes) -> None:
        super().__init__(mesh, "incoming", **sizes)


MAKE = {
    "esm outgoing": lambda mesh: TriangleMultiplicativeBlockDistributed(mesh, "outgoing"),
    "esm incoming": lambda mesh: TriangleMultiplicativeBlockDistributed(mesh, "incoming"),
    "boltz outgoing": TriangleMultiplicationOutgoing,
    "boltz incoming": TriangleMultiplicationIncoming,
}
