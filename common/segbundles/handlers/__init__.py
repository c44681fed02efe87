"""Ignite handlers: resumable runs, weights in half precision, schedules, tables and reports."""

from .evaluation import EvaluationReport
from .logging import EpochLog, LossTerms, OverlayImageHandler, TensorBoardWriter
from .results import InferenceResults
from .resume import RunLoader, RunSaver
from .schedule import EarlyStopHandler, LrScheduleHandler
from .weights import BestWeightsSaver, WeightsLoader, save_weights

__all__ = [
    "BestWeightsSaver",
    "EarlyStopHandler",
    "EpochLog",
    "EvaluationReport",
    "InferenceResults",
    "LossTerms",
    "LrScheduleHandler",
    "OverlayImageHandler",
    "RunLoader",
    "RunSaver",
    "TensorBoardWriter",
    "WeightsLoader",
    "save_weights",
]
