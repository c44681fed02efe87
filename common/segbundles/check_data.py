"""What can be wrong in the data of a run: every case is read and checked as the run does first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from segbundles.check_rules import Config, kind_of
from segbundles.errors import innermost

__all__ = ["CaseCheck", "Track"]

Track = Callable[[Sequence], Iterable]
# cases of a config, and the transforms that they pass first
_CHAINS = (
    (("train::patients", "train_cases"), ("train::deterministic_transforms",)),
    (
        ("validate::patients", "validation_cases"),
        ("validate::deterministic_transforms", "train::deterministic_transforms"),
    ),
    (("cases",), ("preprocessing::transforms",)),
)


class CaseCheck:
    """Pass cases through the first transforms of their run, and collect what is wrong with them.

    The transforms that are run are those up to the last one that checks images or converts labels.

    Args:
        config: combination of configs without faults, with the ``dataset_dir`` to check.
    """

    def __init__(self, config: Config) -> None:
        self.root = Path(str(config.value("dataset_dir"))).resolve()
        self.num_classes = config.value("num_classes") if "train_cases" in config.reached("run") else None
        self.cases: list[tuple[str, dict[str, Any]]] = []
        self.transforms: dict[str, list[Callable]] = {}
        self.looked_at: list[str] = []
        self.labels: set[float] = set()
        self.faults: list[tuple] = []
        parser, reached = config.parsed(), config.reached("run")
        for ids, places in _CHAINS:
            id = next((id for id in ids if id in reached), None)
            place = next((place for place in places if isinstance(config.items.get(place), list)), None)
            if id is None or place is None:
                continue
            try:
                cases = parser.get_parsed_content(id)
                split = getattr(getattr(cases, "source", cases), "split", "images")
                self.transforms[split] = list(_first_transforms(config, parser, place))
                self.cases += [(split, case) for case in cases]
            except Exception as error:
                self.faults.append((id, *_problem(error)))
                continue
            groups = {str(case["group"]) for case in cases if "group" in case}
            count = _counted(len(cases), "image" if split == "images" else "case")
            named = count if split == "images" else f"{split}: {count}"
            self.looked_at.append(named + (f" in {_counted(len(groups), 'group')}" if groups else ""))

    def check(self, item: tuple[str, dict[str, Any]]) -> None:
        """Read one case and check it.

        Args:
            item: one of ``cases``, its split and its files.
        """
        split, case = item
        data: Any = dict(case)
        try:
            for transform in self.transforms[split]:
                data = transform(data)
        except Exception as error:
            self.faults.append((self._name(case), *_problem(error)))
            return
        if "label" in data:
            self.labels |= set(torch.unique(torch.as_tensor(data["label"])).tolist())

    def _name(self, case: dict[str, Any]) -> str:
        image = case.get("image")
        path = Path(str(image[0] if isinstance(image, list | tuple) and image else image))
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def conclude(self) -> Iterator[tuple]:
        """Yield what was found: id, problem, repair, and False for a warning."""
        yield from self.faults
        if self.faults or not isinstance(self.num_classes, int) or not self.labels:
            return
        absent = [str(n) for n in range(1, self.num_classes) if n not in self.labels]
        if absent:
            repair = "correct num_classes, or add cases that have it"
            yield "num_classes", f"no label has the class {', '.join(absent)}", repair, False

    def summary(self) -> str:
        """Say what was looked at, as in ``training: 23 cases in 4 groups; labels 0, 1``."""
        labels = f"labels {', '.join(f'{value:g}' for value in sorted(self.labels))}"
        return "; ".join([*self.looked_at, labels] if self.labels else self.looked_at)


def _first_transforms(config: Config, parser: ConfigParser, place: str) -> Iterator[Callable]:
    """Make the transforms of a list, up to the last one that checks images or converts labels."""
    kinds = [kind_of(node) if isinstance(node, dict) else "" for node in config.items[place]]
    last = max((n for n, kind in enumerate(kinds) if kind.startswith("Check") or kind.endswith("ToClassd")), default=-1)
    for number in range(last + 1):
        if (transform := parser.get_parsed_content(f"{place}::{number}")) is not None:
            yield transform


def _problem(error: Exception) -> tuple[str, str]:
    """Return what is wrong, and what to do."""
    problem, colon, repair = innermost(error).splitlines()[0].rpartition(": ")
    return (problem, repair) if colon else (repair, "correct the file, or leave it out")


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
