"""What README.md and docs/architecture.md say of the code: names of classes, imports of packages."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "common" / "segbundles"
README = (ROOT / "README.md").read_text(encoding="utf-8")
# what every part of the library may import
COMMON = {"errors", "meta", "files", "distributed"}


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the table whose heading starts with this."""
    lines = text[text.index(heading) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_names_of_the_packages_exist() -> None:
    table = rows(README, "| package | what is in it |")
    assert len(table) > 5
    for packages, parts in table:
        modules = [import_module(f"segbundles.{package}") for package in names(packages)]
        assert [name for name in names(parts) if not any(hasattr(module, name) for module in modules)] == []


def imported(path: Path) -> set[str]:
    """Parts of the library that a file imports, other than for its types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {child for node in typing for child in ast.walk(node)}
    modules = []
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules += [node.module] if node.module != "segbundles" else [f"segbundles.{n.name}" for n in node.names]
        elif isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
    parts = {module.split(".")[1] for module in modules if module.startswith("segbundles.")}
    return {part for part in parts if (LIBRARY / part).is_dir() or (LIBRARY / f"{part}.py").is_file()}


def test_parts_import_what_the_architecture_says() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    allowed = {names(part)[0]: set(names(uses)) for part, _, uses in rows(text, "| part | what is in it |")}
    found: dict[str, set[str]] = {}
    for path in LIBRARY.rglob("*.py"):
        part = path.relative_to(LIBRARY).parts[0].removesuffix(".py")
        if not part.startswith("__"):
            found.setdefault(part, set()).update(imported(path) - COMMON - {part})
    assert found.keys() == allowed.keys()
    assert {part: more for part, uses in found.items() if (more := uses - allowed[part])} == {}
