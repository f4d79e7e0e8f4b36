"""The features of one chain or several: transformers' own helper makes those of one chain."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .sequences import Record

if TYPE_CHECKING:
    from collections.abc import Iterable


def features_of(record: Record, device: torch.device) -> dict[str, Tensor]:
    """The arguments of `EsmFold2Model.fold` for a protein or a complex.

    Chains are numbered as biohub's `esm.models.esmfold2.prepare_input` numbers them: residues
    from 0 in each chain, equal sequences one entity, the copies of an entity from 0.

    Returns:
        Tensors with a leading dimension of 1, on `device`.
    """
    from transformers.models.esmfold2.protein_utils import prepare_protein_features

    chains = record.chains
    features = prepare_protein_features("".join(chains), device=device)
    entities = list(dict.fromkeys(chains))
    copies = [chains[:number].count(chain) for number, chain in enumerate(chains)]

    def by_residue(numbers: "Iterable[int]") -> Tensor:
        repeated = [
            number
            for number, chain in zip(numbers, chains, strict=True)
            for _ in range(len(chain))
        ]
        return torch.tensor([repeated], device=device)

    features["asym_id"] = by_residue(range(len(chains)))
    features["entity_id"] = by_residue(1 + entities.index(chain) for chain in chains)
    features["sym_id"] = by_residue(copies)
    positions = [torch.arange(len(chain), device=device) for chain in chains]
    features["residue_index"] = torch.cat(positions)[None]
    return features


def chain_starts(record: Record) -> list[int]:
    """The number, from 0 over the whole complex, of the first residue of every chain."""
    lengths = [len(chain) for chain in record.chains]
    return [sum(lengths[:number]) for number in range(len(lengths))]
