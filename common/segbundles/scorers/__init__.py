"""Scorers: how an evaluation turns the cases of one task into numbers, pictures and words."""

from .base import (
    CaseRecord,
    Evaluation,
    Scorer,
    class_maps,
    count_probabilities,
    dice_line,
    draw,
    mean_of_defined,
    sizes,
)
from .frames import FrameScorer
from .sections import SectionScorer
from .volumes import SliceScorer, VolumeScorer

__all__ = ["CaseRecord", "Evaluation", "FrameScorer", "Scorer", "SectionScorer", "SliceScorer", "VolumeScorer"]
__all__ += ["class_maps", "count_probabilities", "dice_line", "draw", "mean_of_defined", "sizes"]
