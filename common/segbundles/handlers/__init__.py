"""Ignite handlers: resumable runs, weights in half precision, schedules, tables and reports."""

from .curves import OverlayImageHandler
from .epoch_log import EpochLog
from .evaluation import EvaluationReport
from .measurements import InferenceMeasurements
from .predictions import SavePredictions, prediction_name
from .preview import Preview
from .results import InferenceResults
from .training import TrainingRun
from .weights import WeightsLoader, save_weights

__all__ = [
    "EpochLog",
    "EvaluationReport",
    "InferenceMeasurements",
    "InferenceResults",
    "OverlayImageHandler",
    "Preview",
    "SavePredictions",
    "TrainingRun",
    "WeightsLoader",
    "prediction_name",
    "save_weights",
]
