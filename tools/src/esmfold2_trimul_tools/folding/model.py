"""The ESMFold2 model of a fold: load it or make a random one, and swap a kernel in.

Ours is swapped by `patch`. The Hub's goes through the kernels library: transformers names its
triangle multiplication `EsmFold2TriangleMultiplication`, and `kernelize` replaces the forward of
every module of that name by a layer's. Nothing complains there when a mapping or a name is missing,
so every swap is verified here, module by module.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..errors import UserError
from ..options import device_name, dtype_name
from ..repository import load_kernel, remake, variant_of
from .options import MEMORY_VARIABLE, Kernel, kernel_name, model_name

if TYPE_CHECKING:
    from transformers import EsmFold2Config, EsmFold2Model

HUB_MODEL = "biohub/ESMFold2"
HUB_KERNEL = "biohub/esmfold2-trimul"  # what transformers fetches for use_kernels=True
SITE_NAME = "EsmFold2TriangleMultiplication"  # transformers' name for the layer
_CONNECT_TIMEOUT = 5  # seconds


class Swap(NamedTuple):
    """How many of the model's triangle-multiplication sites run the kernel's layer."""

    swapped: int
    total: int


def resolve_device(name: str | None) -> torch.device:
    """The device called `name`, or without a name the best one here: CUDA, then XPU, then the CPU.

    Raises:
        UserError: there is no such device on this machine.
    """
    if name is None:
        present = [type_ for type_ in ("cuda", "xpu") if getattr(torch, type_).is_available()]
        name = present[0] if present else "cpu"
    kind, _, number = device_name("--device", name).partition(":")
    if kind == "cpu":
        return torch.device("cpu")

    backend = getattr(torch, kind)
    if not backend.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no such device here")
    index, count = int(number or 0), backend.device_count()
    if number and index >= count:
        raise UserError(f"--device {name}: this machine has {count} {kind} device(s)")
    return torch.device(kind, index)


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`; without a name bfloat16 on an accelerator and float32 on a CPU.

    Raises:
        UserError: no such dtype, or not one that ESMFold2 folds in.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, dtype_name("--dtype", name))


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> "EsmFold2Model":
    """The ESMFold2 of a local folder or a Hub repository, ready to fold.

    Raises:
        UserError: it can't be had: no such folder, no network and no cached copy, another model.
    """
    model_class = esmfold2_model_class()
    silence_transformers(but_for_bars=sys.stderr.isatty())
    folder = Path(model_name("--model", name)).expanduser()
    source, offline = str(folder), False
    if not folder.is_dir():
        source, offline = name, _must_use_cache(name)

    from transformers import AutoConfig

    with _blaming(f"model {name}: can't be loaded"):
        config = AutoConfig.from_pretrained(source, local_files_only=offline)
    # Another model's weights would load too: missing ones are drawn at random.
    if config.model_type != model_class.config_class.model_type:
        raise UserError(f"model {name}: a {config.model_type} model, not ESMFold2")
    with _blaming(f"model {name}: can't be loaded"):
        model, loading = model_class.from_pretrained(
            source, config=config, dtype=dtype, local_files_only=offline, output_loading_info=True
        )
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"model {name}: {len(missing)} weights are missing, {missing[0]} the first")
    return _to_device(model.eval(), device)


def random_config(
    pair_width: int = 128, trunk_layers: int = 24, side_layers: int = 4, coda_layers: int = 2
) -> "EsmFold2Config":
    """The configuration of a small ESMFold2, by default with all 76 sites of the real architecture.

    Args:
        pair_width: channels of the pair tensor.
        trunk_layers: layers of the folding trunk.
        side_layers: layers of the language-model encoder, the MSA encoder and the confidence head.
        coda_layers: layers after the last loop.
    """
    esmfold2_model_class()
    from transformers import EsmFold2Config

    token_width = 64
    atoms = {"hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 128}
    residue_features = 67  # two one-hot residue types and one number
    return EsmFold2Config(
        pairwise_hidden_size=pair_width,
        hidden_size=token_width,
        single_inputs_size=token_width + residue_features,
        pair_transition_intermediate_size=2 * pair_width,
        num_loops=1,
        folding_trunk_num_hidden_layers=trunk_layers,
        parcae_num_coda_layers=coda_layers,
        atom_encoder={**atoms, "output_dim": token_width},
        lm_encoder={"num_hidden_layers": side_layers},
        msa_encoder={
            "num_hidden_layers": side_layers,
            "hidden_size": 32,
            "outer_hidden_size": 8,
            "num_attention_heads": 4,
            "head_dim": 8,
            "intermediate_size": 64,
        },
        confidence_head={"num_hidden_layers": side_layers},
        structure_head={
            "num_diffusion_samples": 1,
            "inference_num_steps": 12,
            "diffusion_module": {
                "hidden_size": token_width,
                "fourier_dim": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 2 * token_width,
                "pair_intermediate_size": pair_width,
                "atom_encoder": {**atoms, "output_dim": token_width},
            },
        },
        esmc_config={
            "model_type": "esmc",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
    )


def random_model(
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    config: "EsmFold2Config | None" = None,
) -> "EsmFold2Model":
    """An ESMFold2 with random weights: real code, meaningless biology. Equal seeds, equal weights.

    Args:
        device, dtype: where and in what it folds; modules that ESMFold2 keeps in float32 stay so.
        seed: of the weights. torch's own random state is left as it was.
        config: the architecture; `random_config()` without one.
    """
    model_class = esmfold2_model_class()
    silence_transformers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config or random_config())
        _draw_every_weight(model)
    if dtype != torch.float32:
        # Reloaded, not cast: from_pretrained knows which modules stay in float32.
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = model_class.from_pretrained(folder, dtype=dtype)
    return _to_device(model.eval(), device)


def set_chunk_size(model: nn.Module, rows: int) -> None:
    """Rows of the pair tensor that transformers' transitions and triangles take at once.

    Where a part takes all rows at once by design, it goes on to do so.
    """
    for part in model.modules():
        if getattr(part, "chunk_size", None) is not None:
            part.chunk_size = rows


def pair_layers(model: nn.Module) -> list[nn.Module]:
    """Every pair-update layer of the model; each has two triangle multiplications."""
    return [part for part in model.modules() if hasattr(part, "tri_mul_out")]


def triangle_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every triangle-multiplication module of the model by its name: the sites of a swap."""
    site_class = _site_class()
    return {name: part for name, part in model.named_modules() if isinstance(part, site_class)}


def check_swappable() -> None:
    """Raises UserError where the installed transformers and kernels can't swap a layer at all.

    For other pairs of versions, transformers' classes have no `kernel_layer_name`, and the kernels
    library then skips them silently.
    """
    if getattr(_site_class(), "kernel_layer_name", None) == SITE_NAME:
        return
    from transformers.utils import ENV_VARS_TRUE_VALUES

    if os.environ.get("USE_HUB_KERNELS", "YES").upper() not in ENV_VARS_TRUE_VALUES:
        raise UserError(
            "no layer can be swapped: USE_HUB_KERNELS turns kernels off in transformers; unset it"
        )
    import transformers

    raise UserError(
        f"no layer can be swapped: transformers {transformers.__version__} does not work with "
        f'{_kernels_version()}; pip install "transformers[kernels]>=5.18" picks a pair that fits'
    )


def check_kernel(name: str, device: torch.device) -> Kernel:
    """`name` as one of the three kernels.

    Raises:
        UserError: it is none of them, or there is none of that name for the device.
    """
    if kernel_name("--kernel", name) == "hub" and device.type != "cuda":
        raise UserError(
            f"--kernel hub: transformers has {HUB_KERNEL} for CUDA only, and this fold runs on "
            f"{device.type}; use --kernel ours or --kernel off"
        )
    return name


def swap_in(model: nn.Module, kernel: Kernel, root: Path | None = None) -> Swap:
    """Put the kernel at every site of the model and verify it, module by module.

    Args:
        kernel: "ours" (`patch` of the build at `root`: pair-update layers as a whole, and
            transitions), "hub" (the layer that transformers fetches for
            use_kernels=True) or "off" (the stock path).
        root: our kernel's folder; not needed for the other two.

    Raises:
        UserError: the kernel can't be had, or did not reach every site.
    """
    restore_stock(model)
    sites = triangle_modules(model)
    if kernel == "off":
        return Swap(0, len(sites))
    if kernel == "ours":
        _swap_in_ours(model, root)
    else:
        check_swappable()
        _swap_in_hubs(model)
    origin = root if kernel == "ours" else None
    swapped = sum(_runs_another_forward(site, origin) for site in sites.values())
    if swapped < len(sites):
        raise UserError(f"only {swapped} of {len(sites)} sites took the kernel's layer")
    return Swap(swapped, len(sites))


def restore_stock(model: nn.Module) -> None:
    """Undo every swap: each layer runs transformers' own forward again."""
    for part in model.modules():
        function = getattr(vars(part).get("forward"), "__func__", None)
        if getattr(function, "_is_trimul_patch", False):  # of whichever build
            del part.forward
        # kernelize leaves the replaced forward on the instance, or on a function it holds.
        for target in (part, *getattr(part, "_kernel_funcs", {}).values()):
            if hasattr(type(target), "kernel_layer_name"):
                target.__dict__.pop("forward", None)


def _swap_in_ours(model: nn.Module, root: Path) -> None:
    with _blaming(f"the kernel build in {root} can't be used; remake it: {remake(root)}"):
        patch = load_kernel(root).patch
    try:
        patch(model, memory=os.environ.get(MEMORY_VARIABLE, "auto"))
    except ValueError as error:  # the build is not to blame for a word that it doesn't know
        raise UserError(f"{MEMORY_VARIABLE}: {error}") from error


def _swap_in_hubs(model: "EsmFold2Model") -> None:
    from huggingface_hub import constants

    if not (has_local_kernel() or constants.HF_HUB_OFFLINE or hub_answers()):
        raise UserError(f"--kernel hub: {HUB_KERNEL} can't be fetched, the Hub does not answer")
    with _blaming(f"--kernel hub: {HUB_KERNEL} can't be used"):
        model.set_use_kernels(True)


def _runs_another_forward(site: nn.Module, root: Path | None) -> bool:
    """Whether the site's forward is a layer's, and, if `root` is given, of the build there."""
    function = getattr(site.__dict__.get("forward"), "__func__", None)
    if function is None or function is type(site).forward:
        return False
    if root is None:
        return True
    source = Path(sys.modules[function.__module__].__file__).resolve()
    return source.is_relative_to(variant_of(root).resolve())


def _draw_every_weight(model: nn.Module) -> None:
    """Random values that keep the size of signals, zero-initialised heads and gates included.

    With transformers' initial values a fold is degenerate: several heads and gates start at zero,
    so that pLDDT would be 0.5 whatever the trunk computes.
    """
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.1)
        elif isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight, mean=1.0, std=0.1)
            if part.bias is not None:
                nn.init.normal_(part.bias, std=0.1)
    draw_heads(model)


def draw_heads(model: nn.Module) -> None:
    """Random weights of the outputs and of the language model's mixture.

    Logits are a few units wide: neither flat nor certain, so that the outputs follow the trunk.
    """
    nn.init.normal_(model.language_model.layer_weights)
    head = model.confidence_head
    for weight in (head.plddt_weight, head.resolved_weight):
        nn.init.normal_(weight, std=3 * weight.shape[1] ** -0.5)
    nn.init.normal_(model.distogram_head.weight, std=0.2 * model.distogram_head.in_features**-0.5)


def _to_device(model: "EsmFold2Model", device: torch.device) -> "EsmFold2Model":
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"the model does not fit into the memory of {device}") from error


def esmfold2_model_class() -> type["EsmFold2Model"]:
    """transformers' class. Raises UserError where the installed transformers has none."""
    try:
        from transformers import EsmFold2Model
    except ImportError as error:
        raise UserError(
            f"no ESMFold2 in the installed transformers ({_first_line(error)}); "
            'pip install "transformers[kernels]>=5.18"'
        ) from error
    return EsmFold2Model


def _site_class() -> type[nn.Module]:
    esmfold2_model_class()
    from transformers.models.esmfold2 import modeling_esmfold2

    return modeling_esmfold2.EsmFold2TriangleMultiplicativeUpdate


def _kernels_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"kernels {version('kernels')}"
    except PackageNotFoundError:
        return "no kernels library at all"


def silence_transformers(but_for_bars: bool = False) -> None:
    """No hints and no loading bars: this package checks and reports what matters of them."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if but_for_bars:
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()


def _must_use_cache(hub_id: str) -> bool:
    """Whether the Hub can't be asked for this model but the cache has it; the Hub is tried once.

    transformers itself would retry for half a minute before it said so.

    Raises:
        UserError: neither the Hub nor the cache has it.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
    if not constants.HF_HUB_OFFLINE and hub_answers():
        return False
    if not cached:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub does not answer"
        raise UserError(
            f"model {hub_id}: not in the local cache, and {reason}; "
            "give a local folder with --model, or try --random-weights"
        )
    return True


def has_local_kernel() -> bool:
    """Whether LOCAL_KERNELS gives a path for the name that transformers asks the Hub for."""
    return f"{HUB_KERNEL}=" in os.environ.get("LOCAL_KERNELS", "")


def hub_answers() -> bool:
    """Whether the Hub can be reached; it is asked once, for some seconds."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_TIMEOUT)
    except Exception:  # the HTTP library's own errors: huggingface_hub has changed library twice
        return False
    return True


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Turns all that the block raises (foreign code, files, the network) into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
