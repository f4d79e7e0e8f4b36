"""A way put into the model for a row, and what goes wrong there as part of the row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...folding.fold import is_out_of_memory
from ..rivals import Absent, first_line
from .results import Row
from .ways import Bench, Installed, Way

NOT_FINITE = "gave numbers that are not finite"


@contextmanager
def findings(row: Row) -> Iterator[None]:
    """Writes into the row what the block raises, whoever raises it: that is a finding."""
    try:
        yield
    except Absent as error:
        row |= {"status": "absent", "note": str(error)}
    except torch.linalg.LinAlgError:  # the sampler's superposition of coordinates
        row |= {"status": "wrong", "note": NOT_FINITE}
    except Exception as error:
        note = f"{row['note']}; {first_line(error)}" if row["note"] else first_line(error)
        fits = not is_out_of_memory(error)
        row |= {"status": "failed" if fits else "does not fit", "note": note}


@contextmanager
def installing(way: Way, bench: Bench) -> Iterator[Installed]:
    if bench.device.type == "cpu" and not way.on_cpu:
        raise Absent("needs a GPU")
    with way.install(bench) as installed:
        yield installed
