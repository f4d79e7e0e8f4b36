"""Counts what patched pair layers run."""

import pytest


@pytest.fixture
def calls(kernel, submodule, monkeypatch):
    """What runs inside a pair layer: ("triangle" or "transition", whether in place)."""
    module, found = submodule("models.pair_layers"), []

    def counted(name, function):
        def run(*arguments, **named):
            found.append((name, named["inplace"]))
            return function(*arguments, **named)

        return run

    for name, function in (
        ("triangle", "triangle_multiplicative_update_with_residual"),
        ("transition", "swiglu_transition"),
    ):
        monkeypatch.setattr(module, function, counted(name, getattr(module, function)))
    return found
