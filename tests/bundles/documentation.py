"""The pages for people as a test sees them: their blocks, and the commands in these."""

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
    """Lines that stand apart on a page.

    Args:
        language: of the fence; ``bash`` where lines are indented instead, or ``json`` if they begin with a brace.
        text: the lines.
        before: the paragraph, heading or block ahead of it, as it stands on the page.
    """

    language: str
    text: str
    before: str


def read_blocks(page: Path) -> list[Block]:
    """Blocks of a page, in order.

    Raises:
        ValueError: when a fence does not say what is in it.
    """
    blocks = []
    pattern = r"(?:^```(?P<language>\w*)\n(?P<fenced>.*?)^```$)|(?P<indented>(?<=\n\n) {4}\S.*?\n(?=\n*(?! {4})\S|\Z))"
    text = page.read_text()
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        if match["language"] == "":
            raise ValueError(f"{page.name}: a fence lacks its language: {match['fenced'][:60]!r}")
        content = match["fenced"] if match["language"] else re.sub("^    ", "", match["indented"], flags=re.MULTILINE)
        before = text[: match.start()].rstrip().rpartition("\n\n")[2]
        language = match["language"] or ("json" if content.startswith("{") else "bash")
        blocks.append(Block(language, content, before))
    return blocks


def read_commands(blocks: list[Block]) -> Iterator[tuple[Block, str]]:
    """Commands of a page, with the values of the variables that it sets."""
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
