"""The oracle compared with the fuzz's own formula, which shares no code with it."""

import dataclasses

import pytest
import torch
from esmfold2_trimul_tools import oracle

pytest.importorskip("hypothesis")
from fuzzing import (  # noqa: E402
    BIASES,
    NORMS,
    UPDATE,
    WITH_RESIDUAL,
    Case,
    Exact,
    Lengths,
    Mask,
    formula,
    lecun,
    make,
)

PLAIN = Case(
    UPDATE, torch.float32, (2,), 5, 6, 4, "outgoing", "plain",
    vectors={}, made=(), bundled=False, scales={}, mask=None, residual=None, drop_mask=None,
    lengths=None, eps=1e-5, eps_out=None, precision=None, memory="auto", recompute="none",
    inplace=False, needs_grad=(), layouts={}, seed=0,
)  # fmt: skip
CASES = {
    "plain": {},
    "incoming": {"direction": "incoming"},
    "norms": {"vectors": dict.fromkeys(NORMS, torch.float32), "eps": 0.1},
    "one norm's bias": {"vectors": {"norm_out_bias": torch.float32}},
    "biases": {"vectors": dict.fromkeys(BIASES, torch.float32)},
    "mask": {"mask": Mask((2, 5, 5), torch.float32, "signed")},
    "shared mask": {"mask": Mask((5, 1), torch.float32, "soft"), "leading": (3, 2)},
    "lengths": {"lengths": Lengths((3, 0), (2,), torch.int64, poisoned=False)},
    "lengths and mask": {
        "lengths": Lengths((4, 9), (2,), torch.int32, poisoned=False),
        "mask": Mask((2, 5, 5), torch.float32, "soft"),
    },
    "residual": {"function": WITH_RESIDUAL, "residual": "tensor"},
    "drop mask": {"function": WITH_RESIDUAL, "drop_mask": Mask((2, 1, 5, 6), torch.bool, "random")},
    "flat drop mask": {
        "function": WITH_RESIDUAL, "residual": "tensor", "direction": "incoming",
        "drop_mask": Mask((10, 6), torch.float32, "soft"),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_give_the_same(name):
    case = dataclasses.replace(PLAIN, **CASES[name])
    values = make(case, "cpu", lecun).values
    wanted, _ = formula(case, values, Exact(), Exact())
    others = {other: values.get(other) for other in ("mask", "residual", "drop_mask", "lengths")}
    got = oracle.triangle_multiplication(
        values["x"], case.direction, values, eps=case.eps, **others
    )
    assert got.dtype == torch.float64 and wanted.norm() > 0.1
    assert (got - wanted).norm() <= 1e-13 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtypes_results_are_rounded_to_it_and_norms_are_not(dtype, monkeypatch):
    seen = []
    for name in ("linear", "layer_norm"):
        function = getattr(torch.nn.functional, name)

        def record(*arguments, name=name, function=function):
            out = function(*arguments)
            seen.append((name, out.dtype))
            return out

        monkeypatch.setattr(torch.nn.functional, name, record)
    values = make(PLAIN, "cpu", lecun).values
    out = oracle.triangle_multiplication(values["x"], "outgoing", values, dtype=dtype)
    assert out.dtype == dtype
    assert set(seen) == {("linear", dtype), ("layer_norm", torch.float32)}
    assert (out - oracle.triangle_multiplication(values["x"], "outgoing", values)).norm() > 0
