"""`patch` on triangle multiplications over a mesh of ranks, on 2 x 2 of them."""

import pytest
import torch
from distributed_modules import BLOCKS, MAKE
from ranks import RANKS, Rank, report_of, reports_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

LENGTH, CHANNELS = 10, 8


def distance(got, wanted) -> float:
    got, wanted = got.full_tensor().double(), wanted.full_tensor().double()
    return ((got - wanted).norm() / wanted.norm()).item()


def make(name: str, mesh, dtype=torch.float32, length: int = LENGTH):
    """A module, a pair tensor and a mask in blocks, the same numbers on all ranks."""
    torch.manual_seed(len(name))
    module = MAKE[name](mesh).to(dtype).requires_grad_(False)
    pair = distribute_tensor(torch.randn(2, length, length, CHANNELS).to(dtype), mesh, BLOCKS)
    mask = distribute_tensor((torch.rand(2, length, length) > 0.2).to(dtype), mesh, BLOCKS)
    return module, pair, mask


def swapped(on: Rank):
    """Both families and directions, with a mask and without, ragged, in two dtypes, in autocast."""
    mesh, calls = init_device_mesh("cpu", (1, 2, 2)), []
    for name in MAKE:
        for dtype, autocast, length, bound in (
            (torch.float32, False, LENGTH, 1e-5),
            (torch.float32, False, 7, 1e-5),
            (torch.bfloat16, False, LENGTH, 2e-2),
            (torch.float32, True, LENGTH, 2e-2),
        ):
            module, pair, mask = make(name, mesh, dtype, length)
            mask = None if length == 7 and name.startswith("esm") else mask
            wanted = module.float()(pair.float(), None if mask is None else mask.float())
            module.to(dtype)
            before = module.calls
            with on.kernel.patch(module) as report, torch.autocast("cpu", enabled=autocast):
                assert report.swapped == {"": name.split()[0]}
                got = module(pair, mask)
            assert got.placements == BLOCKS and got.device_mesh == mesh
            assert got.shape == pair.shape
            assert got.dtype == (torch.bfloat16 if autocast else dtype)
            assert distance(got, wanted) <= bound, (name, dtype, autocast, length)
            calls.append(module.calls - before)
    assert not any(calls)


def weights_in_float32(on: Rank):
    """Fold-CP casts them to the pair tensor's bfloat16, and so does ours; esm refuses them."""
    mesh = init_device_mesh("cpu", (1, 2, 2))
    for name in ("boltz outgoing", "esm incoming"):
        module, pair, mask = make(name, mesh)
        wanted = module(pair, mask)
        pair, mask, before = pair.bfloat16(), mask.bfloat16(), module.calls
        with on.kernel.patch(module):
            if name.startswith("boltz"):
                got = module(pair, mask)
                assert got.dtype == torch.bfloat16 and distance(got, wanted) <= 2e-2
                assert module.calls == before
            else:
                with pytest.raises(RuntimeError):
                    module(pair, mask)


def left(on: Rank):
    """What its own forward runs, and what that logs; by rank."""
    said, mesh = [], init_device_mesh("cpu", (1, 2, 2))
    on.kernel.paths._logger.warning = lambda text, *parts: said.append(text % parts)
    module, pair, mask = make("boltz outgoing", mesh)
    wanted = module(pair, mask)
    with on.kernel.patch(module):
        for _ in range(2):
            got = module(pair, mask.double())
        assert got.dtype == torch.float64 and distance(got, wanted) <= 1e-5
        with torch.enable_grad():
            needed = pair.detach().requires_grad_()
            assert module(needed, mask).requires_grad
        with pytest.raises(ValueError, match="placements must be"):
            module(pair.redistribute(placements=[Shard(0), Shard(2), Shard(1)]), mask)
        module.double()
        module(pair.double(), mask.double())
        assert module.calls == 6
    half = DeviceMesh("cpu", torch.arange(2).view(1, 1, 2))
    if on.rank in half.mesh:
        module, pair, mask = make("esm incoming", half)
        with on.kernel.patch(module):
            module(pair, mask)
        assert module.calls == 1
    return said


def reports_by_name(on: Rank):
    """What is recognised, and what is not."""
    mesh = init_device_mesh("cpu", (1, 2, 2))
    model = nn.ModuleDict({name.replace(" ", "_"): make(name, mesh)[0] for name in MAKE})
    model["hooked"] = make("esm outgoing", mesh)[0]
    model["hooked"].proj_gate.register_forward_hook(lambda *_: None)
    model["divided"] = make("boltz incoming", mesh)[0]
    model["divided"].p_in.weight = nn.Parameter(
        distribute_tensor(torch.randn(12, 8), mesh, [Shard(0)] * 3)
    )
    model["other"] = make("esm outgoing", mesh)[0]
    model["other"].proj_gate = nn.Linear(8, 8)
    model["turned"] = make("esm outgoing", mesh)[0]
    model["turned"]._direction = "sideways"
    report = on.kernel.patch(model)
    report.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    return [report.swapped, report.left]


CASES = [swapped, weights_in_float32, left, reports_by_name]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return reports_of(CASES, tmp_path_factory)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.__name__)
def test_a_patched_module_computes_what_it_did(reports, case):
    assert len(report_of(reports, case)) == RANKS


def test_what_is_left_to_the_module(reports):
    own = "The triangle multiplication runs the module's own forward: "
    for rank, said in report_of(reports, left).items():
        of_half = [own + "ours takes a mesh of all ranks that there are."]
        assert said == [
            own + "a mask of torch.float64 makes the result of torch.float32 another dtype.",
            own + "a gradient or a transform is needed, which the module computes itself.",
            own + "ours takes a pair tensor and a mask of placements "
            "(Shard(dim=0), Shard(dim=1), Shard(dim=2)).",
            own + "ours takes bfloat16, float16 and float32; got torch.float64.",
            *(of_half if rank < 2 else []),
        ]


def test_what_is_recognised(reports):
    for swapped_ones, left_ones in report_of(reports, reports_by_name).values():
        assert swapped_ones == {
            "esm_outgoing": "esm", "esm_incoming": "esm", "boltz_outgoing": "boltz",
            "boltz_incoming": "boltz",
        }  # fmt: skip
        assert left_ones.keys() == {"hooked", "divided", "other", "turned"}
        assert left_ones["hooked"] == "proj_gate has a hook, which would not run"
        assert left_ones["divided"].startswith(
            "p_in.weight must be a floating-point DTensor that every rank has whole; got DTensor"
        )
        assert left_ones["other"].startswith(
            "proj_gate must be of a class named LinearParamsReplicated; got torch.nn.modules"
        )
        assert left_ones["turned"] == (
            "module._direction must be named Outgoing or Incoming; got 'sideways'"
        )
