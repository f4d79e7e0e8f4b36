"""What fills the output where stage 3's Hopper kernel leaves tiles of padding out."""

import dataclasses

import pytest
import torch
from helpers import as_call, make_problem

TILE = 64


@pytest.fixture
def filled(submodule, on_triton):
    """filled(problem, lengths, first_row): memory of NaN after the launch, on the CPU."""

    def fill(problem, lengths, first_row=0):
        problem = problem.to(on_triton)
        lengths = torch.tensor(lengths, dtype=torch.int32, device=on_triton)
        call = as_call(submodule("_call"), problem, lengths=lengths)
        out = torch.full_like(call.x, torch.nan)
        launches = submodule("triton_parts.launch").Launches()
        submodule("hopper.padding").fill_padding(call, launches, None, out, first_row)
        return out.cpu()

    return fill


def left_out(lengths, rows, length, first_row=0):
    """[B, R, L]: the pairs of tiles in which no pair has both residues within the lengths."""
    lengths = torch.tensor(lengths)[:, None]
    i = first_row + torch.arange(rows) >= lengths
    starts = torch.arange(length) // TILE * TILE >= lengths
    return i[:, :, None] | starts[:, None, :]


@pytest.mark.parametrize("residual", [False, True])
def test_tiles_of_padding(filled, residual):
    problem = make_problem(70, 128, batch=4, dtype=torch.bfloat16, residual=residual)
    lengths = [70, 64, 0, 69]
    got = filled(problem, lengths)
    where = left_out(lengths, 70, 70)
    wanted = problem.residual if residual else torch.zeros_like(problem.x)
    assert torch.equal(got[where], wanted[where]) and got[~where].isnan().all()


def test_some_rows(filled):
    problem = make_problem(66, 192, batch=1, dtype=torch.float16, residual=True)
    some = dataclasses.replace(problem, x=problem.x[:, 40:50], residual=problem.residual[:, 40:50])
    got, where = filled(some, [45], 40), left_out([45], 10, 66, 40)
    assert torch.equal(got[where], some.residual[where]) and got[~where].isnan().all()
    assert where[:, :5, :TILE].logical_not().all() and where[:, 5:].all()
