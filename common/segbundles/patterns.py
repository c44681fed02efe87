"""Patterns of file names whose wildcards say which files belong together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from segbundles.errors import fail
from segbundles.files import shown

__all__ = ["Pattern", "case_name", "join", "split_list"]

_WILDCARD = re.compile(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\]|\{[^{}]*\})")
_MEANING = {"**/": "((?:[^/]+/)*)", "**": "(.*)", "*": "([^/]*)", "?": "[^/]"}


class Pattern:
    """A pattern of paths, in upper or lower case.

    ``*`` stands for any text without ``/``, ``**/`` for any folders, ``?`` for one character, and ``[ab]`` for one of
    several. A name in braces stands for a text without ``/`` too, as much as possible.

    Args:
        text: the pattern, of a whole path or of its end.
        names: names in braces that are allowed.
        anywhere: whether the pattern may begin in any folder.

    Raises:
        ValueError: when there is another name in braces.
    """

    def __init__(self, text: str, names: Iterable[str] = ("case",), anywhere: bool = False) -> None:
        self.text = text
        self._names = tuple(names)
        parts = _WILDCARD.split(text.strip())
        self._regex = re.compile(
            ("((?:[^/]+/)*)" if anywhere else "") + "".join(map(self._meaning, parts)), re.IGNORECASE | re.DOTALL
        )
        self._anywhere = anywhere

    def _meaning(self, part: str) -> str:
        if part in _MEANING:
            return _MEANING[part]
        if part[:1] == "{":
            name = part[1:-1]
            if name not in self._names or self.text.count(part) > 1:
                allowed = ", ".join(f"{{{known}}}" for known in self._names)
                fail(f"the pattern {self.text!r} contains {part}: it may contain {allowed}, once.")
            return f"(?P<{name}>[^/]+)"
        if part[:1] == "[" and part[-1:] == "]":
            return f"[{part[1:-1].replace('!', '^', 1) if part[1] == '!' else part[1:-1]}]"
        return re.escape(part)

    def key(self, path: str) -> tuple[str, ...] | None:
        """Return what the wildcards stand for, which is the same for all files of a case; None without a match.

        With ``{case}`` in the pattern that text alone is the key, after the folder of a pattern that may begin in any.

        Args:
            path: relative path, with ``/`` between folders.
        """
        found = self._regex.fullmatch(path)
        if found is None:
            return None
        if "case" not in self._regex.groupindex:
            return found.groups()
        return (*(found.groups()[:1] if self._anywhere else ()), found["case"])

    def named(self, path: str, name: str) -> str | None:
        """Return what a name in braces stands for; None without a match."""
        found = self._regex.fullmatch(path)
        return found and found[name]


def join(
    patterns: Sequence[Pattern], paths: Mapping[str, Path]
) -> tuple[dict[tuple[str, ...], list[Path | None]], list[Path]]:
    """Join the files of each case.

    Args:
        patterns: one per file of a case.
        paths: files by their relative paths, with ``/`` between folders.

    Returns:
        By key, the file of each pattern, or None where it is missing; and the files that no pattern matches.

    Raises:
        ValueError: when a file matches several patterns, or several files of a case match one.
    """
    cases: dict[tuple[str, ...], list[Path | None]] = {}
    names: dict[Path, str] = {path: name for name, path in paths.items()}
    others = []
    for name, path in paths.items():
        keys = {number: key for number, one in enumerate(patterns) if (key := one.key(name)) is not None}
        if len(keys) > 1:
            fail(
                f"{shown(name)} matches {' and '.join(patterns[number].text for number in keys)}: make the patterns "
                "more exact, so that each file matches one."
            )
        for number, key in keys.items():
            files = cases.setdefault(key, [None] * len(patterns))
            if files[number] is not None:
                fail(
                    f"{shown(names[files[number]])} and {shown(name)} match {patterns[number].text} and are of one "
                    "case: make the pattern more exact, or mark with {case} the part of the path that names the case."
                )
            files[number] = path
        if not keys:
            others.append(path)
    return cases, others


def case_name(key: Iterable[str]) -> str:
    """Return a name made of what the wildcards stand for: ``("p1", "p1_t")`` gives ``p1/p1_t``."""
    parts = [part.strip("/").rstrip("_-. ") for part in key]
    parts = [part for part in parts if part]
    return "/".join(part for number, part in enumerate(parts) if number == 0 or part != parts[number - 1])


def split_list(text: str | Iterable[str] | None) -> list[str]:
    """Return the items of a list, or of a text that separates them by commas."""
    if isinstance(text, str):
        text = text.split(",")
    return [item.strip() for item in text or () if item.strip()]
