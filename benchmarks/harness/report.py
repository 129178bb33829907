"""What :func:`bench` measured, as Markdown, charts and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

from max_diffusion.core.files import check_folder, prepared_folder, write_text
from max_diffusion.errors import RequestError
from max_diffusion.evaluation.charts import bar_chart, written
from max_diffusion.media.images import save_atomically

from .measures import BenchResult
from .runtimes import NOT_ASKED, OURS

RESULTS: Final = "results.json"
_BEGIN: Final = "<!-- benchmarks: written by scripts/bench -->"
_END: Final = "<!-- end of benchmarks -->"
# What the README shows of each size; the rest is in the folder's own table.
_SHOWN: Final = (
    "step",
    "step, taylorseer",
    "picture",
    "picture, taylorseer",
    "start to first picture, warm",
    "peak memory",
)
_NAMES: Final[Mapping[str, str]] = {
    "step": "step, uncached",
    "step, taylorseer": "step, forecast by TaylorSeer",
    "picture": "picture, uncached",
    "picture, taylorseer": "picture with TaylorSeer",
}
_TITLES: Final[Mapping[str, str]] = {
    "start": "demo model, from the shell to a PNG",
    "cold": "demo model, nothing compiled before: one process each",
    "parts": "parts",
}
# What is no runtime, but the least that a figure could be.
_BOUNDS: Final = ("its front alone", "memory copy")
_DTYPES: Final = ("float32", "bfloat16")
_TIE: Final = 1.01  # times as long, that is not told from as long
_CHARTS: Final = ("step", "picture", "picture, taylorseer")


def save_bench(result: BenchResult, folder: str | Path) -> list[Path]:
    """Writes ``results.json``, ``README.md`` with all figures, and charts.

    Args:
        result: What :func:`bench` returned.
        folder: Made if it is missing. Figures of groups that were not measured now
            stay, with their own date and machine; those of the same groups go.

    Returns:
        The paths of all files written, the table's first.

    Raises:
        RequestError: A file cannot be written, or is none of ours.
    """
    path = prepared_folder(folder)
    # The newest first: of several machines it is the one that is asked about.
    data = {"runs": [result.to_dict(), *_others(path / RESULTS, result.groups)]}
    charts = {}
    for run in data["runs"]:
        for size in run["sizes"]:
            for name in _CHARTS:
                chart = _chart(run, size, name)
                if chart is not None:
                    file = f"{size['name']}-{name.replace(', ', '-')}.png"
                    save_atomically(path / file, chart)
                    charts[file] = f"{size['title']}: {name}"
    write_text(path / RESULTS, json.dumps(data, indent=1) + "\n")
    write_text(path / "README.md", _page(data, charts))
    return [path / name for name in ("README.md", RESULTS, *charts)]


def _others(path: Path, groups: Sequence[str]) -> list[dict[str, Any]]:
    """Earlier runs, as far as they are of other groups."""
    if not path.is_file():
        return []
    runs = _read(path)["runs"]
    for run in runs:
        run["groups"] = [name for name in run["groups"] if name not in groups]
        run["sizes"] = [s for s in run["sizes"] if s["name"] in run["groups"]]
        run["measures"] = [m for m in run["measures"] if m["group"] in run["groups"]]
        for key in ("not_run", "versions"):
            run[key] = {k: v for k, v in run[key].items() if k in run["groups"]}
    return [run for run in runs if run["groups"]]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise RequestError(f"bench: {path} cannot be read ({err.strerror})") from err
    except ValueError as err:
        raise RequestError(
            f"bench: {path} is no JSON ({err}); choose another folder"
        ) from err
    keys = {"groups", "sizes", "measures", "not_run", "versions"}
    runs = found.get("runs") if isinstance(found, dict) else None
    if not isinstance(runs, list) or not all(keys <= {*run} for run in runs):
        raise RequestError(f"bench: {path} holds no results; choose another folder")
    return found


def check_targets(folder: str | Path, readme: Path | None) -> None:
    """Refuses now what could not be written after an hour.

    Raises:
        RequestError: As :func:`save_bench` and :func:`update_readme`.
    """
    results = check_folder(folder) / RESULTS
    if results.is_file():
        _read(results)
    if readme is not None:
        _parts(readme)


def _parts(readme: Path) -> tuple[str, str]:
    """What is before the table, and after it."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as err:
        raise RequestError(f"bench: {readme} cannot be read ({err.strerror})") from err
    except UnicodeDecodeError as err:
        raise RequestError(f"bench: {readme} is no UTF-8 text") from err
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise RequestError(f"bench: {readme} needs the lines {_BEGIN} and {_END}")
    return before, after


def update_readme(readme: Path, results: Path) -> None:
    """Writes the table between the README's two marks anew, from a results file.

    Raises:
        RequestError: A file cannot be read or written, or has no marks.
    """
    before, after = _parts(readme)
    write_text(readme, f"{before}{_BEGIN}\n{summary(_read(results))}{_END}{after}")


def summary(data: Mapping[str, Any]) -> str:
    """The README's tables: the main figures, and where the others are."""
    parts: list[str] = []
    for run in data["runs"]:
        where = f"{machine_words(run)}, {run['date']}"
        for size in run["sizes"]:
            measures = [
                measure
                for name in _SHOWN
                for measure in run["measures"]
                if (measure["group"], measure["name"]) == (size["name"], name)
            ]
            for dtype in _DTYPES:
                found = table(measures, f" {dtype}")
                if found:
                    parts.append(f"{size['title']}, {dtype}; {where}:\n\n{found}")
    parts.append(
        "Each runtime in processes of its own, in turn; medians. [Where others are "
        "ahead]"
        "(benchmarks/README.md#where-others-are-ahead), all caches, versions, and what "
        "could not be run: [benchmarks](benchmarks/README.md).\n"
    )
    return "\n".join(parts)


def _page(data: Mapping[str, Any], charts: Mapping[str, str]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Less is better; **bold** is best, or within 1 % of it. Each runtime is "
        "measured in processes of its own, in turn, with pauses between; figures are "
        "medians of the rounds, each of which is in results.json. A step is one of "
        "the loop, but not the first; with a cache, one not computed in full. A "
        "picture is all of it, text encoders and decoder included. All runtimes have "
        "the same prompt, steps and guidance, and caches the same options, as far as "
        "both have them; how many steps each computed in full is in the table. Empty "
        "cells are what a runtime does not have or was not asked for, or see the end.",
        "",
    ]
    for run in data["runs"]:
        titles = {size["name"]: size["title"] for size in run["sizes"]}
        for group in run["groups"]:
            title = titles.get(group, _TITLES.get(group, group))
            lines += [f"## {title[0].upper()}{title[1:]}", ""]
            lines += [f"{_when(run)}.", ""]
            measures = [m for m in run["measures"] if m["group"] == group]
            for dtype in _DTYPES:
                rows = table(measures, f" {dtype}")
                if rows:
                    lines += [f"{dtype}:", "", rows]
            lines += [
                f"![{words}]({name})\n"
                for name, words in charts.items()
                if name.startswith(f"{group}-")
            ]
    runs = data["runs"]
    lines += ["## Where others are ahead", ""]
    lost = [words for run in runs for words in _lost_words(run)]
    lines += [f"- {words}" for words in lost or ["nowhere"]]
    lines += ["", "## Not run", ""]
    found = [
        f"- {group}: {name}: {reason}"
        for run in runs
        for group, items in run["not_run"].items()
        for name, reason in items.items()
    ]
    lines += found or ["All that is asked for was run; not asked for:"]
    lines += ["", *(f"- {words}" for words in NOT_ASKED), "", "## Versions", ""]
    for run in runs:
        for group, items in run["versions"].items():
            for name, versions in items.items():
                words = ", ".join(f"{key} {value}" for key, value in versions.items())
                lines.append(f"- {group}: {name}: {words}")
    return "\n".join(lines) + "\n"


def _when(run: Mapping[str, Any]) -> str:
    """Date, command and machine of a run."""
    large = [size for size in run["sizes"] if size["max_rounds"] < run["rounds"]]
    rounds = _counted(run["rounds"], "round")
    for size in large:
        rounds += f", {size['max_rounds']} of {size['name']}"
    minutes = _counted(round(run["seconds"] / 60), "minute")
    return (
        f"{run['date']}, `{run['command']}`, {minutes}, {rounds}. "
        f"{machine_words(run)}, {run['machine']['system']}, "
        f"Python {run['machine']['python']}"
    )


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")


def table(measures: Iterable[Mapping[str, Any]], ending: str) -> str:
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
        rivals = {k: v for k, v in medians.items() if not k.startswith(_BOUNDS)}
        is_compared = len(rivals) > 1 and measure["unit"] not in ("steps", "dB")
        limit = _TIE * min(rivals.values()) if is_compared else 0.0
        name = _NAMES.get(measure["name"], measure["name"])
        cells = [f"{name}, {measure['unit']}"]
        for runtime in names:
            value = medians.get(runtime)
            text = "" if value is None else written(value)
            is_best = runtime in rivals and rivals[runtime] <= limit
            cells.append(f"**{text}**" if is_best else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def machine_words(data: Mapping[str, Any]) -> str:
    """Returns a run's processor and its kind, cores and memory."""
    found = data["machine"]
    kind = f" ({found['target']})" if found.get("target") else ""
    return (
        f"{found['processor']}{kind}, {found['cores']} cores, {found['memory_gib']} GiB"
    )


def _lost(measure: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Data type, who is ahead of ours, and how many times."""
    found = []
    for dtype in _DTYPES:
        medians = {
            name.removesuffix(f" {dtype}"): value
            for name, value in measure["medians"].items()
            if name.endswith(f" {dtype}")
        }
        ours = medians.pop(OURS, None)
        for bound in _BOUNDS:
            medians.pop(bound, None)
        if ours is None or measure["unit"] == "steps":
            continue
        found += [
            (dtype, name, ours / value)
            for name, value in medians.items()
            if ours > _TIE * value
        ]
    return found


def _lost_words(run: Mapping[str, Any]) -> list[str]:
    """A line a group, type of number and rival that is ahead there."""
    titles = {size["name"]: size["title"].partition(",")[0] for size in run["sizes"]}
    found: dict[tuple[str, str, str], list[str]] = {}
    for measure in run["measures"]:
        name = _NAMES.get(measure["name"], measure["name"])
        for dtype, rival, times in _lost(measure):
            key = (titles.get(measure["group"], measure["group"]), dtype, rival)
            found.setdefault(key, []).append(f"{name} ({times:.2f} times)")
    return [
        f"{where}, {dtype}: {rival} in {'; '.join(items)}"
        for (where, dtype, rival), items in found.items()
    ]


def _chart(
    data: Mapping[str, Any], size: Mapping[str, Any], name: str
) -> Image.Image | None:
    for measure in data["measures"]:
        if (measure["group"], measure["name"]) == (size["name"], name):
            ours = [key for key in measure["medians"] if key.startswith(OURS)]
            title = f"{size['title']}: {_NAMES.get(name, name)}"
            return bar_chart(title, measure["medians"], measure["unit"], ours)
    return None
