"""A pair stack on the rows of several processes: triangles and a transition, each rank its rows.

    torchrun --standalone --nproc-per-node 2 examples/sharded_pairs.py --length 96

With a GPU for each process they exchange by NCCL, otherwise by gloo on the CPU. No process holds
the whole pair tensor, but for the first one in the end, which computes it alone to compare. With
--train they compute the parameters' gradients too.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from kernels import get_local_kernel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

ROOT = Path(__file__).resolve().parents[1]  # the kernel repository
kernel = get_local_kernel(ROOT)


def draw(channels: int, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """Random parameters of a layer, the same on every rank."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device)

    def triangle() -> dict[str, Tensor]:
        return {
            "norm_in_weight": 1 + randn(channels), "norm_in_bias": randn(channels),
            "p_in_weight": randn(2 * channels, channels),
            "g_in_weight": randn(2 * channels, channels),
            "norm_out_weight": 1 + randn(channels), "norm_out_bias": randn(channels),
            "p_out_weight": randn(channels, channels), "g_out_weight": randn(channels, channels),
        }  # fmt: skip

    transition = {
        "norm_weight": 1 + randn(channels), "norm_bias": randn(channels),
        "gate_weight": randn(4 * channels, channels), "up_weight": randn(4 * channels, channels),
        "down_weight": randn(channels, 4 * channels),
    }  # fmt: skip
    return {"outgoing": triangle(), "incoming": triangle(), "transition": transition}


def layer(pair: Tensor, parameters: dict[str, dict[str, Tensor]]) -> Tensor:
    """Two triangle multiplications and a transition of a pair tensor, which may be a DTensor."""
    for direction in ("outgoing", "incoming"):
        pair = kernel.triangle_multiplicative_update_with_residual(
            pair, direction, pair, None, **parameters[direction]
        )
    if not isinstance(pair, DTensor):
        return kernel.swiglu_transition(pair, residual=pair, **parameters["transition"])
    rows = pair.to_local()  # a transition is of each pair alone
    rows = kernel.swiglu_transition(rows, residual=rows, **parameters["transition"])
    return DTensor.from_local(
        rows, pair.device_mesh, pair.placements, shape=pair.shape, stride=pair.stride()
    )


def train(rows: Tensor, parameters: dict[str, dict[str, Tensor]], summed: bool) -> Tensor:
    """The parameters' gradients of a loss that is a sum over pairs, of which a rank has its own."""
    rows.square().sum().backward()
    for value in parameters["transition"].values():
        if summed:  # those of triangles on DTensors are sums over the ranks already
            dist.all_reduce(value.grad)
    values = [value for part in parameters.values() for value in part.values()]
    found = torch.cat([value.grad.flatten() for value in values])
    for value in values:
        value.grad = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--train", action="store_true", help="gradients too")
    arguments = parser.parse_args()
    length, channels = arguments.length, arguments.channels

    # As torchrun numbers them: all processes, and those of this host.
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    of_host, local_rank = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.device_count() >= of_host:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (ranks,))  # NCCL or gloo, by the type of device
    parameters = draw(channels, device)
    for value in [value for part in parameters.values() for value in part.values()]:
        value.requires_grad_(arguments.train)

    # Each rank makes its own rows: here an outer sum of single representations, as a fold would.
    singles = torch.randn(2, length, channels, generator=torch.Generator().manual_seed(1))
    left, right = singles.to(device)
    shares = torch.arange(length).chunk(ranks)  # the last ranks may have none
    rows = shares[rank] if rank < len(shares) else shares[0][:0]
    local = left[rows][None, :, None] + right[None, None]  # [1, R, L, C]
    like = torch.empty(1, length, length, channels, device="meta")
    pair = DTensor.from_local(local, mesh, [Shard(1)], shape=like.shape, stride=like.stride())
    made = layer(pair, parameters)
    whole, parts = made.detach().full_tensor(), [None] * ranks
    if arguments.train:
        grads = train(made.to_local(), parameters, summed=True)
    dist.all_gather_object(parts, f"rank {rank} of {ranks} on {device}: {list(local.shape)}")
    if rank == 0:
        alone = layer(left[None, :, None] + right[None, None], parameters)
        difference = (whole - alone).norm() / alone.norm()
        print(*parts, sep="\n")
        print(f"relative difference from one process: {difference:.1e}")
        if arguments.train:
            wanted = train(alone, parameters, summed=False)
            difference = (grads - wanted).norm() / wanted.norm()
            print(f"relative difference of the parameters' gradients: {difference:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
