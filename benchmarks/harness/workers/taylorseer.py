"""``TaylorSeerCache`` alone, ours or MAX's own: milliseconds of predict and update."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from common import job
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession

_SHAPES = {"demo": (1, 64, 32), "FLUX.1 at 1024 x 1024": (1, 4096, 64)}


def main() -> None:
    """Makes one, measures, prints."""
    session = InferenceSession(devices=[CPU()])
    cache = (_ours if job()["runtime"] == "ours" else _theirs)(session)
    results = {}
    for name, shape in _SHAPES.items():
        value = Buffer.from_numpy(np.random.default_rng(0).random(shape, np.float32))
        state = cache.create_state(*shape)
        steps = iter(range(10**9))

        def update(
            state: Any = state, value: Buffer = value, steps: Any = steps
        ) -> None:
            cache.update(state, value, next(steps))

        def predict(state: Any = state) -> None:
            cache.predict(state, state.last_compute_step + 3)

        results[f"update, {name}"] = milliseconds(update)
        results[f"predict, {name}"] = milliseconds(predict)
    print(json.dumps(results))


def _ours(session: InferenceSession) -> Any:
    from max_diffusion import DenoisingCacheConfig, TaylorSeerCache

    config = DenoisingCacheConfig(taylorseer=True, taylorseer_max_order=1)
    return TaylorSeerCache(config, DType.float32, CPU(), session)


def _theirs(session: InferenceSession) -> Any:
    from max.pipelines.diffusion import DenoisingCacheConfig, TaylorSeerCache

    config = DenoisingCacheConfig(
        taylorseer=True,
        first_block_caching=False,
        taylorseer_cache_interval=5,
        taylorseer_warmup_steps=9,
        taylorseer_max_order=1,
    )
    return TaylorSeerCache(config, DType.float32, CPU(), session)


def milliseconds(call: Callable[[], object], count: int = 300) -> float:
    """Median of many calls."""
    for _ in range(min(10, count)):
        call()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    main()
