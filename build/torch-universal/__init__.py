"""Triangle multiplication of protein folding models as three fused Triton kernels.

`triangle_multiplicative_update` and `triangle_multiplicative_update_with_residual` are AlphaFold
2's Algorithms 11 ("outgoing" edges) and 12 ("incoming" edges), Supplementary Methods 1.6.5, on a
pair tensor [B, L, L, C]. `layers.ESMFold2TriangleMultiplication` is the same function as a Hugging
Face Hub layer for ESMFold2 in transformers. `warmup` compiles the kernels beforehand.
`lengths_from_mask` turns the mask of a padded batch into its lengths. `explain` tells a call's
path, settings and memory without running it. `sharded_triangle_multiplicative_update` and
`sharded_triangle_multiplicative_update_with_residual` are for a pair tensor over many GPUs, and
`sharded_pairs` for a whole model on them; `free_exchange_memory` frees what these keep on a GPU.

`patch` puts the kernels into a model of OpenFold, OpenFold 3, Protenix, Boltz, ESMFold or ESMFold2,
transformers' or biohub's, and `unpatch` takes them out of one or of any copy of it. The functions
`from_...` turn a triangle multiplication of such a model, or of Chai-1, into arguments, and
`transition_from_...` a transition.
"""

from . import layers
from ._explain import explain
from ._warmup import warmup
from .carriers.memory import free_exchange_memory
from .layers import ESMFold2TriangleMultiplication
from .models.adapters import (
    from_boltz,
    from_chai,
    from_esm,
    from_esmfold2,
    from_openfold,
    from_openfold3,
    from_protenix,
    transition_from_boltz,
    transition_from_esm,
    transition_from_esmfold2,
    transition_from_openfold3,
    transition_from_protenix,
)
from .models.patching import patch, unpatch
from .sharded import (
    sharded_pairs,
    sharded_triangle_multiplicative_update,
    sharded_triangle_multiplicative_update_with_residual,
)
from .swiglu_transition import swiglu_transition
from .trimul_with_residual import (
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
)
from .validation import lengths_from_mask

__version__ = "1.0.0"
__all__ = [
    "ESMFold2TriangleMultiplication",
    "explain",
    "free_exchange_memory",
    "from_boltz",
    "from_chai",
    "from_esm",
    "from_esmfold2",
    "from_openfold",
    "from_openfold3",
    "from_protenix",
    "layers",
    "lengths_from_mask",
    "patch",
    "sharded_pairs",
    "sharded_triangle_multiplicative_update",
    "sharded_triangle_multiplicative_update_with_residual",
    "swiglu_transition",
    "transition_from_boltz",
    "transition_from_esm",
    "transition_from_esmfold2",
    "transition_from_openfold3",
    "transition_from_protenix",
    "triangle_multiplicative_update",
    "triangle_multiplicative_update_with_residual",
    "unpatch",
    "warmup",
]
