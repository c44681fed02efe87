"""Finding the files of cases in a publisher's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from .datalist import Case, Fault
from .splits import natural


def files_by_name(
    paths: Iterable[Path],
    name_of: Callable[[Path], str | None],
    faults: list[Fault],
    group: str | None = None,
) -> dict[str, Path]:
    """Return files by the name of their case; hidden files, such as the ``._*`` twins of archives, are skipped.

    Args:
        paths: what is in a folder.
        name_of: the case that a file belongs to, or None for a file that belongs to none.
        faults: a second file of one name is added here.
        group: group of all these cases; None is a group for each.
    """
    found: dict[str, Path] = {}
    for path in sorted(paths):
        if path.name.startswith(".") or not path.is_file() or (name := name_of(path)) is None:
            continue
        if (first := found.setdefault(name, path)) != path:
            faults.append(Fault(name, path, f"is a second file of {name}, next to {first.name}", group))
    return found


def pair(
    images: Mapping[str, Path],
    labels: Mapping[str, Path],
    places: tuple[str, str],
    faults: list[Fault],
    what: str = "label",
    group_of: Callable[[str], str | None] = str,
    ungrouped: str = "",
    split: str | None = None,
) -> list[Case]:
    """Pair images and labels of one name.

    Args:
        images: image of each case.
        labels: label of each case.
        places: where images and labels are expected, for messages.
        faults: images without a label, labels without an image and cases without a group are added here.
        what: what a label is called.
        group_of: the group of a case, or None when it is not known.
        ungrouped: what is wrong with a case without a group.
        split: the split that the publisher's layout fixes.

    Returns:
        The cases.
    """
    cases = []
    for name in sorted({*images, *labels}, key=natural):
        group = group_of(name)
        if name not in labels:
            faults.append(Fault(name, images[name], f"has no {what}: {places[1]} contains none for it", group))
        elif name not in images:
            faults.append(Fault(name, labels[name], f"has no image: {places[0]} contains none for it", group))
        elif group is None:
            faults.append(Fault(name, images[name], ungrouped))
        else:
            cases.append(Case(name, images[name], labels[name], group, split))
    return cases
