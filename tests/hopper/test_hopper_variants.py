"""Which calls the Hopper variants take, by plans for a device that is not there."""

import json

import pytest
from fresh_process import python_output

pytest.importorskip("triton")

# In a process without TRITON_INTERPRET: the stages of plans that have a variant, by case.
PLANS = """
import json, logging, sys, torch
from esmfold2_trimul_tools import resources
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
path, device = submodule(package, "triton_path"), submodule(package, "triton_parts.device")
hopper = submodule(package, "hopper")
bf16, half, single = torch.bfloat16, torch.float16, torch.float32
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger(package.__name__).addHandler(handler)


def call(width=256, length=512, dtype=bf16, **others):
    case = resources.Case(dtype, width, length, others.pop("padded", False))
    return resources._call_of(package, case)._replace(**others)


def transition(width=256, length=512, dtype=bf16, padded=False):
    return resources._transition_of(package, resources.Case(dtype, width, length, padded))


def unaligned(call):
    shape = call.x.shape
    memory = torch.empty(shape[:3] + (shape[3] + 4,), dtype=bf16, device="meta")
    return call._replace(x=memory[..., : shape[3]], residual=None)


def variants(call, target="sm_90"):
    module = path.transition if hasattr(call.weights, "down_weight") else path
    with resources._compiling_for(target), device.standing_in(device.target_of(target, "any")):
        stages = module.plan(call).stages
    return sorted(name for name, launch in stages.items() if launch.variant == "hopper")


found = {
    "bfloat16": variants(call()),
    "float16": variants(call(dtype=half)),
    "float16 transition": variants(transition(dtype=half)),
    "incoming": variants(call(direction="incoming")),
    "ragged": variants(call(length=383)),
    "narrow": variants(call(width=128)),
    "transition": variants(transition()),
    "padded": variants(call(padded=True)),
    "padded transition": variants(transition(padded=True)),
    "three parts": variants(call(width=192)),
    "wide": variants(call(width=384)),
    "wide, padded": variants(call(width=512, dtype=half, padded=True)),
    "wide transition": variants(transition(width=448)),
    "no residual": variants(call(residual=None, mask=None)),
    "lean": variants(call(memory="lean")),
    "float32": variants(call(dtype=single)),
    "other width": variants(call(width=96)),
    "wider": variants(call(width=576)),
    "small": variants(call(length=96)),
    "unaligned": variants(unaligned(call())),
    "narrow transition": variants(transition(width=64)),
    "another GPU": variants(call(), "sm_100"),
}


def training(call):
    # Of both directions, with a and b kept or made again.
    with resources._compiling_for("sm_90"), device.standing_in(device.target_of("sm_90", "any")):
        launches = [launch for launch, _ in path.plan_training(call)]
    of_stage = [one.variant for one in launches if one.stage == "fused_dual_gemm_bwd"]
    return [of_stage.count("whole"), len(of_stage)]


found["backward"] = {
    "bfloat16": training(call()),
    "narrow": training(call(width=128)),
    "ragged": training(call(length=383)),
    "float16": training(call(dtype=half)),
    "padded": training(call(padded=True)),
}
with hopper.without_variants():
    found["left out"] = variants(call())


def planned(call):
    with resources._compiling_for("sm_90"), device.standing_in(device.target_of("sm_90", "any")):
        launches = (path.transition if hasattr(call, "eps") else path).plan(call).launches
    return [launch for launch, _ in launches if launch.variant]


# Pointers that Triton compiles for by their alignment.
found["specialised"] = {
    launch.kernel.__name__: [
        parameter.name
        for parameter in launch.kernel.params
        if parameter.name.endswith("_ptr") and not parameter.do_not_specialize
    ]
    for launch in (
        planned(call(padded=True))
        + planned(transition(padded=True))
        + planned(call(width=512, padded=True))
        + planned(transition(width=512))
    )
}

def pair_tensors(call):
    with resources._compiling_for("sm_90"), device.standing_in(device.target_of("sm_90", "any")):
        return path.plan(call).peak / call.x.nbytes


x = torch.empty(8, 256, 256, 512, dtype=bf16, device="meta")
batch = call(width=512, x=x, mask=None, residual=None)
found["peaks"] = [pair_tensors(batch), pair_tensors(call(width=512))]
with hopper.without_variants():
    found["plain peaks"] = [pair_tensors(batch), pair_tensors(call(width=512))]


def gates_of_a_rank(channels):
    # In tensors of the rows' size, after stage 1 of all channels or of some.
    rows = submodule(package, "triton_path.rows")
    launches = submodule(package, "triton_parts.rehearsal").Rehearsal()
    rows.launches_of = lambda *_: launches
    with resources._compiling_for("sm_90"), device.standing_in(device.target_of("sm_90", "any")):
        x = torch.empty(1, 32, 256, 512, dtype=bf16, device="meta")
        stages = rows.Rows(call(width=512, x=x, mask=None, residual=None), 0)
        group = slice(0, 512) if channels is None else channels
        planes = torch.empty(2, group.stop, 32, 256, dtype=bf16, device="meta")
        stages.project(0, planes, channels)
        product = torch.empty(512, 32, 256, dtype=bf16, device="meta")
        stages.emit(0, product, torch.empty_like(x[0]))
    return launches.buffers.get("gates", 0) / x.nbytes


found["gates of a rank"] = [gates_of_a_rank(None), gates_of_a_rank(slice(0, 128))]

with resources._compiling_for("sm_90"), device.standing_in(device.target_of("sm_90", "any")):
    found["buffers"] = list(path.transition.plan(transition()).buffers)
    whole = submodule(package, "hopper.transition").prepare
    config = submodule(package, "triton_parts.settings").LaunchConfig
    found["odd"] = []
    for width, rows, stages in ((192, 192, 8), (256, 128, 5)):
        try:
            whole(transition(width), config(rows, 64, 64, 4, stages, kernel="whole"))
        except ValueError as error:
            found["odd"].append(str(error))
config = config(128, 64, 256, num_warps=4, num_stages=2, kernel="hopper")
planes = torch.empty(1, 2, 256, 512, 512, device="meta").unbind(1)
moments, rows = torch.empty(1, 2, 512, 512, device="meta"), planes[0].view(-1, 1024)
stages = {
    "fused_dual_gemm": ("prepare_dual_gemm", call(dtype=single), planes, None, False, config, 0),
    "fused_ln_residual": (
        "prepare_ln_residual", call(dtype=single), planes[0], moments, config, 0
    ),
    "triton_path.swiglu_hidden": (
        "prepare_swiglu_hidden", transition(dtype=single), rows, 0, False, config
    ),
    "triton_path.row_linear": (
        "prepare_row_linear", rows.float(), rows[:256].float(), None, (512, 512), "fp32", 0, False,
        config,
    ),
    "triton_path.fused_dual_gemm_backward": (
        "prepare_dual_gemm_bwd", call(dtype=half), call(dtype=half).x[0], None, moments[0],
        torch.empty(512, 512, 512, dtype=half, device="meta"), 256, frozenset({"grads"}), config
    ),
}
found["refused"] = {}
for stage, (prepare, *arguments) in stages.items():
    with device.standing_in(device.target_of("sm_90", "any")):
        try:
            getattr(submodule(package, stage), prepare)(*arguments)
        except ValueError as error:
            found["refused"][stage] = str(error)
assert hopper.plain_only() is False and not messages
hopper.kernels.cache_clear()
hopper.triton.__version__ = "4.1.0"
found["unknown Triton"] = variants(call())
found["messages"] = messages
print(json.dumps(found))
"""

BOTH = ["fused_dual_gemm", "fused_ln_residual"]
# With more than 256 channels its gates have a launch of their own.
STAGE_3_APART = ["fused_dual_gemm", "fused_ln_residual", "fused_ln_residual_gates"]
STAGE_2 = ["trimul_einsum"]
WANTED = {
    "bfloat16": BOTH + STAGE_2,
    "float16": BOTH + STAGE_2,
    "float16 transition": ["transition"],
    "incoming": BOTH + STAGE_2,
    "ragged": BOTH + STAGE_2,
    "narrow": BOTH + STAGE_2,
    "transition": ["transition"],
    "padded": BOTH,
    "padded transition": ["transition"],
    "three parts": BOTH + STAGE_2,
    "wide": STAGE_3_APART + STAGE_2,
    "wide, padded": STAGE_3_APART,
    "wide transition": ["row_linear", "swiglu_hidden"],
    "no residual": BOTH + STAGE_2,
    # There a group's a and b lie apart.
    "lean": ["fused_ln_residual", *STAGE_2],
    # Stage 2 has planes of any number of channels, aligned whatever x is.
    "other width": STAGE_2,
    "wider": STAGE_2,
    "unaligned": STAGE_2,
}


@pytest.fixture(scope="module")
def plans():
    return json.loads(python_output(PLANS))


@pytest.mark.parametrize("case", WANTED)
def test_what_they_take(plans, case):
    assert plans[case] == WANTED[case]


def test_what_they_leave_to_the_plain_kernels(plans):
    apart = [
        *WANTED, "messages", "specialised", "refused", "backward", "buffers", "odd", "peaks",
        "plain peaks", "gates of a rank",
    ]  # fmt: skip
    others = {name: found for name, found in plans.items() if name not in apart}
    assert len(others) == 6 and not any(others.values()), others


def test_stage_1_backward(plans):
    """All of a training step's, with planes one behind the other, or apart; or none."""
    for case, (theirs, all_of_them) in plans["backward"].items():
        taken = case in ("bfloat16", "narrow", "ragged")
        assert all_of_them > 0 and theirs == (all_of_them if taken else 0), case


def test_memory_of_gates(plans):
    """They lie where a and b were, but for few of a rank's rows at a time in lean mode."""
    for mine, plain in zip(plans["peaks"], plans["plain peaks"], strict=True):
        assert plain <= mine <= plain + 0.06  # the folded weights
    assert plans["gates of a rank"] == [0, 1 / 16]


def test_a_whole_transition(plans):
    """It holds the output alone; settings that its ring has no room for are refused."""
    assert plans["buffers"] == ["output"]
    assert len(plans["odd"]) == 2 and all("got LaunchConfig" in of for of in plans["odd"])


def test_pointers_into_slices_have_any_alignment(plans):
    """One launch serves all entries of a batch, and all rows of a step, of mask and moments."""
    assert plans["specialised"] == {
        "_gated_rows_hopper_kernel": ["moments_ptr"],  # memory of its own
        "_ln_residual_hopper_kernel": [],
        "_wide_ln_residual_hopper_kernel": ["residual_ptr"],  # aligned as for a descriptor
        "_row_linear_hopper_kernel": [],
        # Parameters, whose alignment a call's launches are chosen by.
        "_transition_hopper_kernel": ["norm_weight_ptr", "norm_bias_ptr"],
    }


def test_a_setting_of_a_variant_for_a_call_that_it_does_not_take(plans):
    assert len(plans["refused"]) == 5
    for message in plans["refused"].values():
        assert "setting must be of one of ['']" in message and "kernel='hopper'" in message


def test_an_unknown_triton_is_said_once(plans):
    (message,) = plans["messages"]
    assert "Triton 4.1.0" in message and "Hopper" in message
