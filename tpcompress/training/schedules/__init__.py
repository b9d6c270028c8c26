"""How the budget moves over training. A recipe names any class of this list, or a dotted path of its own."""

from tpcompress.training.schedules.base import Schedule, draw_for, progress_at
from tpcompress.training.schedules.constant import Constant
from tpcompress.training.schedules.drawn import Matryoshka, RandomBudget, Sandwich
from tpcompress.training.schedules.epic import EpicWindow, LayerRamp
from tpcompress.training.schedules.ramps import Cosine, Linear, Steps

__all__ = [
    "Constant", "Cosine", "EpicWindow", "LayerRamp", "Linear", "Matryoshka", "RandomBudget", "Sandwich", "Schedule",
    "Steps", "draw_for", "progress_at",
]  # fmt: skip
