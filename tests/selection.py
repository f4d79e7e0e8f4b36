"""Parameters of which some are left to `make test-all`."""

import itertools
from collections.abc import Sequence

import pytest


def slow(*values):
    """These values of the parameters, which `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def pairwise(*axes: Sequence) -> list:
    """Every combination of a value of each axis, all slow but a few that have each pair of values.

    A fault that two arguments show together is found by one of the few; three are seldom needed.
    """
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def pairs(row: tuple[int, ...]) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    wanted, quick = set().union(*map(pairs, rows)), set()
    while wanted:
        best = max(rows, key=lambda row: len(pairs(row) & wanted))
        quick.add(best)
        wanted -= pairs(best)
    named = {row: [axis[at] for axis, at in zip(axes, row, strict=True)] for row in rows}
    return [tuple(of) if row in quick else slow(*of) for row, of in named.items()]
