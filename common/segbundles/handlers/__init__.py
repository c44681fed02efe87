"""Ignite handlers: resumable runs, weights in half precision, schedules, tables and reports."""

from .evaluation import EvaluationReport
from .frames import FrameReport
from .logging import EpochLog, LossTerms, OverlayImageHandler, TensorBoardWriter
from .results import InferenceResults
from .resume import RunLoader, RunSaver, can_resume
from .schedule import EarlyStopHandler, LrScheduleHandler
from .sections import SectionReport
from .weights import BestWeightsSaver, WeightsLoader, save_weights

__all__ = [
    "BestWeightsSaver",
    "EarlyStopHandler",
    "EpochLog",
    "EvaluationReport",
    "FrameReport",
    "InferenceResults",
    "LossTerms",
    "LrScheduleHandler",
    "OverlayImageHandler",
    "RunLoader",
    "RunSaver",
    "SectionReport",
    "TensorBoardWriter",
    "WeightsLoader",
    "can_resume",
    "save_weights",
]
