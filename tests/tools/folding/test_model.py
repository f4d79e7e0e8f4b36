import json
import sys

import huggingface_hub
import pytest
import torch
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.folding import model as subject
from esmfold2_trimul_tools.folding.model import Swap, swap_in, triangle_modules
from esmfold2_trimul_tools.repository import find_root
from folding import (
    CPU,
    STOCK_LAYER,
    TINY_SITES,
    ZERO_LAYER,
    tiny_config,
    tiny_model,
    write_kernel_repository,
)
from transformers import BertConfig, EsmFold2Config, EsmFold2Model
from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2TriangleMultiplicativeUpdate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(subject, "hub_answers", lambda: False)


def forwards(model):
    return [site.forward.__func__ for site in triangle_modules(model).values()]


@pytest.mark.parametrize("config", [EsmFold2Config, subject.random_config])
def test_default_architectures_have_76_sites(config):
    with torch.device("meta"):
        model = EsmFold2Model(config())
    assert len(triangle_modules(model)) == 76


def test_random_weights_follow_the_seed_and_leave_torchs_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = tiny_model(1), tiny_model(1), tiny_model(2)
    assert torch.equal(torch.rand(3), expected)
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(*(state["distogram_head.weight"] for state in (states[0], states[2])))


def test_no_weight_of_a_random_model_is_all_zero(tiny):
    # The decay of the trunk's recurrence is exp(0) by design.
    zeros = {name for name, weight in tiny.named_parameters() if not weight.any()}
    assert zeros == {"parcae.log_state_decay"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_what_esmfold2_keeps_in_float32(dtype):
    model = tiny_model(dtype=dtype)
    site = next(iter(triangle_modules(model).values()))
    for norm in (site.norm_start, site.norm_mix):
        assert norm.weight.dtype == norm.bias.dtype == torch.float32
    assert model.distogram_head.weight.dtype == torch.float32
    assert model.structure_head.conditioning.fourier.frequencies.dtype == torch.float32
    for projection in (site.proj_bundle, site.proj_emit, site.proj_gate):
        assert projection.weight.dtype == dtype


def test_a_saved_model_loads_with_the_same_weights(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    loaded = subject.load_model(str(tmp_path), CPU, torch.float32)
    assert not loaded.training
    for name, weight in tiny.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_a_folder_that_holds_no_whole_esmfold2_is_refused(tiny, tmp_path):
    def refusal(name):
        with pytest.raises(UserError) as caught:
            subject.load_model(str(name), CPU, torch.float32)
        return str(caught.value)

    assert refusal(tmp_path / "none").endswith("none: no such folder")
    assert refusal("./none") == "model folder ./none: no such folder"
    assert refusal(tmp_path).endswith("no config.json in it")
    BertConfig().save_pretrained(tmp_path / "bert")
    assert refusal(tmp_path / "bert").endswith("a bert model, not ESMFold2")
    tiny.config.save_pretrained(tmp_path / "bare")
    assert "can't be loaded (Error no file named model.safetensors" in refusal(tmp_path / "bare")

    tiny.save_pretrained(tmp_path / "part")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    config["folding_trunk_num_hidden_layers"] += 1
    (tmp_path / "part" / "config.json").write_text(json.dumps(config))
    assert "weights are missing, folding_trunk.layers.1." in refusal(tmp_path / "part")


def test_a_hub_model_that_cant_be_had_is_refused_at_once(offline, monkeypatch):
    with pytest.raises(UserError, match="not in the local cache, and the Hub does not answer"):
        subject.load_model("biohub/no-such-model", CPU, torch.float32)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the local cache, and HF_HUB_OFFLINE is set"):
        subject.load_model("biohub/no-such-model", CPU, torch.float32)
    with pytest.raises(UserError, match="'a b': neither a folder nor a Hub id"):
        subject.load_model("a b", CPU, torch.float32)


def test_a_cached_hub_model_is_loaded_without_the_hub(offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    asked = []

    def from_pretrained(name, local_files_only):
        asked.append((name, local_files_only))
        raise OSError("stop here\nand no further")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(UserError, match=r"can't be loaded \(stop here\)$"):
        subject.load_model("some/model", CPU, torch.float32)
    assert asked == [("some/model", True)]


def test_a_model_too_large_for_the_device_is_refused(tiny, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(EsmFold2Model, "to", fail)
    with pytest.raises(UserError, match="does not fit into the memory of cpu"):
        tiny_model()


def test_transformers_without_esmfold2_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", object())
    with pytest.raises(UserError, match="no ESMFold2 in the installed transformers"):
        subject.load_model("biohub/ESMFold2", CPU, torch.float32)


def test_devices(monkeypatch):
    assert subject.resolve_device("cpu") == CPU
    for name in ("tpu-9", "meta", "mps"):
        with pytest.raises(UserError, match=f"must be cpu, cuda, cuda:N or xpu; got '{name}'"):
            subject.resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert subject.resolve_device(None) == CPU
    with pytest.raises(UserError, match="sees no such device here"):
        subject.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert subject.resolve_device(None) == torch.device("cuda", 0)
    assert subject.resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match=r"this machine has 2 cuda device\(s\)"):
        subject.resolve_device("cuda:2")


def test_dtypes():
    assert subject.resolve_dtype(None, CPU) == torch.float32
    assert subject.resolve_dtype(None, torch.device("cuda", 0)) == torch.bfloat16
    assert subject.resolve_dtype("float16", CPU) == torch.float16
    with pytest.raises(UserError, match="one of float32, bfloat16, float16; got 'int8'"):
        subject.resolve_dtype("int8", CPU)


def test_kernels():
    cuda = torch.device("cuda", 0)
    assert [subject.check_kernel(name, cuda) for name in ("ours", "hub", "off")]
    with pytest.raises(UserError, match="one of ours, hub, off; got 'theirs'"):
        subject.check_kernel("theirs", cuda)
    with pytest.raises(UserError, match="for CUDA only, and this fold runs on cpu"):
        subject.check_kernel("hub", CPU)


def test_our_layer_reaches_every_site_and_leaves_it_again(tiny):
    stock = forwards(tiny)
    assert swap_in(tiny, "ours", find_root()) == Swap(TINY_SITES, TINY_SITES)
    assert all(forward._is_trimul_patch for forward in forwards(tiny))
    # Transitions and layers as a whole are swapped too, and given back.
    others = [part for part in tiny.modules() if "forward" in vars(part)]
    assert len(others) > TINY_SITES
    assert swap_in(tiny, "off") == Swap(0, TINY_SITES)
    assert forwards(tiny) == stock and not any("forward" in vars(part) for part in others)


def test_another_repositorys_layer_takes_the_place_of_ours(tiny, tmp_path):
    swap_in(tiny, "ours", find_root())
    root = write_kernel_repository(tmp_path, ZERO_LAYER)
    assert swap_in(tiny, "ours", root) == Swap(TINY_SITES, TINY_SITES)
    site = next(iter(triangle_modules(tiny).values()))
    assert not site(torch.ones(1, 2, 2, 16)).any()


def test_a_build_that_cant_be_used_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match="has no build/torch-universal: run `esmfold2-trimul bu"):
        swap_in(tiny, "ours", tmp_path)
    (tmp_path / "a").mkdir()
    root = write_kernel_repository(tmp_path / "a", "return (")
    with pytest.raises(UserError, match=r"can't be used; .* \(.*was never closed"):
        swap_in(tiny, "ours", root)


def test_a_mode_that_is_none_is_not_blamed_on_the_build(tiny, monkeypatch):
    monkeypatch.setenv("ESMFOLD2_TRIMUL_MEMORY", "frugal")
    with pytest.raises(UserError, match="^ESMFOLD2_TRIMUL_MEMORY: memory must be .* got 'frugal'$"):
        swap_in(tiny, "ours", find_root())


def test_a_swap_that_changes_nothing_is_refused(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "_swap_in_ours", lambda *_: None)
    with pytest.raises(UserError, match=f"only 0 of {TINY_SITES} sites took the kernel's layer"):
        swap_in(tiny, "ours", find_root())


def test_a_layer_from_elsewhere_does_not_count_as_ours(tiny, monkeypatch, tmp_path):
    elsewhere = write_kernel_repository(tmp_path, STOCK_LAYER)
    swap_in(tiny, "ours", elsewhere)
    layer = {name: site.forward for name, site in triangle_modules(tiny).items()}
    monkeypatch.setattr(subject, "_swap_in_ours", lambda model, _: [
        setattr(site, "forward", layer[name]) for name, site in triangle_modules(model).items()
    ])  # fmt: skip
    assert swap_in(tiny, "ours", elsewhere).swapped == TINY_SITES
    with pytest.raises(UserError, match=f"only 0 of {TINY_SITES} sites"):
        swap_in(tiny, "ours", find_root())


def test_versions_that_dont_fit_are_named_with_the_mend(tiny, monkeypatch):
    monkeypatch.delattr(EsmFold2TriangleMultiplicativeUpdate, "kernel_layer_name")
    with pytest.raises(UserError, match=r"transformers 5\S+ does not work with kernels .*pip inst"):
        swap_in(tiny, "hub")
    assert swap_in(tiny, "ours", find_root()).swapped == TINY_SITES  # by patch, which needs neither
    monkeypatch.setenv("USE_HUB_KERNELS", "0")
    with pytest.raises(UserError, match="USE_HUB_KERNELS turns kernels off in transformers"):
        subject.check_swappable()


def test_the_hubs_kernel_needs_the_hub(tiny, offline):
    with pytest.raises(UserError, match="biohub/esmfold2-trimul can't be fetched, the Hub does no"):
        swap_in(tiny, "hub")


def test_the_hubs_kernel_is_had_through_use_kernels(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCAL_KERNELS", "biohub/esmfold2-trimul=somewhere")
    root = write_kernel_repository(tmp_path, STOCK_LAYER)

    def set_use_kernels(model, use_kernels):
        assert use_kernels
        subject._swap_in_ours(model, root)

    monkeypatch.setattr(EsmFold2Model, "set_use_kernels", set_use_kernels)
    assert swap_in(tiny, "hub") == Swap(TINY_SITES, TINY_SITES)

    # transformers keeps the stock forward, and says nothing, where it can't load a kernel.
    monkeypatch.setattr(EsmFold2Model, "set_use_kernels", lambda *_: None)
    with pytest.raises(UserError, match=f"only 0 of {TINY_SITES} sites"):
        swap_in(tiny, "hub")

    def fail(*_):
        raise RuntimeError("no variant fits\nand a long trace")

    monkeypatch.setattr(EsmFold2Model, "set_use_kernels", fail)
    with pytest.raises(UserError, match=r"can't be used \(no variant fits\)$"):
        swap_in(tiny, "hub")


def test_tiny_config_is_what_these_tests_count_on():
    with torch.device("meta"):
        assert len(triangle_modules(EsmFold2Model(tiny_config()))) == TINY_SITES
