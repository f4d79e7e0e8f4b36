"""Which calls the Hopper variants take, by plans for a device that is not there."""

import json

import pytest
from fresh_process import ROOT, python_output

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


def transition(width=256, length=512, dtype=bf16):
    return resources._transition_of(package, resources.Case(dtype, width, length))


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
    "incoming": variants(call(direction="incoming")),
    "ragged": variants(call(length=383)),
    "narrow": variants(call(width=128)),
    "transition": variants(transition()),
    "no residual": variants(call(residual=None, mask=None)),
    "lean": variants(call(memory="lean")),
    "float16": variants(call(dtype=half)),
    "float32": variants(call(dtype=single)),
    "other width": variants(call(width=192)),
    "wide": variants(call(width=512)),
    "padded": variants(call(padded=True)),
    "small": variants(call(length=96)),
    "unaligned": variants(unaligned(call())),
    "another GPU": variants(call(), "sm_100"),
    "float16 transition": variants(transition(dtype=half)),
}
with hopper.without_variants():
    found["left out"] = variants(call())
assert hopper.plain_only() is False and not messages
hopper.kernels.cache_clear()
hopper.triton.__version__ = "4.1.0"
found["unknown Triton"] = variants(call())
found["messages"] = messages
print(json.dumps(found))
"""

BOTH = ["fused_dual_gemm", "fused_ln_residual"]
WANTED = {
    "bfloat16": BOTH,
    "incoming": BOTH,
    "ragged": BOTH,
    "narrow": BOTH,
    "transition": ["swiglu_hidden"],
    "no residual": BOTH,
    # Groups of channels, and moments that are read, are the plain stage's.
    "lean": ["fused_ln_residual"],
}


@pytest.fixture(scope="module")
def plans():
    path = f"{ROOT / 'tests'}:{ROOT / 'tools' / 'src'}"
    return json.loads(python_output(PLANS, PYTHONPATH=path))


@pytest.mark.parametrize("case", WANTED)
def test_what_they_take(plans, case):
    assert plans[case] == WANTED[case]


def test_what_they_leave_to_the_plain_kernels(plans):
    others = {name: found for name, found in plans.items() if name not in [*WANTED, "messages"]}
    assert len(others) == 11 and not any(others.values()), others


def test_an_unknown_triton_is_said_once(plans):
    (message,) = plans["messages"]
    assert "Triton 4.1.0" in message and "Hopper" in message
