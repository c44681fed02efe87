"""Statistics over the cases of an evaluation: intervals, agreement, detection, calibration, confidence, comparison."""

from __future__ import annotations

from .agreement import bland_altman, intraclass_correlation, volume_agreement
from .detection import DETECTION_COLUMNS, count_objects, detection_rates
from .intervals import Interval, bootstrap_interval, group_names, over_cases, short, with_intervals
from .paired import difference_line, paired_difference
from .probabilities import ProbabilityCounts, add_counts, counts_of_table, probability_table
from .trust import failure_auroc, judge_confidence, rank_correlation

__all__ = [
    "DETECTION_COLUMNS",
    "Interval",
    "ProbabilityCounts",
    "add_counts",
    "bland_altman",
    "bootstrap_interval",
    "count_objects",
    "counts_of_table",
    "detection_rates",
    "difference_line",
    "failure_auroc",
    "group_names",
    "intraclass_correlation",
    "judge_confidence",
    "over_cases",
    "paired_difference",
    "probability_table",
    "rank_correlation",
    "short",
    "volume_agreement",
    "with_intervals",
]
