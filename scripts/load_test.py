#!/usr/bin/env python3
"""Puts a server of this machine under load, and judges its answers and its speed.

    python scripts/load_test.py                    everything, about ten minutes
    python scripts/load_test.py --only throughput  or cancel, soak
    python scripts/load_test.py --json load.json

Loopback only, and bounded: so many requests, then it ends. ``throughput``: 16 clients
against ``max-diffusion serve``, in turn with the same requests one after another
through ``pipeline.draw``, each in a process of its own; every picture and decision is
compared. ``cancel``: from a cancel to the freed slot. ``soak``: a thousand requests, a
third of them abandoned, malformed or too large; the server's memory is watched.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import pickle
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

CLIENTS = 16
# The same on every processor, whether bfloat16 is its default or not.
DTYPE = "float32"
PROMPTS = (
    "a red circle above a blue square",
    "a green heart",
    "a large yellow star",
    "a black star left of a white square",
)
CACHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("taylorseer", {}),
    ("auto", {}),
    ("step-mask", {}),
    ("taylorseer", {"cache_interval": 3, "warmup_steps": 4, "max_order": 2}),
)
SIZES = ("128x128", "128x128", "128x64", "192x192")
CAUSES = ("left", "malformed", "oversized")


def bodies(count: int) -> list[dict[str, Any]]:
    """Mixed requests, the same at every call."""
    rng = random.Random(0)
    found = []
    for index in range(count):
        cache, options = CACHES[index % len(CACHES)]
        body: dict[str, Any] = {
            "prompt": PROMPTS[index % len(PROMPTS)],
            "seed": index,
            "steps": rng.choice((20, 28, 28, 36)),
            "size": rng.choice(SIZES),
            "cache": cache,
            "cache_options": options,
            "report": True,
        }
        if index % 8 == 3:
            body |= {"true_cfg": 2.0, "negative_prompt": "blurred"}
        found.append(body)
    return found


def one_after_another(count: int, path: Path) -> None:
    """Draws them alone; run in a process of its own. Writes seconds and pictures."""
    from max_diffusion import load_pipeline
    from max_diffusion.serving.http import ModelDescription, ServerSettings
    from max_diffusion.serving.http.desk import to_request
    from max_diffusion.serving.http.schemas import ImageGenerationRequest

    pipeline = load_pipeline("demo", "cpu", DTYPE, caches=("none", "taylorseer"))
    model = ModelDescription.of(pipeline)
    requests = [
        to_request(ImageGenerationRequest(**body), ServerSettings(), model)
        for body in bodies(count)
    ]
    for request in requests[:8]:
        pipeline.draw(request)  # warm
    started = time.perf_counter()
    results = [pipeline.draw(request) for request in requests]
    seconds = time.perf_counter() - started
    pictures = [
        (result.images[0], [list(step.actions) for step in result.report.steps])
        for result in results
    ]
    path.write_bytes(pickle.dumps((seconds, pictures)))


@contextlib.contextmanager
def server() -> Iterator[tuple[str, psutil.Process]]:
    """``max-diffusion serve`` on a free port, ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = Path(sys.executable).with_name("max-diffusion")
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [command, "serve", "--port", str(port), "--dtype", DTYPE],
            stderr=log,
            env=dict(os.environ),
        )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(1200):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"error: the server has ended: {log.read().decode()}")
                time.sleep(0.5)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


async def ask_all(url: str, asked: list[dict[str, Any]]) -> tuple[float, list[Any]]:
    """16 clients, each with its next request as soon as it has an answer."""
    pending = list(enumerate(asked))[::-1]
    answers: list[Any] = [None] * len(asked)

    async def client() -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            while pending:
                index, body = pending.pop()
                answers[index] = await http.post(url, json=body)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return time.perf_counter() - started, answers


def throughput(count: int, rounds: int, progress: Progress) -> dict[str, Any]:
    """The server and one after another, in turn."""
    task = progress.add_task("throughput", total=2 * rounds)
    pairs: list[tuple[float, float]] = []
    pictures: list[tuple[np.ndarray, list[Any]]] = []
    answers: list[httpx.Response] = []
    figures: dict[str, float] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "alone"
            command = [sys.executable, __file__, "--alone", str(path)]
            subprocess.run(
                [*command, "--requests", str(count)], check=True, env=dict(os.environ)
            )
            alone, pictures = pickle.loads(path.read_bytes())
        progress.advance(task)
        with server() as (url, _):
            generate = f"{url}/v1/images/generations"
            asyncio.run(ask_all(generate, bodies(8)))
            before = metrics(url)
            together, answers = asyncio.run(ask_all(generate, bodies(count)))
            figures = metrics(url)
        progress.advance(task)
        pairs.append((alone, together))
        graphs, turns = (
            figures[name] - before[name]
            for name in ("graph_seconds_total", "turn_seconds_sum")
        )
    from max_diffusion.evaluation import psnr

    likeness, decisions = [], 0
    for (picture, actions), answer in zip(pictures, answers, strict=True):
        answer.raise_for_status()
        given = answer.json()
        likeness.append(psnr(picture, decoded(given["data"][0]["b64_json"])))
        steps = given["max_diffusion"]["report"]["steps"]
        decisions += [step["actions"] for step in steps] == actions
    ratios = [alone / together for alone, together in pairs]
    return {
        "requests": count,
        "clients": CLIENTS,
        "alone_seconds": [alone for alone, _ in pairs],
        "server_seconds": [together for _, together in pairs],
        "times_faster": statistics.median(ratios),
        "worst_psnr": min(likeness),
        "same_decisions": decisions,
        "overhead_of_graphs": (turns - graphs) / graphs,
    }


def cancel(count: int, progress: Progress) -> dict[str, Any]:
    """From a cancel to the freed slot, in turns of the engine, beside 15 others."""
    from max_diffusion import GenerationRequest, load_pipeline
    from max_diffusion.engine import Engine, EngineObserver, TurnRecord

    class Clock(EngineObserver):
        turns: list[float]

        def on_turn(self, record: TurnRecord) -> None:
            self.turns.append(record.seconds)

    clock = Clock()
    clock.turns = []
    pipeline = load_pipeline("demo", "cpu", DTYPE, caches=("none", "taylorseer"))
    long = GenerationRequest(prompts=("a star",), num_inference_steps=9999)
    task = progress.add_task("cancel", total=count)
    turns, seconds = [], []
    with Engine(pipeline, observer=clock) as engine:
        others = [engine.submit(long) for _ in range(15)]
        for _ in range(count):
            handle = engine.submit(long)
            time.sleep(random.uniform(0.2, 0.4))
            before, started = len(clock.turns), time.perf_counter()
            handle.cancel()
            while engine.stats().running > 15:
                time.sleep(0.0005)
            seconds.append(time.perf_counter() - started)
            turns.append(len(clock.turns) - before)
            progress.advance(task)
        for other in others:
            other.cancel()
    turn = statistics.median(clock.turns)
    return {
        "worst_turns": max(turns),
        "median_milliseconds": 1e3 * statistics.median(seconds),
        "worst_milliseconds": 1e3 * max(seconds),
        "turn_milliseconds": 1e3 * turn,
        "worst_to_turn_ratio": max(seconds) / turn,
    }


async def soak_all(
    url: str, asked: list[dict[str, Any]], process: psutil.Process, advance: Any
) -> tuple[Counter[str], list[str], list[float]]:
    """Good and bad requests mixed; returns outcomes, faults and resident megabytes."""
    from max_diffusion.evaluation import psnr

    rng = random.Random(1)
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    memory: list[float] = []
    known: dict[int, np.ndarray] = {}
    pending = list(range(1000))[::-1]

    async def good(http: httpx.AsyncClient, index: int) -> None:
        body = asked[index % len(asked)]
        answer = await http.post(url, json=body)
        if answer.status_code != 200:
            faults.append(f"{index}: {answer.status_code} {answer.text[:200]}")
            return
        picture = decoded(answer.json()["data"][0]["b64_json"])
        if psnr(picture, known.setdefault(index % len(asked), picture)) < 60:
            faults.append(f"{index}: another picture than before")

    async def left(http: httpx.AsyncClient, index: int) -> None:
        body = asked[index % len(asked)] | {"stream": True, "progress": True}
        async with http.stream("POST", url, json=body) as stream:
            left_after = rng.randrange(1, 40)
            lines = stream.aiter_lines()
            for _ in range(left_after):
                await anext(lines, None)

    async def refused(http: httpx.AsyncClient, index: int, *, is_large: bool) -> None:
        body = json.dumps(asked[index % len(asked)])
        content = body[: rng.randrange(1, len(body) - 1)]
        if is_large:
            content = rng.choice(
                (
                    json.dumps({"prompt": "x" * 300_000}),
                    json.dumps({"prompt": "x", "size": "4096x4096"}),
                    json.dumps({"prompt": "x", "n": 1000}),
                    json.dumps({"prompt": "x", "steps": 100_000}),
                )
            )
        answer = await http.post(
            url, content=content, headers={"Content-Type": "application/json"}
        )
        message = answer.json()["error"]["message"]
        if not 400 <= answer.status_code < 500 or not message:
            faults.append(f"{index}: {answer.status_code} {answer.text[:200]}")

    async def client() -> None:
        async with httpx.AsyncClient(timeout=120) as http:
            while pending:
                index = pending.pop()
                kind = CAUSES[index // 3 % 3] if index % 3 == 0 else "good"
                outcomes[kind] += 1
                if kind == "good":
                    await good(http, index)
                elif kind == "left":
                    await left(http, index)
                else:
                    await refused(http, index, is_large=kind == "oversized")
                if index % 50 == 0:
                    memory.append(process.memory_info().rss / 1024**2)
                advance()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return outcomes, faults, memory


def soak(progress: Progress) -> dict[str, Any]:
    """A thousand requests, a third of them bad."""
    task = progress.add_task("soak", total=1000)
    with server() as (url, process):
        generate = f"{url}/v1/images/generations"
        asked = bodies(40)
        outcomes, faults, memory = asyncio.run(
            soak_all(generate, asked, process, lambda: progress.advance(task))
        )
        time.sleep(1)
        health = httpx.get(f"{url}/health").json()
        figures = metrics(url)
    return {
        "outcomes": dict(outcomes),
        "faults": faults,
        "resident_mb": [round(value) for value in memory],
        "running_at_the_end": health["running"] + health["queued"],
        "reserved_bytes_at_the_end": health["reserved_bytes"],
        "cache_bytes_at_the_end": figures["cache_bytes"],
    }


def metrics(url: str) -> dict[str, float]:
    """Figures without labels, by their names."""
    text = httpx.get(f"{url}/metrics").text
    found = re.findall(r"^max_diffusion_(\w+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def decoded(data: str) -> np.ndarray:
    """A picture of an answer."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def main() -> None:
    """Runs what is asked for and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("throughput", "cancel", "soak"))
    parser.add_argument("--requests", type=int, default=128, help="of throughput")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--alone", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        one_after_another(args.requests, Path(args.alone))
        return
    results: dict[str, Any] = {}
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        if args.only in (None, "throughput"):
            results["throughput"] = throughput(args.requests, args.rounds, progress)
        if args.only in (None, "cancel"):
            results["cancel"] = cancel(20, progress)
        if args.only in (None, "soak"):
            results["soak"] = soak(progress)
    for name, figures in results.items():
        table = Table("figure", "value", title=name)
        for key, value in figures.items():
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(key, shown)
        Console(width=120).print(table)
    if args.json:
        from max_diffusion.core.report import plain

        Path(args.json).write_text(json.dumps(plain(results), indent=1) + "\n")
    if results.get("soak", {}).get("faults"):
        sys.exit(1)


if __name__ == "__main__":
    main()
