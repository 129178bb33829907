"""What :func:`gpu_check` found, as JSON and as a page with charts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.harness.report import machine_words, table
from max_diffusion.core.files import check_folder, prepared_folder, write_text
from max_diffusion.errors import RequestError
from max_diffusion.evaluation.charts import bar_chart
from max_diffusion.media.images import save_atomically

from .plan import GpuResult

RESULTS: Final = "gpu.json"
PAGE: Final = "gpu.md"
_CHARTS: Final = (("step", "step"), ("picture", "picture"))
_TITLES: Final[Mapping[str, str]] = {
    "parity": "One step of a few blocks, against float32",
    "step": "A step, uncached",
    "picture": "A picture, text encoders and decoder included",
    "memory": "Memory",
}


def save_gpu_check(result: GpuResult, folder: str | Path) -> list[Path]:
    """Writes ``gpu.json``, ``gpu.md`` and charts.

    Args:
        result: What :func:`gpu_check` returned.
        folder: Made if it is missing. Figures of parts that were not run now stay.

    Returns:
        The paths of all files written, the page's first.

    Raises:
        RequestError: A file cannot be written, or is none of ours.
    """
    path = prepared_folder(folder)
    runs = [*_others(path / RESULTS, result.parts), result.to_dict()]
    charts = {}
    for run in runs:
        for part, name in _CHARTS:
            for measure in run["measures"]:
                if (measure["group"], measure["name"]) != (part, name):
                    continue
                ours = [k for k in measure["medians"] if k.startswith("max_diffusion")]
                title = f"{run['size']}: {name}"
                file = f"gpu-{part}.png"
                chart = bar_chart(title, measure["medians"], measure["unit"], ours)
                save_atomically(path / file, chart)
                charts[part] = file
    write_text(path / RESULTS, json.dumps({"runs": runs}, indent=1) + "\n")
    write_text(path / PAGE, _page(runs, charts))
    return [path / name for name in (PAGE, RESULTS, *charts.values())]


def check_target(folder: str | Path) -> None:
    """Refuses now what could not be written after an hour.

    Raises:
        RequestError: As :func:`save_gpu_check`.
    """
    _others(check_folder(folder) / RESULTS, ())


def _others(path: Path, parts: Sequence[str]) -> list[dict[str, Any]]:
    """Earlier runs, as far as they are of other parts."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise RequestError(
            f"gpu_check: {path} cannot be read ({err.strerror})"
        ) from err
    except ValueError as err:
        raise RequestError(
            f"gpu_check: {path} is no JSON ({err}); choose another folder"
        ) from err
    runs = found.get("runs") if isinstance(found, dict) else None
    keys = {"parts", "measures", "not_run", "tests", "failures"}
    if not isinstance(runs, list) or not all(keys <= {*run} for run in runs):
        raise RequestError(
            f"gpu_check: {path} holds no results of it; choose another folder"
        )
    for run in runs:
        kept = run["parts"] = [name for name in run["parts"] if name not in parts]
        run["measures"] = [m for m in run["measures"] if m["group"] in kept]
        run["not_run"] = {k: v for k, v in run["not_run"].items() if k in kept}
        run["failures"] = [x for x in run["failures"] if x.partition(":")[0] in kept]
        if "tests" not in kept:
            run["tests"] = None
    return [run for run in runs if run["parts"]]


def _page(runs: Sequence[Mapping[str, Any]], charts: Mapping[str, str]) -> str:
    lines = [
        "# On a GPU",
        "",
        "Written by `scripts/gpu_check`. Each runtime is measured in processes of its "
        "own, in turn, with the same random weights; figures are medians of the "
        "processes, each of which is in gpu.json, and of a process the median of its "
        "steps. **Bold** is best, or within 1 % of it. Steps are waited for one by "
        "one. What a first process compiles, later ones find on disk.",
        "",
    ]
    for run in runs:
        device = run["device"]
        architecture = f"{device.get('api')}:{device.get('architecture')}"
        where = (
            device["name"]
            if device["name"] == "cpu"
            else (f"{device['name']} ({architecture})")
        )
        minutes = run["seconds"] / 60
        size = run["size"]
        lines += [
            f"## {size[0].upper()}{size[1:]}",
            "",
            f"{run['date']}, `{run['command']}`, {minutes:.1f} minutes. {where}; "
            f"{machine_words(run)}, {run['machine']['system']}, Python "
            f"{run['machine']['python']}. Compiled graphs that run here are those for "
            f"{', '.join(device['targets']) or 'no known target'}.",
            "",
        ]
        if run["tests"]:
            lines += _tests(run["tests"])
        for part in run["parts"]:
            measures = [m for m in run["measures"] if m["group"] == part]
            for dtype in ("bfloat16", "float32"):
                found = table(measures, f" {dtype}")
                if found:
                    lines += [f"### {_TITLES[part]}, {dtype}", "", found]
            if measures and part in charts:
                lines += [f"![{_TITLES[part]}]({charts[part]})", ""]
        lines += ["### Not as it should be", ""]
        lines += [f"- {words}" for words in run["failures"] or ["nothing"]]
        lines += ["", "### Not run", ""]
        missing = [
            f"- {part}: {name}: {reason}"
            for part, items in run["not_run"].items()
            for name, reason in items.items()
        ]
        lines += missing or ["All that was asked for was run."]
        lines += ["", "### Versions", ""]
        for name, versions in run["versions"].items():
            words = ", ".join(f"{key} {value}" for key, value in versions.items())
            lines.append(f"- {name}: {words}")
        lines.append("")
    return "\n".join(lines)


def _tests(tests: Mapping[str, Any]) -> list[str]:
    failed, left_out = tests["failed"], tests["left_out"]
    lines = [
        "### Tests",
        "",
        f"{tests['passed']} passed, {len(failed)} failed, {len(left_out)} did not run; "
        f"{tests['seconds']:.0f} s.",
        "",
    ]
    lines += [f"- did not run: {name}: {why}" for name, why in left_out.items()]
    for name, values in tests["measured"].items():
        words = ", ".join(f"{key} {value}" for key, value in values.items())
        lines.append(f"- {name.rpartition('.')[2]}: {words}")
    return [*lines, ""]
