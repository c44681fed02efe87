"""Read a JSON file; what is wrong with its text is said in words, with its line and column."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from segbundles.errors import fail

__all__ = ["TextFault", "parse_json", "read_json"]

_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_TYPOGRAPHIC = "\u201c\u201d\u201e\u201f\u2018\u2019\u201a\u201b\u00ab\u00bb"
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_TEXT = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_TOKEN = re.compile(_TEXT.pattern + r"|[{}\[\]:]")
_NUMBER_WITH_COMMA = re.compile(r"-?\d+,\d+")


class TextFault(NamedTuple):
    """What is wrong with the text of a file.

    Args:
        line: from 1.
        column: from 1.
        problem: what is wrong.
        repair: what to do.
    """

    line: int
    column: int
    problem: str
    repair: str

    @property
    def place(self) -> str:
        """Say where it is."""
        return f"line {self.line}, column {self.column}"


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Args:
        path: file in UTF-8.

    Raises:
        ValueError: when the file cannot be read, is not valid JSON, or has a name twice in one object.
    """
    try:
        tree, found = parse_json(path)
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror or error}): give a file of JSON.")
    if found:
        fault = found[0]
        fail(f"{Path(path).name}, {fault.place}: {fault.problem}: {fault.repair}.")
    return tree


def parse_json(path: str | Path) -> tuple[Any, list[TextFault]]:
    """Return the content of a JSON file and what is wrong with its text; the content is None if it is not valid JSON.

    Args:
        path: file in UTF-8.

    Raises:
        OSError: when the file cannot be read.
    """
    data = Path(path).read_bytes()
    text, fault = _decoded(data)
    if fault is not None:
        return None, [fault]
    if not text.strip():
        return None, [TextFault(1, 1, "the file is empty", "write { and } around its entries, or restore it")]
    try:
        return json.loads(text), list(_duplicates(text))
    except json.JSONDecodeError as error:
        return None, [_explained(text, error)]
    except RecursionError:
        return None, [TextFault(1, 1, "brackets are nested too deeply", "restore the file")]


def _decoded(data: bytes) -> tuple[str, TextFault | None]:
    save = "save it as UTF-8 without byte-order mark (in the editor: Save as, Encoding)"
    encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), None)
    if encoding is None and b"\x00" in data[:4]:
        encoding = "UTF-16"
    if encoding is not None:
        return "", TextFault(1, 1, f"the file is written in {encoding}", save)
    if data.startswith(codecs.BOM_UTF8):
        return "", TextFault(1, 1, "the file begins with an invisible byte-order mark", save)
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        return "", TextFault(line, column, "the character here is not written in UTF-8", "save the file as UTF-8")


def _fault(text: str, position: int, problem: str, repair: str) -> TextFault:
    line = text.count("\n", 0, position) + 1
    return TextFault(line, position - text.rfind("\n", 0, position), problem, repair)


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    for match in _TOKEN.finditer(text):
        yield match.start(), match[0]


def _duplicates(text: str) -> Iterator[TextFault]:
    """Find names that are twice in one object of valid JSON; the parser itself says nothing about them."""
    stack: list[dict[str, int]] = []
    last = (0, "")
    for position, token in _tokens(text):
        if token in "{[":
            stack.append({})
        elif token in "}]":
            stack.pop()
        elif token == ":":
            name = json.loads(last[1])
            if name in stack[-1]:
                first = text.count("\n", 0, stack[-1][name]) + 1
                yield _fault(text, last[0], f"{name!r} is already in line {first}", "remove one of the two lines")
            stack[-1].setdefault(name, last[0])
        last = position, token


def _explained(text: str, error: json.JSONDecodeError) -> TextFault:
    """Say in words what the parser found."""
    at, kind = error.pos, error.msg
    if "control character" in kind or "Unterminated string" in kind:
        return _open_text(text, at)
    at += len(text[at:]) - len(text[at:].lstrip())
    here, rest, before = text[at : at + 1], text[at:], text[:at].rstrip()
    start = text.rfind("\n", 0, at) + 1
    number = next((it for it in _NUMBER_WITH_COMMA.finditer(text, start) if it.start() <= at < it.end()), None)
    word = re.match(r"[A-Za-z_][\w.-]*", rest)
    plain = re.match(r"([+-]?)(\.?)(\d[\d.]*)", rest)
    if "escape" in kind:
        return _fault(text, at, r"\ has a meaning of its own in JSON", r"write / or \\ in paths")
    if here and here in _TYPOGRAPHIC:
        return _typographic(text, at)
    if number:
        problem = f"{number[0]} is not a number, JSON has a decimal point"
        return _fault(text, number.start(), problem, f"write {number[0].replace(',', '.')}")
    if rest.startswith(("//", "/*", "#")):
        problem = f"JSON has no comments such as {rest[:2] if here == '/' else '#'}"
        return _fault(text, at, problem, 'remove it, or make it an entry of its own, "_desc_": "..."')
    if here == "'":
        return _fault(text, at, "text is in double quotes in JSON", "write \" instead of '")
    if here in ("}", "]") and before.endswith(","):
        return _trailing(text, len(before) - 1)
    if here == "," and text[at + 1 :].lstrip()[:1] in ("}", "]"):
        return _trailing(text, at)
    if here == "" or (here in ("}", "]") and "delimiter" in kind):
        return _unclosed(text, at)
    if kind == "Extra data":
        problem = "the first { or [ is already closed before this"
        return _fault(text, at, problem, "write the { or [ that is missing above, or remove what is too much")
    if word and word[0] in _PYTHON:
        return _fault(text, at, f"{word[0]} is Python, not JSON", f"write {_PYTHON[word[0]]}")
    if "',' delimiter" in kind:
        return _no_comma(text, at, before)
    if "':' delimiter" in kind:
        return _fault(text, at, "a colon or a quote is missing before this", 'write entries as "name": value')
    if word:
        shown = word[0] + ('"' if rest[len(word[0]) :].lstrip()[:1] == '"' else "")
        return _fault(text, at, f"{shown} is not in double quotes", f'write "{word[0]}"')
    if "property name" in kind and here in ("{", "["):
        return _unclosed(text, at)
    if "property name" in kind:
        problem = f"{rest.split()[0].rstrip(',')} is not the name of an entry"
        return _fault(text, at, problem, 'write entries as "name": value, and lists as [1, 2, 3]')
    if plain and (plain[2] or plain[1] == "+"):
        sign = plain[1].replace("+", "")
        return _fault(text, at, f"{plain[0]} is not a number in JSON", f"write {sign}{'0.' * bool(plain[2])}{plain[3]}")
    return _fault(text, at, f"a value is missing before this {here}", "write it")


def _open_text(text: str, at: int) -> TextFault:
    """Name the text whose closing quote is missing."""
    opening = text.rfind("\n", 0, at) + 1
    for whole in _TEXT.finditer(text, opening, at):
        opening = whole.end()
    opening = text.find('"', opening)
    shown = text[opening:].partition("\n")[0]
    wrong = [n for n, letter in enumerate(shown) if letter in _TYPOGRAPHIC]
    if wrong:
        return _typographic(text, opening + wrong[0])
    return _fault(text, opening, f"the text {shown.rstrip()[:40]} has no closing quote", 'write " at its end')


def _no_comma(text: str, at: int, before: str) -> TextFault:
    """Explain an entry that is followed by something else than a comma."""
    rest = text[at:]
    if rest[0] == ":":
        if text[_opened(text, at)[-1]] == "[":
            return _unclosed(text, at)
        return _fault(text, at, "a { or a comma is missing before this entry", "write it")
    follows = rest[0] in '"{[' or re.match(r"true|false|null", rest) or (rest[0] in "-0123456789" and len(before) < at)
    if follows:
        return _fault(text, len(before), "a comma is missing between this entry and the next", "write it here")
    value = re.split(r"[\s,:{\[]", text[:at].rstrip())[-1] + text[len(before) : at] + re.split(r"[\s,}\]]", rest)[0]
    return _fault(text, at, f"{value} is not a value in JSON", "write a number such as 0.5, or text in double quotes")


def _typographic(text: str, at: int) -> TextFault:
    problem = f"{text[at]} is a typographic quotation mark, which JSON does not know"
    return _fault(text, at, problem, 'write " (in a plain text editor, not in a word processor)')


def _trailing(text: str, comma: int) -> TextFault:
    return _fault(text, comma, "there is a comma after the last entry", "remove it")


def _opened(text: str, at: int) -> list[int]:
    """Return the positions of the brackets that are open at a position."""
    stack: list[int] = []
    for position, token in _tokens(text[:at]):
        if token in "{[":
            stack.append(position)
        elif token in "}]" and stack:
            stack.pop()
    return stack or [0]


def _unclosed(text: str, at: int) -> TextFault:
    """Name the bracket that is not closed: the first whose end is indented differently from its beginning."""
    stack: list[int] = []
    for position, token in _tokens(text[: at + 1]):
        if token in "{[" and position < at:
            stack.append(position)
        elif token in "}]" and stack:
            last = stack.pop()
            first_in_line = not text[text.rfind("\n", 0, position) + 1 : position].strip()
            other = text[last] + token not in ("{}", "[]")
            if other or (first_in_line and _indent(text, last) != _indent(text, position)):
                stack = [last]
                break
    opening = stack[-1] if stack else 0
    closing = "]" if text[opening : opening + 1] == "[" else "}"
    return _fault(text, opening, f"the {text[opening]} here is not closed", f"write {closing} after its last entry")


def _indent(text: str, position: int) -> int:
    line = text[text.rfind("\n", 0, position) + 1 :]
    return len(line) - len(line.lstrip(" \t"))
