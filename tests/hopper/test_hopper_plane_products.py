"""The Hopper kernel for stage 2, and both products of its backward: its calls, steps and code.

The steps run in `gluon_emulator`.
"""

import inspect
import json
import math
from types import SimpleNamespace

import pytest
import torch
from fresh_process import python_output
from helpers import memory_of_no_numbers, relative_error, room, seeded

pytest.importorskip("triton")
BF16, F16 = torch.bfloat16, torch.float16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
pytestmark = [pytest.mark.kernels_ci, pytest.mark.usefixtures("watched")]
BUDGET = {BF16: 2.5e-3, F16: 4e-4}  # of stage 2, whose sums are rounded once


def exact(direction, grad, a, b, with_axes_of_x=False):
    """da and db; with the axes of x, as for merged sequences, only those of "incoming" differ."""
    grad, a, b = grad.double(), a.double(), b.double()
    if direction == "outgoing":
        return [grad @ b, grad.mT @ a]
    if with_axes_of_x:
        return [b @ grad.mT, a @ grad]
    return [b.mT @ grad.mT, a.mT @ grad]


# In a process of the emulator: the errors of each case, and of changed kernels, or what they raise.
EMULATE = (
    inspect.getsource(exact)
    + """
import json, sys
import gluon_emulator, torch

gluon_emulator.install()
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule
from helpers import relative_error, seeded

package = load_kernel(find_root())
module, device = submodule(package, "hopper.plane_products"), submodule(
    package, "triton_parts.device"
)
config = submodule(package, "triton_parts.settings").LaunchConfig
H100 = device.target_of("sm_90", "any", 132)
ONLY, OTHER, OWN = module.ONLY, module.OTHER, module.OWN
HOW = {
    "outgoing": ((ONLY, OTHER), (False, True, True, True)),
    "incoming": ((OTHER, ONLY), (True, False, True, True)),
    "merged": ((OTHER, ONLY), (False, False, False, True)),
}


def planes(entries, hidden, length):
    pitch = -(-length // 16) * 16
    made = torch.full((entries, hidden, length, pitch), torch.nan, dtype=torch.bfloat16)
    made[..., :length] = torch.randn(
        entries, hidden, length, length, generator=seeded(entries)
    )
    return made


def errors(kind, length, block_n, hidden=3, programs=4, module=module):
    setting = config(128, block_n, 64, 4, 3, kernel="hopper")
    made = torch.full_like(planes(2, hidden, length), torch.nan)
    if kind == "lean":  # its rows are of all channels
        made = made.transpose(1, 2).contiguous().transpose(1, 2)
    if kind in ("product", "lean"):
        left, right = planes(2, hidden, length), planes(3, hidden, length)[1:]
        how = ()
        wanted = left[..., :length].double() @ right[..., :length].double().mT
    else:
        grad, both = planes(1, hidden, length), planes(2, hidden, length)
        left, right = (grad, both) if kind == "outgoing" else (both, grad)
        how = HOW[kind]
        direction = kind if kind == "outgoing" else "incoming"
        exact_ones = exact(
            direction, grad[0, ..., :length], *both[..., :length], kind == "merged"
        )
        wanted = torch.stack(exact_ones)
    with device.standing_in(H100):
        launch = module.prepare(left, right, made, setting, *how)
    launch.launch = lambda **given: gluon_emulator.run(launch, programs, **given)
    module.launch(launch, left, right, made)
    return relative_error(made[..., :length], wanted)


cases, changes = (json.loads(argument) for argument in sys.argv[1:])
found, seen = [errors(*case) for case in cases], []
for case, before, after, *count in changes:
    try:
        seen.append(errors(*case, module=gluon_emulator.changed(module, before, after, *count)))
    except (AssertionError, gluon_emulator.Deadlock) as error:
        seen.append(str(error))
print(json.dumps([found, seen]))
"""
)

# The compiled forms that no plan of `esmfold2-trimul resources` has.
COMPILE = """
import json, torch
from esmfold2_trimul_tools import resources
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
module, device = submodule(package, "hopper.plane_products"), submodule(
    package, "triton_parts.device"
)
config = submodule(package, "triton_parts.settings").LaunchConfig
binaries = []
with resources._compiling_for("sm_90"), device.standing_in(device.target_of("sm_90", "any", 132)):
    for dtype, length, block_n in (
        (torch.bfloat16, 512, 256), (torch.float16, 320, 128), (torch.bfloat16, 64, 128),
    ):
        grad, planes = (torch.empty(n, 64, length, length, dtype=dtype) for n in (1, 2))
        setting = config(128, block_n, 64, 4, 768 // (128 + block_n) * 2, kernel="hopper")
        launch = module.prepare(
            planes, grad, planes, setting, (module.OTHER, module.ONLY), (False, False, False, True)
        )
        binaries.append(launch.compile(left=planes, right=grad, out=planes))
codes = resources.read_machine_code(binaries, binaries)
print(json.dumps([
    [code.pipelined, code.spill_bytes, code.shared_bytes, code.descriptor_faults] for code in codes
]))
"""


def test_steps_in_an_emulator():
    """Tiles that end within and at blocks, one and several for a program; and wrong kernels."""
    cases = [
        ("product", 300, 256), ("product", 70, 64, 2, 3), ("product", 257, 128), ("lean", 130, 64),
        ("outgoing", 64, 64), ("outgoing", 130, 64), ("incoming", 150, 64, 2),
        ("merged", 130, 64), ("outgoing", 40, 128, 1, 5), ("merged", 100, 64),
    ]  # fmt: skip
    several = "merged", 130, 64  # tiles for a program
    changes = [
        # A part's memory is written before it has gone out.
        (several, "tma.store_wait(BUFFERS - 1)", "tma.store_wait(BUFFERS)"),
        # The last tile is left there.
        (several, "    tma.store_wait(0)\n", ""),
        # A stage is given back before it has been multiplied.
        (several, "mma_wait(1, deps=(acc,))", "mma_wait(2, deps=(acc,))", 2),
        # A stage is never given back.
        (several, "    _free(empty, stage, STAGES)\n    parts", "    parts"),
        # The parts go to the tile that is being made.
        (several, "        place = this\n", ""),
        (several, "        entry = 1 - entry\n", "        entry = entry\n"),
    ]  # fmt: skip
    output = python_output(EMULATE, json.dumps(cases), json.dumps(changes))
    found, seen = json.loads(output)
    assert all(error <= BUDGET[BF16] for error in found), found
    for (_, before, *_), what in zip(changes, seen, strict=True):
        assert isinstance(what, str) or not what <= 0.1, before


def test_machine_code():
    for pipelined, spills, shared, faults in json.loads(python_output(COMPILE)):
        assert pipelined and spills <= 8 and shared <= 232448 and not faults


@pytest.mark.parametrize("both", [False, True])
def test_columns_of_a_tile(submodule, both):
    """There are steps enough for its parts; they are the setting's where they may be."""
    columns_of = submodule("hopper.plane_products").columns_of
    for length in range(1 if both else 65, 1500):
        for most in (64, 128, 256):
            columns = columns_of(length, most, both)
            steps, parts = math.ceil(length / 64), columns // 64
            assert steps >= parts if both else steps > parts
            assert columns == most or 2 * columns // 64 > steps - (not both)


@pytest.mark.parametrize(
    "change, product, both",
    [
        ({}, True, True),
        (dict(dtype=F16), True, True),
        (dict(length=320), False, True),
        (dict(length=320, hidden=256), False, False),
        (dict(length=256, hidden=256), False, True),
        (dict(length=40), False, True),
        (dict(hidden=32), True, True),
        (dict(lengths=True), False, False),
        (dict(dtype=torch.float32), False, False),
        (dict(target="sm_100"), False, False),
    ],
)
def test_what_takes_it(submodule, change, product, both):
    """On Hopper GPUs 16-bit planes, one product only where L is above 320, two where they gain."""

    def taken(hidden=128, length=512, dtype=BF16, lengths=False, target="sm_90"):
        device = submodule("triton_parts.device")

        def planes(count):
            return torch.empty(count, hidden, length, length, dtype=dtype, device="meta")

        call = _call(hidden)
        call.lengths = torch.empty(1, dtype=torch.int32, device="meta") if lengths else None
        prepare = submodule("trimul_einsum_triton").prepare_einsum
        setting = submodule("triton_path.trimul_einsum_backward")._setting_of_both
        with device.standing_in(device.target_of(target, "any", 132)):
            one, turned = (
                prepare(call, *planes(3)[:, None], (False, turned), None) for turned in (0, 1)
            )
            config = setting(call, planes(1)[0], planes(2), planes(2))
        assert not turned.variant
        return bool(one.variant), config is not None

    assert taken(**change) == (product, both)


def _planes(entries, hidden, length, dtype):
    """[E, D, L, pitch], NaN beyond L."""
    planes = torch.full((entries, hidden, length, -(-length // 16) * 16), math.nan, dtype=dtype)
    planes[..., :length] = torch.randn(
        entries, hidden, length, length, generator=seeded(length + entries)
    )
    return planes.cuda()


def _call(hidden, direction="outgoing"):
    return SimpleNamespace(precision="fp32", lengths=None, hidden=hidden, direction=direction)


@on_hopper
@pytest.mark.parametrize("dtype, lean", [(BF16, False), (F16, False), (BF16, True)])
@pytest.mark.parametrize("length", [321, 384, 449, 512, 641, 1000])
def test_products_on_a_gpu(submodule, dtype, length, lean):
    """In lean mode rows of the product are of all channels."""
    hidden = 5 if length < 600 else 3
    a, b = (_planes(n, hidden, length, dtype)[-2:] for n in (2, 3))
    launches = submodule("triton_parts.launch").Launches()
    with memory_of_no_numbers():
        product = torch.empty_like(a.transpose(1, 2).contiguous() if lean else a)
        product = product.transpose(1, 2) if lean else product
        stage = submodule("trimul_einsum_triton")
        stage.trimul_einsum_fwd(_call(hidden), launches, a, b, product)
    (prepared,) = launches.values()
    assert prepared.variant == "hopper"
    wanted = a[..., :length].double() @ b[..., :length].double().mT
    error = relative_error(product[..., :length], wanted.cpu())
    assert error <= BUDGET[dtype] * room(wanted.numel())


@on_hopper
@pytest.mark.parametrize(
    "direction, merged", [("outgoing", False), ("incoming", False), ("incoming", True)]
)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "length, hidden",
    [(17, 40), (64, 3), (65, 3), (128, 150), (193, 5), (256, 70), (320, 3), (500, 5), (769, 3)],
)
def test_both_products_on_a_gpu(submodule, direction, merged, dtype, length, hidden):
    """Those of one launch, with fewer tiles than programs and more; twice the same bits."""
    grad, planes = _planes(1, hidden, length, dtype)[0], _planes(2, hidden, length, dtype)
    launches, made = submodule("triton_parts.launch").Launches(), []
    call = _call(hidden, direction)
    for _ in range(2):
        with memory_of_no_numbers():
            made.append(torch.empty_like(planes))
            submodule("triton_path.trimul_einsum_backward").multiply_both(
                call, launches, grad, planes, made[-1], 0, merged
            )
    (prepared,) = launches.values()
    assert prepared.variant == "hopper"
    wanted = exact(direction, grad[..., :length], *planes[..., :length], merged)
    for got, of in zip(made[0][..., :length], wanted, strict=True):
        assert relative_error(got, of.cpu()) <= BUDGET[dtype] * room(of.numel())
    assert torch.equal(made[0][..., :length], made[1][..., :length])
