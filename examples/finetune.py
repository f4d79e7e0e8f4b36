"""Trains the trunk of an ESMFold2 with the kernel's layer at every site, patched, and without it.

    python examples/finetune.py --device cuda --length 256 --width 256 --steps 20

"ours" has the layer at the triangles, "ours, patched" whole pair layers with their transitions. All
trainings start from the same weights and draw the same random numbers, so their losses must agree.
The model is small, its weights are random and its target is a made-up chain, so what it
learns has no meaning. For a real model load EsmFold2Model.from_pretrained("biohub/ESMFold2").
"""

import argparse
import copy
import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from esmfold2_trimul_tools.folding.memory import measure_peak_memory
from esmfold2_trimul_tools.folding.model import random_config, random_model
from esmfold2_trimul_tools.repository import load_kernel
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomInputs
from transformers.models.esmfold2.protein_utils import prepare_protein_features

ROOT = Path(__file__).resolve().parents[1]  # the kernel repository
SITE_NAME = "EsmFold2TriangleMultiplication"  # as transformers calls the layer to be replaced
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"


class Training(NamedTuple):
    """The results of a training: the loss of each step, steps a second, bytes at the peak."""

    losses: list[float]
    speed: float
    peak_bytes: int


def sites_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for part in model.modules() if getattr(part, "kernel_layer_name", "") == SITE_NAME]


def swap_in(model: torch.nn.Module, device: torch.device) -> int:
    """Put the layer at every site, for training; returns how many have it."""
    layer = LocalLayerRepository(repo_path=ROOT, layer_name="ESMFold2TriangleMultiplication")
    mapping = {SITE_NAME: {device.type: {Mode.TRAINING: layer}}}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        for site in sites_of(model):
            kernelize(site, mode=Mode.TRAINING, device=device.type)
    return sum("forward" in vars(site) for site in sites_of(model))  # kernelize puts it there


def featurize(sequence: str, device: torch.device) -> dict:
    """The arguments of the model's forward, as `fold` makes them."""
    features = prepare_protein_features(sequence, device=device)
    del features["distogram_atom_idx"]  # for the confidence head, which isn't trained
    names = [field.name for field in dataclasses.fields(EsmFold2AtomInputs)]
    atoms = {name: features.pop(name) for name in names}
    return features | {"atom_inputs": EsmFold2AtomInputs(**atoms)}


def target_bins(length: int, bins: int, device: torch.device) -> torch.Tensor:
    """[L, L] bins of the distances in a chain of 3.8 Angstrom steps in random directions."""
    steps = torch.randn(length, 3, generator=torch.Generator().manual_seed(1))
    chain = (3.8 * torch.nn.functional.normalize(steps, dim=-1)).cumsum(0)
    edges = torch.linspace(2.3, 21.7, bins - 1)
    return torch.bucketize(torch.cdist(chain, chain), edges).to(device)


def train(model: torch.nn.Module, features: dict, steps: int, rate: float) -> Training:
    """Train folding trunk and distogram head on the target, with AdamW."""
    device = model.device
    parts = (model.folding_trunk, model.distogram_head)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    model.requires_grad_(False).train()
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    length = features["attention_mask"].shape[1]
    bins = target_bins(length, model.distogram_head.out_features, device)
    losses, seconds = [], []
    with measure_peak_memory(device) as peak:
        for step in range(steps):
            started = time.perf_counter()
            torch.manual_seed(step)  # the initial pair state and dropout are random
            logits = model(**features, num_loops=0).distogram_logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 2), bins.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # waits for the device
            seconds.append(time.perf_counter() - started)
    # The first step includes compilation.
    return Training(losses, len(seconds[1:]) / sum(seconds[1:]), peak.added_bytes)


def draw(trainings: dict[str, Training], path: Path) -> None:
    """Draws the loss curves into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, training), style in zip(trainings.items(), ("-", "--", ":"), strict=True):
        axes.plot(training.losses, style, label=name, linewidth=2.5)
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy of the distogram")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--length", type=int, default=48, help="residues")
    parser.add_argument("--width", type=int, default=32, help="channels of the pair tensor")
    parser.add_argument("--layers", type=int, default=2, help="of the folding trunk")
    parser.add_argument("--steps", type=int, default=8, help="at least 2")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--out", type=Path, default=Path("out/finetune.png"), help="the plot")
    args = parser.parse_args()

    config = random_config(args.width, trunk_layers=args.layers, side_layers=1, coda_layers=1)
    stock = random_model(args.device, torch.float32, seed=0, config=config)
    ours, patched = copy.deepcopy(stock), copy.deepcopy(stock)
    sequence = "".join(RESIDUES[i % len(RESIDUES)] for i in range(args.length))
    features = featurize(sequence, args.device)
    print(f"sites swapped: {swap_in(ours, args.device)} of {len(sites_of(ours))}")
    report = load_kernel(ROOT).patch(patched)
    print(f"modules patched: {len(report.swapped)}, left: {len(report.left)}")
    trainings = {
        "ours": train(ours, features, args.steps, args.rate),
        "ours, patched": train(patched, features, args.steps, args.rate),
        "stock": train(stock, features, args.steps, args.rate),
    }
    for name, training in trainings.items():
        print(
            f"{name}: loss {training.losses[0]:.4f} to {training.losses[-1]:.4f}, "
            f"{training.speed:.2f} steps a second, peak {training.peak_bytes / 2**20:.0f} MiB"
        )
    losses = zip(*(training.losses for training in trainings.values()), strict=True)
    difference = max((max(of_step) - min(of_step)) / min(of_step) for of_step in losses)
    print(f"the losses differ by at most {difference:.1e} of them")
    draw(trainings, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
