"""Helpers of the tests of folding: a tiny model, a short protein, stand-in kernel repositories."""

import textwrap
from pathlib import Path

import torch
from esmfold2_trimul_tools.folding.fold import Fold
from esmfold2_trimul_tools.folding.memory import PeakMemory
from esmfold2_trimul_tools.folding.model import random_config, random_model
from esmfold2_trimul_tools.folding.options import Settings
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


def made_up_fold(sequence: str = "MQIFVKTLTGKX", samples: int = 1, name: str = "made-up") -> Fold:
    """A fold that no model made; the second sample is the best, where there are several.

    PAE of residues i and j is i + j / 10 Å.
    """
    from transformers.models.esmfold2.protein_utils import PROTEIN_1TO3, PROTEIN_HEAVY_ATOMS

    record, bins = Record(name, sequence), 8
    length, chains = record.length, len(record.chains)
    residues = "".join(record.chains)
    atoms = sum(len(PROTEIN_HEAVY_ATOMS[PROTEIN_1TO3[letter]]) for letter in residues)
    scores = torch.tensor([0.5, 0.8, 0.2])[:samples]
    counted = torch.arange(float(length))
    drawn = torch.randn(samples, atoms, 3, generator=torch.Generator().manual_seed(0))
    return Fold(
        record=record,
        plddt=torch.linspace(0, 1, length).repeat(samples, 1),
        ptm=scores,
        iptm=scores / 2 * (chains > 1),
        chain_iptm=torch.linspace(0.1, 0.9, chains**2).view(chains, chains).repeat(samples, 1, 1),
        coords=10 * drawn,
        pae=counted[:, None] + counted / 10,
        pde=torch.zeros(length, length),
        distogram=torch.full((length, length, bins), 1 / bins),
        bin_centres=torch.arange(float(bins)),
        seconds=1.5,
        memory=PeakMemory(2**30, 2**20, "a test"),
        settings=Settings(1, samples, 2, 3),
    )


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
