"""What a class is called, coded and coloured in the formats that contain this: DICOM SEG and 3D Slicer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segbundles.errors import fail

__all__ = ["PREDICTION_COLOURS", "SEGMENTATION", "Code", "Segment", "segments_of"]

#: end of the name of a segmentation of 3D Slicer
SEGMENTATION = ".seg.nrrd"
#: RGB of class 1, 2, ... of a prediction; they repeat
PREDICTION_COLOURS = ((230, 159, 0), (204, 121, 167), (213, 94, 0), (238, 51, 119), (255, 170, 187))

#: value, coding scheme and meaning, such as ``("82471001", "SCT", "Left atrium")``
Code = tuple[str, str, str]

_TISSUE: Code = ("85756007", "SCT", "Tissue")
_PARTS = ("category", "type", "region")


@dataclass(frozen=True)
class Segment:
    """A class of a mask.

    Args:
        index: its value in the mask, 1 or more.
        name: its name.
        category: code of the kind of thing that it is.
        type: code of the thing.
        region: code of the part of the body that it is in, or None.
    """

    index: int
    name: str
    category: Code = _TISSUE
    type: Code = _TISSUE
    region: Code | None = None

    @property
    def colour(self) -> tuple[int, int, int]:
        """Colour, RGB of 0 to 255."""
        return PREDICTION_COLOURS[(self.index - 1) % len(PREDICTION_COLOURS)]


def segments_of(
    classes: Mapping[Any, str], codes: Mapping[Any, Mapping[str, Sequence[str]]] | None = None
) -> list[Segment]:
    """Return the classes of a mask, sorted by their index.

    Args:
        classes: name of each class by its index, which may be text, as in JSON. The background (0) is left out.
        codes: for some classes the codes (value, coding scheme, meaning) of their ``category``, ``type`` and, if it
            matters, ``region``. Other classes are coded as tissue.

    Raises:
        ValueError: when there is no class besides the background, an index is not a number from 0 to 255, or codes are
            incomplete or belong to no class.
    """
    names = {_index(key): str(name) for key, name in classes.items()}
    coded = {_index(key): value for key, value in (codes or {}).items()}
    if not set(names) - {0}:
        fail(f"classes must name at least one class besides 0, the background, got {dict(classes)}.")
    if unknown := set(coded) - set(names):
        fail(f"codes has class {min(unknown)}, but classes only has {sorted(names)}: name it there too.")
    return [Segment(index, names[index], **_codes(index, coded.get(index, {}))) for index in sorted(set(names) - {0})]


def _index(key: Any) -> int:
    text = str(key)
    if not text.isdecimal() or int(text) > 255:
        fail(f"a class must be a number from 0 to 255, got {key!r}.")
    return int(text)


def _codes(index: int, parts: Mapping[str, Sequence[str]]) -> dict[str, Code]:
    if parts and not {"category", "type"} <= set(parts) <= set(_PARTS):
        fail(f"codes of class {index} must have category and type, and may have region, got {', '.join(parts)}.")
    for part, code in parts.items():
        if isinstance(code, str) or len(code) != 3 or not all(isinstance(text, str) and text for text in code):
            fail(f"the {part} of class {index} must be a value, a coding scheme and a meaning, got {code!r}.")
    return {part: (code[0], code[1], code[2]) for part, code in parts.items()}
