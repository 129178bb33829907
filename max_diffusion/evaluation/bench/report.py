"""What :func:`bench` measured, as Markdown, charts and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from PIL import Image

from ...errors import RequestError
from ...files import prepared_folder, write_text
from ...images import save_atomically
from ..charts import bar_chart
from .models import Size
from .run import BenchResult
from .runtimes import OURS

RESULTS: Final = "results.json"
_BEGIN: Final = "<!-- benchmarks: written by scripts/bench -->"
_END: Final = "<!-- end of benchmarks -->"
# What the README shows of each size; the rest is in the folder's own table.
_SHOWN: Final = (
    "step",
    "step, taylorseer",
    "picture",
    "picture, taylorseer",
    "start to first picture, cold",
    "start to first picture, warm",
    "peak memory",
)
_NAMES: Final[Mapping[str, str]] = {
    "step": "step, uncached",
    "step, taylorseer": "step, forecast by TaylorSeer",
    "picture": "picture, uncached",
    "picture, taylorseer": "picture with TaylorSeer",
}
_CHARTS: Final = ("step", "picture", "picture, taylorseer")


def save_bench(result: BenchResult, folder: str | Path, command: str) -> list[Path]:
    """Writes ``results.json``, ``README.md`` with all figures, and charts.

    Args:
        result: Of :func:`bench`.
        folder: Made if it is missing; files of these names in it are replaced.
        command: What was run, for the reader.

    Returns:
        The files, the table first.

    Raises:
        RequestError: A file cannot be written.
    """
    path = prepared_folder(folder)
    data = {"command": command, **result.to_dict()}
    charts = {}
    for size in result.sizes:
        for name in _CHARTS:
            chart = _chart(data, size, name)
            if chart is not None:
                file = f"{size.name}-{name.replace(', ', '-')}.png"
                save_atomically(path / file, chart)
                charts[file] = f"{size.title}: {name}"
    write_text(path / RESULTS, json.dumps(data, indent=1) + "\n")
    write_text(path / "README.md", _page(data, charts))
    return [path / name for name in ("README.md", RESULTS, *charts)]


def update_readme(readme: Path, results: Path) -> None:
    """Writes the table between the README's two marks anew, from a results file.

    Raises:
        RequestError: A file cannot be read or written, or has no marks.
    """
    try:
        text = readme.read_text(encoding="utf-8")
        data = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise RequestError(f"bench: {readme} and {results}: {err}") from err
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise RequestError(f"bench: {readme} needs the lines {_BEGIN} and {_END}")
    write_text(readme, f"{before}{_BEGIN}\n{summary(data)}{_END}{after}")


def summary(data: Mapping[str, Any]) -> str:
    """The README's tables: the main figures, and which of them lose."""
    parts = []
    for size in data["sizes"]:
        for dtype in ("float32", "bfloat16"):
            measures = [
                found
                for name in _SHOWN
                for found in data["measures"]
                if (found["group"], found["name"]) == (size["name"], name)
            ]
            table = _table(measures, f" {dtype}")
            if table:
                parts.append(f"{size['title']}, {dtype}:\n\n{table}")
    lost = [_lost_words(m, data) for m in data["measures"] if _lost(m)]
    words = "; ".join(word for item in lost for word in item)
    parts.append(f"Where others are ahead: {words or 'nowhere'}.\n")
    parts.append(
        f"{_machine(data)}; medians of {data['rounds']} processes each, in turn, on "
        f"{data['date']}; versions, all caches and what could not be run are in "
        f"[benchmarks](benchmarks/README.md).\n"
    )
    return "\n".join(parts)


def _page(data: Mapping[str, Any], charts: Mapping[str, str]) -> str:
    lines = [
        "# Benchmarks",
        "",
        f"{data['date']}, `{data['command']}`, {data['seconds'] / 60:.0f} minutes. "
        f"{_machine(data)}, {data['machine']['system']}, "
        f"Python {data['machine']['python']}.",
        "",
        f"Less is better. Medians of {data['rounds']} processes each, one of the "
        "large model, in turn, with "
        "pauses between. **Bold** is best. A step is one of the loop, but not the "
        "first; with a cache, one that was not computed in full. A picture is all "
        "of it, text encoders and decoder included. All runtimes have the same prompt, "
        "steps and guidance, and TaylorSeer the same number of full steps.",
        "",
    ]
    titles = {size["name"]: size["title"] for size in data["sizes"]} | {
        "parts": "Parts, and whole processes"
    }
    for group, title in titles.items():
        measures = [m for m in data["measures"] if m["group"] == group]
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        for dtype in ("float32", "bfloat16"):
            table = _table(measures, f" {dtype}")
            if table:
                lines += [f"{dtype}:", "", table]
    lines += [f"![{words}]({name})\n" for name, words in charts.items()]
    lines += ["## Where others are ahead", ""]
    lost = [word for m in data["measures"] for word in _lost_words(m, data)]
    lines += [f"- {word}" for word in lost or ["nowhere"]]
    lines += ["", "## Not run", ""]
    not_run = [f"- {name}: {reason}" for name, reason in data["not_run"].items()]
    lines += not_run or ["Everything was run."]
    lines += ["", "## Versions", ""]
    for name, versions in data["versions"].items():
        words = ", ".join(f"{key} {value}" for key, value in versions.items())
        lines.append(f"- {name}: {words}")
    return "\n".join(lines) + "\n"


def _table(measures: Iterable[Mapping[str, Any]], ending: str) -> str:
    """Rows of measures, columns of runtimes whose names end so; empty without any."""
    rows = []
    names: list[str] = []
    for measure in measures:
        medians = {k: v for k, v in measure["medians"].items() if k.endswith(ending)}
        if medians:
            rows.append((measure, medians))
            names += [name for name in medians if name not in names]
    if not rows:
        return ""
    # Ours first, whoever was first in that round.
    names.sort(key=lambda name: not name.startswith(OURS))
    heads = ["", *(name.removesuffix(ending) for name in names)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for measure, medians in rows:
        best = min(medians.values()) if len(medians) > 1 else None
        name = _NAMES.get(measure["name"], measure["name"])
        cells = [f"{name}, {measure['unit']}"]
        for runtime in names:
            value = medians.get(runtime)
            text = "" if value is None else _figure(value)
            cells.append(f"**{text}**" if value is not None and value == best else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _machine(data: Mapping[str, Any]) -> str:
    found = data["machine"]
    return f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB"


def _figure(value: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _lost(measure: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Data type, who is ahead, and how many times, where ours is not best."""
    found = []
    for dtype in ("float32", "bfloat16"):
        medians = {
            name.removesuffix(f" {dtype}"): value
            for name, value in measure["medians"].items()
            if name.endswith(f" {dtype}")
        }
        ours = medians.pop(OURS, None)
        if ours is None or not medians:
            continue
        best = min(medians, key=lambda name: medians[name])
        if medians[best] < ours:
            found.append((dtype, best, ours / medians[best]))
    return found


def _lost_words(measure: Mapping[str, Any], data: Mapping[str, Any]) -> list[str]:
    titles = {size["name"]: size["title"].partition(",")[0] for size in data["sizes"]}
    where = titles.get(measure["group"], "")
    name = _NAMES.get(measure["name"], measure["name"])
    return [
        f"{where + ', ' if where else ''}{name}, {dtype}: {best} by {times:.2f} times"
        for dtype, best, times in _lost(measure)
    ]


def _chart(data: Mapping[str, Any], size: Size, name: str) -> Image.Image | None:
    for measure in data["measures"]:
        if (measure["group"], measure["name"]) == (size.name, name):
            ours = [key for key in measure["medians"] if key.startswith(OURS)]
            title = f"{size.title}: {_NAMES.get(name, name)}"
            return bar_chart(title, measure["medians"], measure["unit"], ours)
    return None
