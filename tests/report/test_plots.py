from __future__ import annotations

import math
import re

import pytest

from segbundles.report import (
    agreement_svg,
    bland_altman_svg,
    calibration_svg,
    groups_svg,
    precision_recall_svg,
    thresholds_svg,
    to_latex,
)
from segbundles.statistics import ProbabilityCounts

NAN = math.nan
COUNTS = ProbabilityCounts.of([0.9, 0.8, 0.2, 0.1], [1, 0, 1, 0])


def words(svg: bytes) -> list[str]:
    """Texts of an SVG: matplotlib keeps them as comments."""
    return [text.strip() for text in re.findall("<!--(.*?)-->", svg.decode())]


@pytest.mark.parametrize(
    ("svg", "expected"),
    [
        (agreement_svg([1, 2, NAN], [2, 1, 5], "true (ml)", "predicted (ml)"), ["true (ml)", "predicted (ml)"]),
        (agreement_svg([], [], "true", "seen"), ["true"]),
        (agreement_svg([3], [3], "true", "seen"), ["seen"]),
        (bland_altman_svg([10, 20, NAN], [11, 23, 5], "area"), ["bias 2", "limit 4.77", "limit -0.772"]),
        (bland_altman_svg([10], [11], "area"), ["bias 1"]),
        (calibration_svg(COUNTS.calibration()), ["share of pixels that are foreground"]),
        (precision_recall_svg(COUNTS.thresholds()), ["recall", "precision", "0.5"]),
        (thresholds_svg(COUNTS.thresholds()), ["threshold of the probability", "Dice", "precision", "recall"]),
        (
            groups_svg(
                [
                    {"name": "patient 7", "value": 0.8, "low": 0.7, "high": 0.9, "cases": [0.7, 0.9, NAN]},
                    {"name": "patient 9", "value": None, "low": None, "high": None},
                ],
                "Dice",
            ),
            ["patient 7", "patient 9", "Dice"],
        ),
    ],
)
def test_texts_of_the_figures(svg, expected):
    assert svg.startswith(b"<?xml")
    assert set(expected) <= {text.replace("\N{MINUS SIGN}", "-") for text in words(svg)}


@pytest.mark.parametrize(("values", "shown"), [([1.0, 2.0, 3.0], 3), ([1.0, NAN, 3.0], 2)])
def test_one_point_per_case(values, shown):
    svg = agreement_svg(values, values, "true", "seen").decode()
    points = re.search(r'<g id="PathCollection_1">.*?</g>\s*</g>', svg, re.DOTALL)
    assert points.group().count("<use ") == shown


def test_latex():
    rows = [{"case": "a_1", "dice": 0.91239, "n": 3}, {"case": "50 % & more", "dice": NAN, "n": None}]
    assert to_latex(["case", "dice", "n"], rows) == (
        "\\begin{table}\n\\centering\n\\begin{tabular}{lrr}\n\\toprule\n"
        "case & dice & n \\\\\n\\midrule\na\\_1 & 0.912 & 3 \\\\\n50 \\% \\& more & -- & -- \\\\\n"
        "\\bottomrule\n\\end{tabular}\n\\end{table}\n"
    )
    assert r"\textbackslash{}\textasciicircum{}" in to_latex(["n"], [{"n": "\\^"}])
