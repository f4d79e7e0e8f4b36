"""Helpers of the conformance suite's tests: its cases, and implementations that are wrong."""

import dataclasses
import functools

import torch
from esmfold2_trimul_tools.conformance.cases import EVERY_CASE
from esmfold2_trimul_tools.conformance.criterion import reference
from esmfold2_trimul_tools.conformance.implementations import IMPLEMENTATIONS, Implementation
from esmfold2_trimul_tools.conformance.run import pose
from helpers import SEED

CPU = torch.device("cpu")
BY_NAME = {one.name: one for one in IMPLEMENTATIONS}
CASE = {case.name: case for case in EVERY_CASE}
posed = functools.cache(functools.partial(pose, seed=SEED))


def outcome(row) -> tuple[str, str | None]:
    return row["status"], row["note"]


def implementation(run, **others) -> Implementation:
    return Implementation(
        "planted", lambda problem, sources: run(problem), lambda device, sources: None, **others
    )


def rounded(problem):
    return reference(problem).to(problem.x.dtype)


def turned(problem):
    other = {"outgoing": "incoming", "incoming": "outgoing"}[problem.case.direction]
    case = dataclasses.replace(problem.case, direction=other)
    return rounded(dataclasses.replace(problem, case=case))


def unmasked(problem):
    return rounded(dataclasses.replace(problem, mask=None))
