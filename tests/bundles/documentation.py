"""Read the blocks of the documentation pages, and the commands in these blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bundle_runs import ROOT

PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Args:
        language: that of the fence. An indented block has none: ``json`` if it starts with a brace, otherwise ``bash``.
        text: the lines.
        before: the paragraph, heading or block before it.
    """

    language: str
    text: str
    before: str


def read_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in order.

    Raises:
        ValueError: when a fence has no language.
    """
    blocks = []
    pattern = r"(?:^```(?P<language>\w*)\n(?P<fenced>.*?)^```$)|(?P<indented>(?<=\n\n) {4}\S.*?\n(?=\n*(?! {4})\S|\Z))"
    text = page.read_text()
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        if match["language"] == "":
            raise ValueError(f"{page.name}: a fence has no language: {match['fenced'][:60]!r}")
        content = match["fenced"] if match["language"] else re.sub("^    ", "", match["indented"], flags=re.MULTILINE)
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        language = match["language"] or ("json" if content.startswith("{") else "bash")
        blocks.append(Block(language, content, before))
    return blocks


def read_commands(blocks: list[Block]) -> Iterator[tuple[Block, str]]:
    """Yield the commands of a page, with the values of the variables that it sets."""
    variables: dict[str, str] = {}
    for block in blocks:
        if block.language not in ("bash", "sh", "console"):
            continue
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            command = re.sub(r"\s+#\s.*", "", line).strip()
            for name, value in variables.items():
                command = re.sub(rf"\${name}\b", lambda _, value=value: value, command)
            if assigned := re.fullmatch(r"(\w+)=(\"[^\"]*\"|[^\s$]*)", command):
                variables[assigned[1]] = shlex.split(assigned[2])[0]
            elif command and not command.startswith("#"):
                yield block, command
