"""Ignite handlers: resumable runs, weights in half precision, schedules, tables and reports."""

from .curves import OverlayImageHandler, TensorBoardWriter
from .epoch_log import EpochLog, LossTerms
from .evaluation import EvaluationReport
from .results import InferenceResults
from .training import EpochSeed, TrainingRun
from .weights import WeightsLoader, save_weights

__all__ = [
    "EpochLog",
    "EpochSeed",
    "EvaluationReport",
    "InferenceResults",
    "LossTerms",
    "OverlayImageHandler",
    "TensorBoardWriter",
    "TrainingRun",
    "WeightsLoader",
    "save_weights",
]
