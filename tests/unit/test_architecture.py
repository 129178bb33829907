"""The picture in docs/architecture.md is what the imports say."""

from __future__ import annotations

import re

from import_walker import FILES, ROOT, imported, is_in, name_of

Edge = tuple[str, str]


def package_of(name: str) -> str | None:
    """The part of the project that a module is in; None for what has no part."""
    parts = name.split(".")
    if is_in(name, "graphs"):
        return "graphs"
    if not is_in(name, "max_diffusion") or len(parts) < 2:
        return None
    return None if parts[1] in ("__init__", "__version__") else parts[1]


def edges_of_imports() -> set[Edge]:
    found = set()
    for path in FILES:
        importer = package_of(name_of(path))
        for name in imported(path):
            part = package_of(name)
            if importer and part and importer != part:
                found.add((importer, part))
    return found


def reachable(start: str, edges: set[Edge]) -> set[str]:
    seen: set[str] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        new = {target for source, target in edges if source == node} - seen
        seen |= new
        pending += new
    return seen


def reduction(edges: set[Edge]) -> set[Edge]:
    """The fewest arrows that reach what ``edges`` reach; ``edges`` has no cycle."""
    return {edge for edge in edges if edge[1] not in reachable(edge[0], edges - {edge})}


def test_reduction_leaves_out_what_a_longer_way_says() -> None:
    edges = {("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")}
    assert reduction(edges) == {("a", "b"), ("b", "c"), ("a", "d")}


def test_imports_have_no_cycle() -> None:
    edges = edges_of_imports()
    assert [node for node, _ in sorted(edges) if node in reachable(node, edges)] == []


def test_the_picture_shows_the_imports() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)
    shown = re.findall(r"^ +(\w+) --> (\w+)$", picture, re.MULTILINE)
    assert len(shown) == len(set(shown)) == len(picture.splitlines()) - 1
    assert set(shown) == reduction(edges_of_imports())
