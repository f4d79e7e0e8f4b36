"""ESMFold2's pair layers, small and random, and what runs inside a patched one."""

import pytest
import torch
from helpers import seeded
from peer_modules import CHANNELS, LENGTH, esmfold2_part
from peers import randomized
from torch import Tensor, nn

LAYERS = ("pair", "MSA", "last MSA")
TRIANGLES = ["tri_mul_out", "tri_mul_in"]
ROWS = 3  # of an MSA


def make_layer(kind: str = "pair", seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmFold2Config(
        pairwise_hidden_size=CHANNELS, pair_transition_intermediate_size=24, chunk_size=3
    )
    config.msa_encoder.hidden_size, config.msa_encoder.intermediate_size = 8, 12
    if kind == "pair":
        layer = esmfold2_part("EsmFold2PairUpdateLayer", config)
    else:
        layer = esmfold2_part("EsmFold2MSAEncoderLayer", config, updates_msa=kind == "MSA")
    return randomized(layer, seed).eval()


def call(layer: nn.Module, pair: Tensor, mask: Tensor | None = None) -> Tensor:
    """The new pair tensor; an MSA layer's new MSA is added to it, so that it counts too."""
    if not hasattr(layer, "outer_product_mean"):
        return layer(pair, pair_attention_mask=mask)
    generator = seeded(6)
    msa = torch.randn(len(pair), LENGTH, ROWS, 8, generator=generator).to(pair.dtype)
    real = torch.rand(len(pair), LENGTH, ROWS, generator=generator) > 0.2
    mask = torch.ones(pair.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    msa, pair = layer(msa, pair, real, mask)
    return pair + msa.mean(2)[..., :1, None]


def without_null(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the gradient of what is added to all terms of a softmax, which is 0 and rounding."""
    return {name: value for name, value in results.items() if not name.endswith("bias_norm.bias")}


INFERENCE = [("triangle", False), ("triangle", True), ("transition", True)]
TRAINING = [("triangle", False), ("triangle", False), ("transition", False)]
