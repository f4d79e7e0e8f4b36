"""Puts the kernel's layer into an ESMFold2 of transformers and folds with it.

    python examples/fold_with_kernel.py

Runs on a CPU in seconds. The model is tiny and its weights are random, so the structure has no
meaning. For a real fold set DEVICE = "cuda" and load the model with
EsmFold2Model.from_pretrained("biohub/ESMFold2", dtype=torch.bfloat16, device_map=DEVICE).
"""

from pathlib import Path

import torch
from esmfold2_trimul_tools.folding.model import random_config, random_model
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

ROOT = Path(__file__).resolve().parents[1]  # the kernel repository
DEVICE = "cpu"
SEQUENCE = "MQIFVKTLTGKTITLEVEPSDT"
SITE_NAME = "EsmFold2TriangleMultiplication"  # as transformers calls the layer to be replaced


def sites_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for part in model.modules() if getattr(part, "kernel_layer_name", "") == SITE_NAME]


def swap_in(model: torch.nn.Module) -> int:
    """Put the layer at every site; returns how many have it, because a miss raises no error."""
    layer = LocalLayerRepository(repo_path=ROOT, layer_name="ESMFold2TriangleMultiplication")
    with use_kernel_mapping({SITE_NAME: {DEVICE: {Mode.INFERENCE: layer}}}, inherit_mapping=False):
        for site in sites_of(model):
            kernelize(site, mode=Mode.INFERENCE, device=DEVICE)
    return sum("forward" in vars(site) for site in sites_of(model))  # kernelize puts it there


def fold(model: torch.nn.Module):
    torch.manual_seed(0)  # the initial pair state and the sampler's noise are random
    return model.infer_protein(SEQUENCE, num_loops=1, num_diffusion_samples=1, num_sampling_steps=4)


@torch.inference_mode()
def main() -> None:
    config = random_config(pair_width=32, trunk_layers=2, side_layers=1, coda_layers=1)
    model = random_model(torch.device(DEVICE), torch.float32, seed=0, config=config)
    stock = fold(model)
    print(f"sites swapped: {swap_in(model)} of {len(sites_of(model))}")
    ours = fold(model)
    for name in ("distogram_logits", "plddt", "ptm"):
        mine, theirs = getattr(ours, name), getattr(stock, name)
        difference = float((mine - theirs).abs().max())
        print(f"{name}: {list(mine.shape)}, at most {difference:.1e} from the stock path's")


if __name__ == "__main__":
    main()
