from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from segbundles.report import case_slices, read_preview, share_of_page, write_preview, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def slices() -> dict:
    """A volume of four slices, the first black and the last white, with an object in the second and third."""
    image = np.broadcast_to(np.array([0.0, 1, 2, 3]), (24, 16, 4)).copy()
    classes = np.zeros(image.shape, np.uint8)
    classes[4:8, 4:8, 1], classes[4:12, 4:12, 2] = 1, 1
    return case_slices(image, {"outlines": classes})


def case(name: str, slices: dict | None = None, **more) -> dict:
    empty = {"reason": "", "review": "", "notes": "", "seconds": 1.5, "found": "", "measured": []}
    return {"name": name, "files": [name], **empty, "slices": slices, **more}


CASES = [
    case("good"),
    case("doubtful", review="low confidence"),
    case("</script><b>", reason="<i>damaged</i>"),
    case("other", notes="a & b", seconds=None, found="atrium: 3 ml", measured=[("atrium", "3 ml, in one part")]),
]


def texts(page: str, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, re.DOTALL)
    return [" ".join(html.unescape(re.sub("<[^>]+>", "", text)).split()) for text in found]


def test_failed_and_doubtful_images_come_first(tmp_path):
    path = write_preview(tmp_path / "n/p.html", title="A & B", cases=CASES, notes=["all <of them>"])
    page = path.read_text(encoding="utf-8")
    order = ["</script><b>", "doubtful", "good", "other"]
    assert texts(page, "h3") == order
    assert texts(page, "h1") == ["A & B"]
    assert texts(page, "p")[0] == "4 images: 1 failed, 1 please check, 2 ok"
    assert "all <of them>" in texts(page, "p")
    assert {"<i>damaged</i>", "low confidence"} <= set(texts(page, "strong"))
    cells = texts(page, "td")
    assert cells[:8] == ["failed", "<i>damaged</i>", "please check", "", "ok", "", "ok", "atrium: 3 ml"]
    assert cells[8:] == ["3 ml, in one part"]
    assert re.findall(r'href="#(case-\d)"', page) == re.findall(r'<article id="(case-\d)"', page)
    assert page.count("1.5 s</p>") == 3
    assert "<i>" not in page
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|@import|url\(", page)


def test_the_least_certain_come_first(tmp_path, slices):
    doubt = case_slices(np.arange(16.0).reshape(4, 4), {"uncertainty": np.eye(4, dtype=np.uint8)})
    cases = [
        case("sure", slices, confidence=0.95),
        case("unknown", confidence=None),
        case("unsure", doubt, confidence=0.4),
        case("flagged", review="x", confidence=0.9),
        case("flagged more", review="x", confidence=0.3),
        case("damaged", reason="y"),
    ]
    page = write_preview(tmp_path / "p.html", title="t", cases=cases).read_text(encoding="utf-8")
    assert texts(page, "h3") == ["damaged", "flagged more", "flagged", "unsure", "sure", "unknown"]
    assert "The least certain come first in each of these." in page
    boxes = re.findall(r'<input type="checkbox" autocomplete="off"( checked)?>.*?</svg> (\w+)', page)
    assert sorted(boxes) == [("", "uncertainty"), (" checked", "outlines")]
    for others in (CASES, cases[:1]):
        assert "least certain" not in write_preview(tmp_path / "q.html", title="t", cases=others).read_text()


def test_cases_can_be_read_back(tmp_path, slices):
    path = tmp_path / "p.html"
    assert read_preview(path) == []
    write_preview(path, title="t", cases=[*CASES, case("ü", slices)])
    back = {one["name"]: one for one in read_preview(path)}
    assert back["ü"] == {**case("ü", slices), "status": "ok"}
    assert back["other"]["measured"] == [["atrium", "3 ml, in one part"]]
    first = path.read_text(encoding="utf-8")
    write_preview(path, title="t", cases=list(back.values()))
    assert [one["name"] for one in read_preview(path)] == list(back)
    assert path.read_text(encoding="utf-8").count("\n") == first.count("\n")


@pytest.mark.parametrize(("count", "opened"), [(1, None), (12, True), (13, False)])
def test_overview_of_many_images_is_closed(tmp_path, count, opened):
    page = write_preview(tmp_path / "p.html", title="t", cases=[case(str(k)) for k in range(count)]).read_text()
    found = re.findall(r'<details id="overview"( open)?>', page)
    assert found == ([] if opened is None else [" open" if opened else ""])


def test_legend_names_several_classes(tmp_path):
    for classes, expected in (
        ({"0": "background", "1": "a"}, []),
        ({"0": "background", "1": "a", "2": "b <"}, ["a", "b <"]),
        (None, []),
    ):
        page = write_preview(tmp_path / "p.html", title="t", cases=[], classes=classes).read_text()
        assert texts(page, "li") == expected
    assert re.findall(r'stroke="(rgb[^"]+)"', page) == []


def browse(path: Path, script: str = "") -> str:
    """The page as chromium has it after a script ran; an error on it fails the test."""
    if script:
        page = path.read_text(encoding="utf-8")
        page = re.sub(r"<meta http-equiv=[^>]+>", "", page)  # which forbids every script but the page's own
        code = (
            f"<script>window.addEventListener('load', function () {{ setTimeout(function () {{ {script} }}, 1000); }});"
        )
        path = path.with_name("scripted.html")
        path.write_text(page.replace("</body>", f"{code}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    command = [CHROMIUM, *options, profile, "--window-size=1280,900", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    return done.stdout


def seen(page: str) -> tuple[list[str], list[str]]:
    """Slice numbers and the outlines that are drawn, rims left out."""
    drawn = re.findall(r'<path class="(?:solid|dashed|filled)" stroke="[^"]+"(?: style="[^"]+")? d="([^"]*)"', page)
    return texts(page, "output"), drawn


@needs_chromium
def test_slider_and_switches_in_a_browser(tmp_path, slices):
    path = write_preview(tmp_path / "p.html", title="t", cases=[case("a", slices), *CASES, case("b", slices)])
    paths = slices["overlays"][0]["classes"][0]["paths"]
    assert seen(browse(path)) == (["slice 3 of 4"] * 2, [paths["2"]] * 2)
    find = "var a = document.querySelectorAll('.viewer')[0], r = a.querySelector('input[type=range]');"
    grey = "document.title = a.querySelector('canvas').getContext('2d').getImageData(8, 8, 1, 1).data[0];"
    slide = find + "r.value = {}; r.dispatchEvent(new Event('input'));" + grey
    for number, outline, shade in ((1, "", 0), (2, paths["1"], 85), (4, "", 255)):
        for _ in range(4):  # chromium's virtual time does not wait until it has decoded the picture
            page = browse(path, slide.format(number))
            if abs(int(texts(page, "title")[0]) - shade) < 4:
                break
        assert seen(page) == ([f"slice {number} of 4", "slice 3 of 4"], [outline, paths["2"]])
        assert f'aria-valuetext="slice {number} of 4"' in page
        assert abs(int(texts(page, "title")[0]) - shade) < 4
    page = browse(path, find + "a.querySelector('input[type=checkbox]').click();")
    assert seen(page) == (["slice 3 of 4"] * 2, ["", paths["2"]])
    turn = (
        "var p = a.querySelector('.picture');"
        "function wheel(by) { p.dispatchEvent(new WheelEvent('wheel', { deltaY: by, cancelable: true })); }"
        "wheel(-100); document.title = r.value;"  # the mouse rests: the page scrolls
        "p.dispatchEvent(new PointerEvent('pointermove', { movementX: 1 })); wheel(-100); wheel(-15); wheel(-30);"
    )
    page = browse(path, find + turn)
    assert (texts(page, "title"), seen(page)[0][0]) == (["3"], "slice 1 of 4")


@needs_chromium
def test_slider_of_the_report_in_a_browser(tmp_path):
    classes = np.zeros((24, 16, 4), np.uint8)
    classes[4:8, 4:8, 1] = 1
    shown = case_slices(np.random.default_rng(0).random((24, 16, 4)), {"truth": classes, "prediction": classes * 2})
    rows = [{"case": "<a>", "dice": 0.5}]
    path = write_report(
        tmp_path / "r.html",
        title="t",
        rows=rows,
        summary={"dice": {}},
        figures={"<a>": picture()},
        slices={"<a>": shown},
    )
    truth, prediction = (overlay["classes"][0]["paths"]["1"] for overlay in shown["overlays"])
    page = browse(path, "document.querySelector('summary').click();")
    assert seen(page) == (["slice 2 of 4"], [truth, prediction])
    assert "All 4 slices" in texts(page, "summary")


def picture() -> bytes:
    from segbundles.report import case_figure

    return case_figure(np.zeros((9, 9)), None, None)


@pytest.mark.slow
@needs_chromium
def test_a_page_of_200_images_opens(tmp_path):
    image = np.random.default_rng(0).random((64, 64, 50), np.float32)
    shown = case_slices(image, {"outlines": image > 0.9}, most_bytes=share_of_page(24_000_000, 200, 1_000_000))
    path = write_preview(tmp_path / "p.html", title="t", cases=[case(f"{k:03d}", shown) for k in range(200)])
    assert 15e6 < path.stat().st_size < 30e6
    page = browse(path)
    numbers, drawn = seen(page)
    assert len(numbers) == 200
    assert all(drawn[:2])
    assert json.loads(re.findall(r'class="case">(.*)</script>', page)[199])["name"] == "199"
