"""The call: one order of fields, which the ops' schemas have too."""

import pytest
import torch
from helpers import as_call, make_problem
from transitions import BIASES, PATHS, as_transition, make_transition

OPS = ("trimul_fwd", "trimul_fwd_", "trimul_fwd_saving", "trimul_bwd")
TRANSITION_OPS = ("swiglu_fwd", "swiglu_fwd_", "swiglu_fwd_saving", "swiglu_bwd")


def test_a_flat_call_is_the_call_again(submodule):
    types = submodule("_call")
    problem = make_problem(4, 8, mask="soft", residual=True, drop_mask=True)
    call = as_call(types, problem, lengths=torch.tensor([3], dtype=torch.int32))
    again = types.Call.of(call.flat())
    assert all(one is other for one, other in zip(again.flat(), call.flat(), strict=True))
    named = dict(zip(types.FLAT, call.flat(), strict=True))
    assert all(named[name] is getattr(call, name) for name in types.Call._fields if name in named)
    assert all(named[name] is getattr(call.weights, name) for name in types.Weights._fields)
    assert set(types.FLAT) == {*types.Call._fields, *types.Weights._fields} - {"weights"}


@pytest.mark.parametrize("name", OPS)
def test_the_schemas_are_in_the_order_of_a_flat_call(kernel, submodule, name):
    schema = getattr(submodule("_ops").ops, name).default._schema
    kept = ("grad_out", "product", "moments", "planes", "needs")
    first = kept if name == "trimul_bwd" else ()
    assert tuple(one.name for one in schema.arguments) == (*first, *submodule("_call").FLAT)


def test_a_flat_transition_is_the_transition_again(submodule):
    types = submodule("_call")
    problem = make_transition((2, 4, 4, 8), 12, residual="own", biases=BIASES, lengths=(3, 4))
    call = as_transition(types, problem)
    again = types.Transition.of(call.flat())
    assert all(one is other for one, other in zip(again.flat(), call.flat(), strict=True))
    named = dict(zip(types.TRANSITION_FLAT, call.flat(), strict=True))
    fields, parameters = types.Transition._fields, types.TransitionWeights._fields
    assert all(named[name] is getattr(call, name) for name in fields if name in named)
    assert all(named[name] is getattr(call.weights, name) for name in parameters)
    assert set(types.TRANSITION_FLAT) == {*fields, *parameters} - {"weights"}


@pytest.mark.parametrize("name", TRANSITION_OPS)
def test_the_transitions_schemas_are_in_the_order_of_a_flat_one(kernel, submodule, name):
    schema = getattr(submodule("_ops").ops, name).default._schema
    first = ("grad_out", "needs") if name == "swiglu_bwd" else ()
    wanted = (*first, *submodule("_call").TRANSITION_FLAT)
    assert tuple(one.name for one in schema.arguments) == wanted


def test_both_paths_have_the_same_functions(submodule):
    pytest.importorskip("triton")
    for path in ("aten_path", "triton_path"):
        module = submodule(path)
        for name in ("forward", "forward_saving", "backward", "saved_shapes", "plan"):
            assert callable(getattr(module, name))


def test_both_paths_have_the_same_functions_for_transitions(submodule):
    for path in PATHS:
        module = submodule(f"{path}_path").transition
        assert all(callable(getattr(module, name)) for name in ("forward", "backward", "plan"))


def test_a_call_on_one_sequence(submodule):
    problem = make_problem(4, 8, batch=3, mask="soft", drop_mask=True)
    call = as_call(submodule("_call"), problem).of_entry(1)
    assert torch.equal(call.x, problem.x[1:2]) and torch.equal(call.mask, problem.mask[1:2])
    assert call.drop_mask.shape == (1, 4, 8) and call.residual is None and call.lengths is None
