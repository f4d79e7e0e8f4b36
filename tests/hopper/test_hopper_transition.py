"""A transition's Hopper variants beside its plain kernels and float64, on a GPU that runs them.

One kernel for the whole ("whole"), or one for its second stage ("second"). Nothing interprets
Gluon: what they compile to is looked at in tests/hopper/test_hopper_machine_code.py.
"""

import copy
import dataclasses

import pytest
import torch
from helpers import assert_no_worse, memory_of_no_numbers, reference, relative_error, run
from transitions import BIASES, make_transition

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper GPU", allow_module_level=True)
pytestmark = [pytest.mark.kernels_ci, pytest.mark.usefixtures("watched")]
BF16, HALF = torch.bfloat16, torch.float16
WIDEST = {"whole": 256, "whole, three consumers": 128, "second": 512}
KINDS = ("whole", "second")


@pytest.fixture
def use(submodule, monkeypatch):
    """use(kind): that variant runs whatever the length, where it takes the call."""
    settings = submodule("triton_parts.settings")
    launches = submodule("triton_path.launches")._launches
    original, table = settings._table, copy.deepcopy(settings._table("sm_90"))
    monkeypatch.setattr(
        settings, "_table", lambda name: table if name == "sm_90" else original(name)
    )

    def choose(kind):
        table["row_linear"]["2"].sort(key=lambda entry: entry.get("kernel") != "hopper")
        entries = table["swiglu_hidden"]["2"]
        wholes = [entry for entry in entries if entry.get("kernel") == "whole"]
        entries[:] = [entry for entry in entries if entry not in wholes]
        if kind != "second":
            wholes = [entry | {"max_length": 2**20} for entry in wholes]
            wholes.sort(key=lambda entry: (entry["block_m"] == 192) != ("three" in kind))
            entries[:0] = wholes
        settings.pick_config.cache_clear()
        launches.clear()

    yield choose
    settings.pick_config.cache_clear()
    launches.clear()


def ran(submodule, kind):
    """Whether the launches made so far are the variant's."""
    stages = {
        launch.stage
        for launches in submodule("triton_path.launches")._launches.values()
        for launch in launches.values()
        if launch.variant == "hopper"
    }
    return ("row_linear" if kind == "second" else "transition") in stages


CALLS = {
    "rows": dict(shape=(300, 256), hidden=1024, residual="own"),
    "one row": dict(shape=(1, 128), hidden=512, residual="x"),
    "a step of hidden channels": dict(shape=(65, 128), hidden=64, residual="own"),
    "biases": dict(shape=(3, 11, 13, 256), hidden=512, biases=BIASES),
    "bfloat16 norms": dict(shape=(2, 70, 70, 128), hidden=256, norm_dtype=BF16, residual="x"),
    "many tiles": dict(shape=(230, 230, 128), hidden=512, residual="x", biases=("down_bias",)),
    "three parts": dict(shape=(129, 192), hidden=768, residual="own"),
    "five parts": dict(shape=(129, 320), hidden=640, residual="own", biases=BIASES),
    "six parts": dict(shape=(200, 384), hidden=1536),
    "seven parts": dict(shape=(64, 448), hidden=192, residual="own"),
    "wide": dict(shape=(500, 512), hidden=2048, residual="x"),
}


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("kind, name", [
    (kind, name)
    for kind in WIDEST
    for name, options in CALLS.items()
    if options["shape"][-1] <= WIDEST[kind]
])  # fmt: skip
def test_no_worse_than_the_plain_kernels(kernel, submodule, use, kind, name, dtype):
    problem = make_transition(dtype=dtype, **CALLS[name])
    use(kind)
    with memory_of_no_numbers():
        got, again = (run(kernel, problem, "cuda") for _ in range(2))
        assert ran(submodule, kind) and torch.equal(got, again)
        with submodule("hopper").without_variants():
            plain = run(kernel, problem, "cuda")
    assert_no_worse([(got, plain, reference(problem))], 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", ["own", "x"])
def test_in_place(kernel, submodule, use, kind, residual):
    use(kind)
    problem = make_transition((150, 150, 256), 512, dtype=BF16, residual=residual).to("cuda")
    wanted = run(kernel, problem, "cuda")
    problem.residual = problem.residual.clone()
    if residual == "x":
        problem.x = problem.residual
    got = run(kernel, problem, "cuda", inplace=True)
    assert ran(submodule, kind)
    assert got.data_ptr() == problem.residual.data_ptr() and torch.equal(got, wanted)


@pytest.mark.parametrize("kind", WIDEST)
@pytest.mark.parametrize("which", ["x", "residual"])
def test_rows_apart(kernel, submodule, use, kind, which):
    use(kind)
    problem = make_transition((3, 40, 70, 128), 512, dtype=BF16, residual="own").to("cuda")
    wanted = run(kernel, problem, "cuda")
    turned = getattr(problem, which).transpose(1, 2).contiguous().transpose(1, 2)
    setattr(problem, which, turned)
    assert torch.equal(run(kernel, problem, "cuda"), wanted) and ran(submodule, kind)


@pytest.mark.parametrize("kind, channels, lengths, others", [
    (kind, channels, *rest)
    for kind in WIDEST
    for channels, *rest in (
        (256, [200, 131], dict(residual="own")),
        (128, [1, 0, 200, 65], dict(biases=BIASES)),
        (128, [*range(1, 81, 2)], dict(residual="own", biases=("up_bias",))),
    )
    if channels <= WIDEST[kind]
])  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_lengths(kernel, submodule, use, kind, channels, lengths, others, dtype):
    """Padding, which is NaN here, has the residual or zeros; memory that isn't written is NaN."""
    use(kind)
    shape = (len(lengths), max(lengths), max(lengths), channels)
    problem = make_transition(shape, 4 * channels, dtype=dtype, lengths=lengths, **others)
    within = submodule("validation").pairs_within(problem.lengths, shape[1])
    wanted = reference(problem)
    problem.x = torch.where(within[..., None], problem.x, torch.nan)
    with memory_of_no_numbers():
        got, again = (run(kernel, problem, "cuda").cpu() for _ in range(2))
        assert ran(submodule, kind)
        with submodule("hopper").without_variants():
            plain = run(kernel, problem, "cuda").cpu()
    assert torch.equal(got, again) and torch.equal(got[~within], plain[~within])
    assert_no_worse([(got[within], plain[within], wanted[within])], 1.0)
    if problem.residual is not None:
        over = dataclasses.replace(problem, residual=problem.residual.clone()).to("cuda")
        assert torch.equal(run(kernel, over, "cuda", inplace=True).cpu(), got)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_rows_are_the_bias_and_overflow_is_infinite(kernel, submodule, use, kind):
    use(kind)
    problem = make_transition((3, 130, 256), 512, dtype=HALF, residual="own").to("cuda")
    problem.x[0], problem.x[1] = 0.0, 1000.0
    problem.residual[:2] = 0.0
    got = run(kernel, problem, "cuda")
    assert ran(submodule, kind)
    assert relative_error(got[1], got[0].cpu().double()) <= 2e-3
    problem.residual = torch.full_like(problem.residual, 65000.0)
    problem.weights["down_weight"] *= 1e3
    got = run(kernel, problem, "cuda")
    assert got.isinf().any() and not got.isnan().any()
