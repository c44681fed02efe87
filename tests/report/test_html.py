from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from segbundles.facts import versions
from segbundles.metrics import higher_is_better
from segbundles.report import PREDICTION_COLOURS, TRUTH_COLOURS, case_figure, distribution_svg, write_report

NAN = math.nan
VOID = {"meta", "img", "input", "link", "br", "wbr"}


class Page(HTMLParser):
    """Elements of a page as (tag, attributes, text), text of children included."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[list] = []
        self._open: list[list] = []
        self.feed(text)
        assert not self._open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag
        if tag in ("th", "td"):
            self.handle_data(" ")

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag: str, **attributes: str) -> list[list]:
        return [e for e in self.elements if e[0] == tag and attributes.items() <= e[1].items()]

    def texts(self, tag: str) -> list[str]:
        return [" ".join(e[2].split()) for e in self.all(tag)]


@pytest.fixture(scope="module")
def figure() -> bytes:
    label = np.zeros((30, 30), np.uint8)
    label[10:20, 10:20] = 1
    return case_figure(np.zeros((30, 30)), label, label)


ROWS = [
    {"case": "good", "status": "ok", "dice": 0.9, "hd95_mm": 3.0, "truth_ml": 12.25, "notes": ""},
    {
        "case": "missed one",
        "status": "missed",
        "dice": NAN,
        "hd95_mm": None,
        "truth_ml": 3,
        "notes": "locator: nothing",
    },
    {
        "case": "<script>alert(1)</script>&\"'",
        "status": "ok",
        "dice": 0.5,
        "hd95_mm": 2.0,
        "truth_ml": 7,
        "notes": "<b>",
    },
    {"case": "empty", "status": "empty", "dice": NAN, "hd95_mm": NAN, "truth_ml": 0, "notes": ""},
]
SUMMARY = {
    "dice": {"mean": 0.7, "sd": 0.2828, "median": 0.7, "worst": 0.5, "n": 2},
    "hd95_mm": {"mean": 2.5, "sd": None, "median": 2.5, "worst": 3.0, "n": 2},
}
WORST_FIRST = ["missed one", "<script>alert(1)</script>&\"'", "good", "empty"]


def write(path, **options):
    options = {"title": "A & B", "rows": ROWS, "figures": {}, "summary": SUMMARY, "units": {"hd95_mm": "mm"}} | options
    return Page(write_report(path / "report.html", **options).read_text(encoding="utf-8"))


def cells(page: Page) -> list[list[str]]:
    """Texts of the rows of the cases table, in order."""
    rows: list[list[str]] = []
    for tag, attributes, text in page.elements:
        if tag == "tr" and "data-place" in attributes:
            rows.append([])
        elif rows and len(rows) <= len(ROWS) and tag in ("th", "td") and len(rows[-1]) < 6:
            rows[-1].append(" ".join(text.split()))
    return rows


def test_every_case_is_in_table_and_overlays_worst_first(tmp_path, figure):
    page = write(tmp_path, figures={row["case"]: figure for row in ROWS})
    assert page.texts("h3") == WORST_FIRST
    assert [row[0] for row in cells(page)] == WORST_FIRST
    articles = page.all("article")
    assert [e[1]["id"] for e in articles] == ["case-1", "case-2", "case-3", "case-4"]
    assert [e[1]["href"] for e in page.all("a", **{"class": "name"})] == ["#case-1", "#case-2", "#case-3", "#case-4"]


def test_order_follows_the_better_direction_of_the_metric(tmp_path, figure):
    page = write(tmp_path, figures={row["case"]: figure for row in ROWS}, sort_by="hd95_mm")
    assert page.texts("h3") == ["missed one", "good", "<script>alert(1)</script>&\"'", "empty"]


def test_missed_case_with_a_defined_value_still_comes_first(tmp_path):
    rows = [{"case": "bad", "status": "ok", "dice": 0.0}, {"case": "missed", "status": "missed", "dice": 0.1}]
    assert [row[0] for row in cells(write(tmp_path, rows=rows))] == ["missed", "bad"]


def test_undefined_values_are_shown_as_missed_and_do_not_count(tmp_path):
    page = write(tmp_path)
    assert cells(page)[0] == ["missed one", "missed", "—", "—", "3", "locator: nothing"]
    assert cells(page)[1][1:5] == ["ok", "0.500", "2.00", "7"]
    assert page.texts("table")[0] == (
        "Metric mean SD median worst cases Dice ↑ 0.700 0.283 0.700 0.500 2 of 4 (1 missed, 1 empty) "
        "surface distance, 95th percentile (mm) ↓ 2.50 — 2.50 3.00 2 of 4 (1 missed, 1 empty)"
    )
    plots = page.all("img")
    assert "Dice, n = 2 of 4;" in plots[0][1]["alt"]
    assert "95th percentile (mm), n = 2 of 4;" in plots[1][1]["alt"]
    assert "higher is better; worst: <script>" in page.texts("figcaption")[0]
    assert page.texts("figcaption")[1] == "lower is better; worst: good"


@pytest.mark.parametrize(("dice", "status"), [(0.3, "ok"), (NAN, "missed"), (None, "missed")])
def test_missing_status_is_derived(tmp_path, dice, status):
    page = write(tmp_path, rows=[{"case": "a", "dice": dice}], summary={"dice": {}})
    assert cells(page)[0][1] == status


def test_names_are_escaped(tmp_path, figure):
    evil = "</style><script>alert(1)</script>\"' onload='x"
    rows = [{"case": evil, "dice": 0.5, evil: evil, "status": evil}]
    options = {
        "title": evil,
        "notes": [evil],
        "settings": {evil: [[evil, evil]]},
        "class_names": [evil],
        "units": {"dice": evil},
    }
    page = write(tmp_path, rows=rows, figures={evil: figure}, summary={"dice": SUMMARY["dice"]}, **options)
    assert len(page.all("script")) == 1
    assert "alert" not in page.all("script")[0][2]
    assert page.texts("h1") == page.texts("title") == [evil]
    assert not [name for e in page.elements for name in e[1] if name.startswith("on")]


def test_page_needs_no_other_file(tmp_path, figure):
    page = write(tmp_path, figures={row["case"]: figure for row in ROWS})
    assert all(e[1]["src"].startswith("data:image/") for e in page.elements if "src" in e[1])
    targets = {e[1]["id"] for e in page.elements if "id" in e[1]}
    links = [e[1]["href"] for e in page.elements if "href" in e[1]]
    assert len(links) > 8
    assert all(link.startswith("#") and link[1:] in targets for link in links)
    assert not page.all("link")
    assert not re.search(r"https?:|@import|url\(", (tmp_path / "report.html").read_text(encoding="utf-8"))


def test_only_the_page_own_script_may_run(tmp_path):
    page = write(tmp_path)
    script = page.all("script")[0][2]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][1]["content"]
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy


def test_figures_carry_their_size_and_may_be_absent(tmp_path, figure):
    page = write(tmp_path, figures={"good": figure})
    [picture] = [e for e in page.all("img") if "outlined" in e[1]["alt"]]
    assert (picture[1]["width"], picture[1]["height"]) == ("760", "430")
    assert base64.b64decode(picture[1]["src"].partition("base64,")[2]) == figure
    assert page.texts("p").count("No picture of this case.") == 3


def test_without_figures_there_is_no_overlay_section(tmp_path):
    page = write(tmp_path)
    assert not page.all("article")
    assert not page.all("section", id="overlays")
    assert [e[1]["id"] for e in page.all("tr") if "id" in e[1]] == ["row-1", "row-2", "row-3", "row-4"]


@pytest.mark.parametrize("names", [None, ["polyp", "lumen"], ["polyp", "lumen", "fold", "stool", "tool"]])
def test_legend_shows_every_class_in_its_own_colours(tmp_path, figure, names):
    page = write(tmp_path, figures={"good": figure}, class_names=names)
    shown = [f"{name} {what}".strip() for name in names or [""] for what in ("truth (solid)", "prediction (dashed)")]
    assert page.texts("li") == shown
    colours = [path[1]["stroke"] for path in page.all("path")]
    pairs = zip(TRUTH_COLOURS, PREDICTION_COLOURS, strict=True)
    assert colours == [f"rgb{colour}" for pair in pairs for colour in pair][: len(shown)]


def test_figures_without_outlines_have_no_legend(tmp_path, figure):
    rows, summary = [{"case": "a", "v_rand": 0.9}], {"v_rand": {"mean": 0.9, "n": 1}}
    for outlines in (True, False):
        path = tmp_path / f"{outlines}.html"
        write_report(path, title="t", rows=rows, summary=summary, figures={"a": figure}, outlines=outlines)
        page = Page(path.read_text())
        assert len(page.all("ul")) == outlines
        (picture,) = page.all("img", width="760")
        assert picture[1]["alt"].endswith("outlined" if outlines else "shown next to it")


def test_heading_settings_versions_and_notes(tmp_path):
    page = write(
        tmp_path,
        settings={"Knobs": [("spacing_mm", [1, 2], "facts"), ("amp", False, "config")]},
        notes="Spacing by record.",
    )
    assert page.texts("h1") == ["A & B"]
    assert page.texts("p")[0] == "4 cases: 2 ok , 1 missed , 1 empty".replace(" ,", ",")
    assert "Spacing by record." in page.texts("p")
    text = page.all("section", id="settings")[0][2].split()
    assert text[text.index("amp") + 1] == "false"
    assert {name: text[text.index(name) + 1] for name in versions()} == versions()
    assert {"numpy", "python"} <= set(text)


def test_metric_of_no_row_is_in_the_summary_only(tmp_path):
    page = write(tmp_path, summary={"pooled_jaccard": {"mean": 0.684, "n": 4, "counted": "frames"}, **SUMMARY})
    assert "Jaccard (IoU), pooled over all pixels ↑ 0.684 — — — 4 frames" in " ".join(page.all("table")[0][2].split())
    assert len(page.all("figure")) == 2
    assert [row[0] for row in cells(page)] == WORST_FIRST


def test_200_cases_of_the_largest_figures_stay_under_20_mb(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 200, 200), np.uint8)
    figure = case_figure(noise, None, None)
    figure += b"\0" * (68_000 - len(figure))
    rows = [{"case": f"case {k}", "dice": k / 200, "hd95_mm": k / 10} for k in range(200)]
    path = write_report(
        tmp_path / "r.html", title="t", rows=rows, figures={r["case"]: figure for r in rows}, summary=SUMMARY
    )
    assert 17e6 < path.stat().st_size < 20e6


def test_report_replaces_the_last_one_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "ü new"
    write(folder)
    write(folder, title="second")
    assert [p.name for p in folder.iterdir()] == ["report.html"]
    assert "second" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": []}, "rows is empty"),
        ({"rows": [{"dice": 1.0}]}, r"every row needs \"case\".*got a row with only \['dice'\]"),
        ({"rows": [ROWS[0], ROWS[0]]}, "case names must differ, got more than one 'good'"),
        ({"figures": {"other": b""}}, "figures has a picture for 'other', which is not a case of rows"),
        ({"slices": {"other": {}}}, "slices has a picture for 'other', which is not a case of rows"),
        ({"figures": {"good": b"no picture"}}, "a figure must be the bytes of a picture, got b'no picture'"),
        ({"sort_by": "hd"}, r"sort_by must be a metric of the rows \(dice, hd95_mm\), got 'hd'"),
    ],
)
def test_write_report_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*report\.html"):
        write(tmp_path / "file")


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        *[(name, True) for name in ("dice", "dice_2", "jaccard", "precision", "recall", "accuracy", "truth_in_box")],
        *[(name, True) for name in ("v_rand", "v_info", "surface_dice", "mean_iou", "sensitivity")],
        *[(name, False) for name in ("hd", "HD95", "hd_mm", "hd95_mm_1", "assd_mm", "asd", "masd", "seconds")],
        *[(name, False) for name in ("hausdorff_distance", "volume_error", "vi_split", "false_positives", "loss")],
    ],
)
def test_direction_of_a_metric_by_its_name(metric, higher):
    assert higher_is_better(metric) is higher


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.1, 0.2, 0.9]])
def test_distribution_has_one_point_per_value(values):
    svg = distribution_svg(values, "dice, n = 3").decode()
    points = re.search(r'<g id="PathCollection_1">.*?</g>\s*</g>', svg, re.DOTALL)
    assert points.group().count("<use ") == len(values)
