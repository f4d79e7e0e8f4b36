"""The schedules of a triangle multiplication whose rows lie on several ranks.

    division    how the pair tensor is divided
    ways        what all ranks agree on: default or lean, copies or messages
    forward     the exchanges between stages
    backward    the same for the gradients
    planning    what `explain` tells
"""

from .backward import run_backward as run_backward
from .division import Division as Division
from .division import Kept as Kept
from .forward import run_forward as run_forward
from .planning import plan as plan
