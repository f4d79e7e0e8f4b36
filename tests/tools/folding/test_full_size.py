"""The default architecture with random weights, on the tests' tiny configuration."""

import json

import pytest
import torch
from cli_runner import refusal, run
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.folding import full_size as subject
from esmfold2_trimul_tools.folding.fold import fold
from esmfold2_trimul_tools.folding.full_size import full_size_model, weight_bytes
from esmfold2_trimul_tools.folding.memory import free_bytes
from esmfold2_trimul_tools.folding.options import Settings
from folding import CPU, QUICK, SHORT, tiny_config, tiny_model
from torch import nn
from transformers import EsmFold2Config, EsmFold2Model

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(model) -> dict:
    return dict([*model.named_parameters(), *model.named_buffers()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_constants_are_those_of_a_loaded_model(dtype):
    loaded = tensors(tiny_model(dtype=dtype))
    drawn = tensors(full_size_model(CPU, dtype, 0, tiny_config()))
    assert {name: (one.shape, one.dtype) for name, one in drawn.items()} == {
        name: (one.shape, one.dtype) for name, one in loaded.items()
    }
    for name in ("confidence_head.boundaries", "esmc.rotary_emb.inv_freq"):
        assert torch.equal(drawn[name], loaded[name]), name


def test_norms_are_plain_and_no_projection_is_left_as_it_was_allocated():
    model = full_size_model(CPU, torch.float32, 0, tiny_config())
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            assert bool((part.weight == 1).all()) and (part.bias is None or not part.bias.any())
        # The recurrence's projection is the identity, and the distogram's logits are smaller.
        elif isinstance(part, nn.Linear) and part not in (
            model.distogram_head,
            model.parcae.out_proj,
        ):
            assert 0.5 < part.weight.std() * part.in_features**0.5 < 2
    for name, weight in model.named_parameters():
        assert bool(weight.isfinite().all()), name
        if weight.ndim > 1:
            assert bool(weight.any()), name


def test_weights_follow_the_seed_and_leave_torchs_random_state_and_dtype_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (
        tensors(full_size_model(CPU, torch.bfloat16, seed, tiny_config())) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(3), expected) and torch.get_default_dtype() == torch.float32
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["distogram_head.weight"], other["distogram_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_folds(dtype):
    folded = fold(full_size_model(CPU, dtype, 0, tiny_config()), SHORT, Settings(loops=3))
    assert 0 < folded.mean_plddt < 1


def test_a_model_that_can_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(subject, "free_bytes", lambda device: 10 * 2**30)
    monkeypatch.setattr(subject, "_fill", lambda model: pytest.fail("a model was made"))
    message = "weights take 12.2 GiB in bfloat16, and cpu has 10.0 GiB free; without --full-size"
    with pytest.raises(UserError, match=message):
        full_size_model(CPU, torch.bfloat16)


def test_the_default_architecture_is_what_the_option_says():
    with torch.device("meta"):
        model = EsmFold2Model(EsmFold2Config())
    assert round(sum(one.numel() for one in model.parameters()) / 1e9, 1) == 6.5
    assert round(weight_bytes(model, torch.bfloat16) / 2**30, 1) == 12.2


def test_memory_that_fails_all_the_same_is_said(monkeypatch):
    def fail(model):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(subject, "_fill", fail)
    with pytest.raises(UserError, match="does not fit into the memory of cpu"):
        full_size_model(CPU, torch.float32, 0, tiny_config())


def test_free_bytes_of_this_machine():
    assert free_bytes(CPU) > 2**20


def test_the_command_folds_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    monkeypatch.setattr("transformers.EsmFold2Config", lambda: config)
    result = run("fold", SHORT.sequence, *QUICK, "--full-size", "--samples", 1, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["model"], document["full_size"]) == ("random weights, full size", True)
    message = "--full-size is for --random-weights; a checkpoint has its own size"
    assert refusal("fold", "MQIF", "--full-size") == message
