"""What the files of the project import, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("graphs", "max_diffusion")
    for path in ROOT.glob(f"{folder}/**/*.py")
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path, *, when_typing: bool = False) -> Iterator[str]:
    """Absolute names of all modules a file imports, inside functions too."""
    parts = list(path.relative_to(ROOT).parent.parts)
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import x": x may be a module.
            yield from (
                [f"{module}.{a.name}" for a in node.names]
                if node.module is None
                else [module]
            )
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.body if when_typing else node.orelse
            continue
        pending += ast.iter_child_nodes(node)


def is_in(name: str, *packages: str) -> bool:
    return any(name == item or name.startswith(item + ".") for item in packages)
