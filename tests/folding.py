"""Helpers of the tests of folding: a tiny model, a short protein, stand-in kernel repositories."""

import textwrap
from pathlib import Path

import torch
from esmfold2_trimul_tools.folding.model import random_config, random_model
from esmfold2_trimul_tools.folding.sequences import Record
from helpers import SEED

CPU = torch.device("cpu")
SHORT = Record("short", "MQIFVKTLTGKX")
# Options with which the command folds at once.
QUICK = ["--random-weights", "--device", "cpu", "--steps", "2"]
TINY_SITES = 10  # of tiny_config: two in each of its five layers

# Layers of a stand-in kernel, by what they compute. `type(self)` is the adopting module's class.
STOCK_LAYER = "return type(self).forward(self, pair_grid, visibility)"
ZERO_LAYER = "return pair_grid * 0"
NAN_LAYER = "return pair_grid * float('nan')"


def tiny_config():
    """One layer in each of the five stacks, pair tensors 16 wide."""
    return random_config(pair_width=16, trunk_layers=1, side_layers=1, coda_layers=1)


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32):
    return random_model(CPU, dtype, 1000 * SEED + seed, tiny_config())


def write_kernel_repository(root: Path, body: str) -> Path:
    """A kernel repository at `root` with one layer, whose forward has this body."""
    variant = root / "build" / "torch-universal"
    variant.mkdir(parents=True)
    (root / "torch-ext").mkdir()
    (root / "build.toml").write_text("")
    (variant / "metadata.json").write_text(
        f"""{{
        "id": "_stand_in_{abs(hash(str(root)))}", "name": "stand-in", "version": 1,
        "license": "Apache-2.0", "python-depends": [], "backend": {{"type": "cuda"}}
        }}"""
    )
    source = f"""
        from torch import nn

        class ESMFold2TriangleMultiplication(nn.Module):
            def forward(self, pair_grid, visibility=None):
                {body}

        class layers:
            ESMFold2TriangleMultiplication = ESMFold2TriangleMultiplication

        class paths:
            @staticmethod
            def execution_path(device, dtype):
                return "stand-in", "a test"
        """
    (variant / "__init__.py").write_text(textwrap.dedent(source))
    return root
