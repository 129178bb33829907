"""Rules and arithmetic of the caches that follow a plan or a measurement: no device."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType

from max_diffusion import (
    AutoConfig,
    FasterCacheConfig,
    Grid,
    MagCacheConfig,
    ModelLoadError,
    PabConfig,
    RequestError,
    TaylorSeerConfig,
    TeaCacheConfig,
)
from max_diffusion.caches import Calibration, ResidualState, Run
from max_diffusion.caches.fastercache import low_frequencies
from max_diffusion.caches.magcache import resample
from max_diffusion.caches.teacache import MIN_R2
from max_diffusion.core.buffers import from_numpy, to_numpy
from max_diffusion.evaluation.calibration import fit
from max_diffusion.execution.graph_call import run

NOTHING = Calibration()


# MagCache.

# diffusers' for FLUX.1-dev at 28 steps.
FLUX_RATIOS = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344),
    *(1.03125, 1.02344, 0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0),
    *(1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062),
)


def test_magcache_skips_what_diffusers_was_seen_to_skip() -> None:
    skipped = set(range(28)) - MagCacheConfig().computed_steps(FLUX_RATIOS, 28)
    assert skipped == {6, 8, 10, 11, 12, 14, 15, 16, 18, 19, 20, 22, 23, 25}


def test_magcache_with_the_authors_settings() -> None:
    config = MagCacheConfig(0.24, 5, 0.1)
    skipped = set(range(28)) - config.computed_steps(FLUX_RATIOS, 28)
    middle = {3, 4, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 22, 23, 24}
    assert skipped == middle | {25, 27}
    # Their script also computes step 11, whatever the ratios.
    skipped = set(range(28)) - config.computed_steps(FLUX_RATIOS, 28, {11})
    assert skipped == {3, 4, 6, 7, 8, 10, 12, 13, 14, 15, 16, 18, 19, 20, 21} | {
        *(22, 24, 25, 27)
    }


def test_ratios_are_resampled_to_nearest_neighbours() -> None:
    ratios = [float(value) for value in range(5)]
    assert resample(ratios, 5) == ratios
    assert resample(ratios, 1) == [4]
    assert resample(ratios, 3) == [0, 2, 4]
    assert resample(ratios, 9) == [0, 0, 1, 2, 2, 2, 3, 4, 4]  # ties to even


def test_magcache_needs_ratios_and_steps() -> None:
    with pytest.raises(RequestError, match="no ratios were measured"):
        MagCacheConfig().create_cache(NOTHING)
    measured = replace(NOTHING, magcache_ratios=(1.0, 0.9))
    cache = MagCacheConfig().create_cache(measured)
    with pytest.raises(RequestError, match=r"give run=Run\(num_steps=...\)"):
        cache.create_state(Run())


# TeaCache.


def test_teacache_adds_up_rescaled_changes_of_each_sample() -> None:
    config = TeaCacheConfig(threshold=1.0, coefficients=(2.0, 0.1))
    cache = config.create_cache(NOTHING)
    state: ResidualState = cache.create_state(Run())
    state.restart(2)
    decided = []
    for values in ([0.2, 0.5], [0.2, 0.1], [0.2, 0.1], [np.nan, 0.1]):
        change = np.array(values, np.float32)
        decision = cache.decide(state, 1, change)
        state.count(decision, cache.measure(change))
        decided.append(decision.tolist())
    # .5, 1.0: computes, .5, NaN: computes; 1.1: computes, .3, .6, .9.
    assert decided == [[False, True], [True, False], [False, False], [True, False]]


def test_teacache_refuses_a_bad_fit_with_its_r2() -> None:
    with pytest.raises(RequestError, match="no coefficients were fitted"):
        TeaCacheConfig().create_cache(NOTHING)
    bad = replace(
        NOTHING,
        teacache_coefficients=(1.0,),
        teacache_r2=0.31,
        teacache_range=(0.0, 1.0),
    )
    with pytest.raises(RequestError, match=r"explains R² 0\.31"):
        TeaCacheConfig().create_cache(bad)
    TeaCacheConfig().create_cache(replace(bad, teacache_r2=MIN_R2))
    TeaCacheConfig(coefficients=(1.0,)).create_cache(bad)  # the caller's own


def test_a_fit_finds_a_polynomial_and_says_how_well() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, 200)
    wanted = (3.0, -2.0, 0.5, 1.0, 0.25)
    coefficients, r2 = fit(x, np.polyval(wanted, x))
    assert np.allclose(coefficients, wanted, atol=1e-8)
    assert r2 == pytest.approx(1)
    _, r2 = fit(x, rng.standard_normal(200))
    assert r2 < MIN_R2
    assert fit(np.ones(9), np.arange(9.0))[1] == 0
    assert fit(x, np.ones(200))[1] == 0  # nothing to explain


@pytest.mark.parametrize("points", [1, 2, 3, 5, 9])
def test_a_curve_through_a_handful_of_points_seldom_explains(points: int) -> None:
    rng = np.random.default_rng(points)
    noise = [
        fit(rng.uniform(0, 1, points), rng.standard_normal(points))[1]
        for _ in range(200)
    ]
    # In-sample, degree 4 would explain all of up to 5 points.
    assert np.mean(np.array(noise) >= MIN_R2) < 0.15
    assert points > 2 or not any(noise)


def test_predictive_r2_is_that_of_fits_without_each_point() -> None:
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 0.1, 30)
    y = np.sin(40 * x) + 0.2 * rng.standard_normal(30)
    wanted = []
    for degree in range(1, 5):
        errors = []
        for index in range(30):
            others = np.arange(30) != index
            left_out = np.polyfit(x[others], y[others], degree)
            errors.append(y[index] - np.polyval(left_out, x[index]))
        wanted.append(1 - np.square(errors).sum() / np.square(y - y.mean()).sum())
    coefficients, r2 = fit(x, y)
    assert r2 == pytest.approx(max(wanted), abs=1e-6)
    assert len(coefficients) == 2 + int(np.argmax(wanted))


def test_teacache_does_not_believe_its_fit_elsewhere() -> None:
    measured = Calibration(
        teacache_coefficients=(-10.0, 1.0), teacache_r2=0.9, teacache_range=(0.05, 0.3)
    )
    cache = TeaCacheConfig(threshold=1.0).create_cache(measured)
    change = np.array([0.0, 0.05, 0.08, 0.2, 0.31, np.nan], np.float32)
    # Smaller ones count as the smallest, what is below 0 as 0, larger ones compute.
    wanted = [0.5, 0.5, 0.2, 0.0, np.inf, np.nan]
    assert np.allclose(cache.measure(change), wanted, atol=1e-6, equal_nan=True)
    state: ResidualState = cache.create_state(Run())
    state.restart(6)
    assert cache.decide(state, 1, change).tolist() == [False] * 4 + [True] * 2


# Pyramid Attention Broadcast and FasterCache.


def test_pab_computes_what_diffusers_was_seen_to_compute() -> None:
    timesteps = tuple(float(t) for t in range(1000, 0, -20))
    computed = set(range(50)) - PabConfig().reused_steps(timesteps)
    assert computed == {*range(11), *range(12, 45, 2), *range(45, 50)}


def test_fastercache_follows_the_ranges() -> None:
    timesteps = tuple(float(t) for t in range(1000, 0, -50))  # 20 steps
    run = Run(20, timesteps)
    config = FasterCacheConfig()
    assert config.estimated_steps(run) == frozenset()
    # Below 681 from step 7 on; odd steps.
    assert config.extrapolated_steps(run) == {7, 9, 11, 13, 15, 17, 19}
    guided = replace(run, has_guidance=True)
    # Below 641 from step 8 on; no multiple of 5.
    assert config.estimated_steps(guided) == {8, 9, 11, 12, 13, 14, 16, 17, 18, 19}
    # Only where the other branch is estimated.
    assert config.extrapolated_steps(guided) == {9, 11, 13, 17, 19}
    required = replace(guided, required_steps=frozenset((9, 12)))
    assert config.estimated_steps(required) == {8, 11, 13, 14, 16, 17, 18, 19}


@pytest.mark.parametrize("grid", [(16, 16), (15, 22), (7, 5), (1, 9)])
def test_low_frequencies_equal_a_shifted_disk(grid: tuple[int, int]) -> None:
    """Against the published way: shift, cut a disk out, shift back."""
    rng = np.random.default_rng(grid)
    values = rng.standard_normal((2, grid[0] * grid[1], 3)).astype(np.float32)
    maps = values.reshape(2, *grid, 3).transpose(0, 3, 1, 2).astype(np.float64)
    spectrum = np.fft.fftshift(np.fft.fft2(maps), axes=(-2, -1))
    y, x = np.mgrid[: grid[0], : grid[1]]
    radius = min(grid) // 5
    disk = (x - grid[1] // 2) ** 2 + (y - grid[0] // 2) ** 2 <= radius**2
    low = np.fft.ifft2(np.fft.ifftshift(spectrum * disk, axes=(-2, -1))).real
    wanted = low.transpose(0, 2, 3, 1).reshape(values.shape)
    assert np.abs(low_frequencies(values, Grid(1, *grid)) - wanted).max() < 1e-5


def test_low_frequencies_are_those_of_each_frames_latent_cells() -> None:
    """Of latents that are packed, two frames and two by two cells to a token."""
    rng = np.random.default_rng(2)
    latents = rng.standard_normal((2, 4, 3, 12, 14)).astype(np.float32)
    spectrum = np.fft.fftshift(np.fft.fft2(latents), axes=(-2, -1))
    y, x = np.mgrid[:12, :14]
    disk = (x - 7) ** 2 + (y - 6) ** 2 <= (12 // 5) ** 2
    low = np.fft.ifft2(np.fft.ifftshift(spectrum * disk, axes=(-2, -1))).real

    def packed(values: np.ndarray) -> np.ndarray:
        cells = values.reshape(2, 2, 2, 3, 6, 2, 7, 2)
        return cells.transpose(0, 1, 4, 6, 3, 2, 5, 7).reshape(2, 2 * 6 * 7, 24)

    found = low_frequencies(packed(latents), Grid(2, 6, 7, cells=(2, 2, 2)))
    assert np.abs(found - packed(low)).max() < 1e-5


class WeightedSum:
    """Stands in for a graph, in float64."""

    def execute(self, weights: Buffer, *values: Buffer) -> list[Buffer]:
        factors = weights.to_numpy()[:, :, None, None].astype(np.float64)
        parts = np.stack([value.to_numpy() for value in values], 1)
        return [Buffer.from_numpy((factors * parts).sum(1).astype(np.float32))]


GRAPHS: Any = defaultdict(WeightedSum)


def test_extrapolated_attention_is_extrapolated_again() -> None:
    cache = FasterCacheConfig(attention_weight=0.5).create_cache(NOTHING)
    memory = cache.create_memory()
    values = []
    for step, value in enumerate((1.0, None, 2.0, None, None)):
        if value is None:
            values.append(float(run(GRAPHS, memory.forecast(step)).to_numpy()[0, 0, 0]))
        else:
            memory.push(Buffer.from_numpy(np.full((1, 2, 3), value, np.float32)), step)
    # The first counts twice; then 2 + 1 / 2, and 2.5 + .5 / 2.
    assert values == [1.0, 2.5, 2.75]


def test_fastercache_estimates_the_other_branch() -> None:
    rng = np.random.default_rng(4)
    timesteps = (950.0, 600.0, 200.0, 50.0)
    known = Run(4, timesteps, grid=Grid(1, 10, 12), has_guidance=True)
    cache = FasterCacheConfig(alpha_low=1.2, alpha_high=1.4).create_cache(NOTHING)
    guidance = cache.create_guidance(known)
    assert guidance is not None
    assert guidance.steps == {1, 2, 3}
    first, second = (rng.standard_normal((2, 120, 4), np.float32) for _ in range(2))
    guidance.remember(Buffer.from_numpy(first), Buffer.from_numpy(second))
    assert guidance.num_bytes == 2 * first.nbytes
    low = low_frequencies(second - first, Grid(1, 10, 12))
    high = second - first - low
    now = rng.standard_normal((2, 120, 4), np.float32)
    # diffusers multiplies its stored difference again at every estimated step.
    for step, (a, b) in {1: (1.2, 1.0), 2: (1.2, 1.4), 3: (1.0, 1.4)}.items():
        estimate = to_numpy(
            run(GRAPHS, guidance.estimate(Buffer.from_numpy(now), step))
        )
        assert np.abs(estimate - (now + a * low + b * high)).max() < 1e-5


def test_unguided_fastercache_estimates_nothing() -> None:
    cache = FasterCacheConfig().create_cache(NOTHING)
    assert cache.create_guidance(Run(4, (9.0, 5.0, 2.0, 1.0))) is None


@pytest.mark.parametrize(
    "config", [PabConfig(), FasterCacheConfig()], ids=lambda c: type(c).__name__
)
def test_rules_of_timesteps_need_them(config: PabConfig | FasterCacheConfig) -> None:
    with pytest.raises(RequestError, match=r"give run=Run\(timesteps=...\)"):
        config.create_cache(NOTHING).create_state(Run(4))


# Bad values.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MagCacheConfig(threshold=-1), "magcache: threshold must be a number"),
        (lambda: MagCacheConfig(retention_ratio=1.5), "retention_ratio must be 0 to 1"),
        (lambda: MagCacheConfig(max_consecutive_cached=0), "must be at least 1, got 0"),
        (lambda: MagCacheConfig(ratios=(1.0, float("nan"))), "ratios: each must be"),
        (
            lambda: MagCacheConfig(ratios=None),  # type: ignore[arg-type]  # refused
            "must be a tuple of numbers, got None",
        ),
        (
            lambda: MagCacheConfig(ratios=[1.0]),  # type: ignore[arg-type]  # refused
            "must be a tuple of numbers",
        ),
        (lambda: TeaCacheConfig(coefficients=(float("inf"),)), "a finite number"),
        (lambda: TeaCacheConfig(coefficients=(10**400,)), "a finite number"),
        (
            lambda: TeaCacheConfig(coefficients=5),  # type: ignore[arg-type]  # refused
            "must be a tuple of numbers, got 5",
        ),
        (lambda: PabConfig(min_timestep=800, max_timestep=100), "must be below max_"),
        (lambda: FasterCacheConfig(low_max_timestep=9), "low: min_timestep must be be"),
        (lambda: AutoConfig(max_interval=10**400), "max_interval must be at most"),
        (lambda: TeaCacheConfig(threshold=float("nan")), "threshold must be"),
        (lambda: PabConfig(interval=0), "pab: interval must be at least 1"),
        (lambda: PabConfig(min_timestep=float("nan")), "min_timestep must be a finite"),
        (lambda: FasterCacheConfig(guidance_interval=0), "guidance_interval must be"),
        (lambda: FasterCacheConfig(alpha_low=-1), "alpha_low must be a number of 0"),
        (lambda: TaylorSeerConfig(target="mlp"), "must be prediction, attention, mod"),
    ],
)
def test_bad_values_are_told_at_construction(make: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make()  # type: ignore[operator]


# The calibration file.

LORAS = (("ink.safetensors", -0.5), ("style.safetensors", 1.0))
MEASURED = Calibration(50, 8, (1.0, 0.9), (0.5, 0.1), 0.75, (0.01, 0.2), LORAS)


def test_a_calibration_is_written_and_read(tmp_path: Path) -> None:
    MEASURED.write(tmp_path / "c.json")
    assert Calibration.read(tmp_path / "c.json") == MEASURED
    content = (tmp_path / "c.json").read_bytes()
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert Calibration.read(tmp_path / "c.json") == MEASURED
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    entries = asdict(MEASURED)
    del entries["loras"]
    (tmp_path / "c.json").write_text(json.dumps(entries))
    assert Calibration.read(tmp_path / "c.json") == replace(MEASURED, loras=())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loras": "ab"}, "loras in .* must be a list of names with weights, .* 'ab'"),
        ({"loras": None}, "must be a list of names with weights, .* got None"),
        ({"loras": {"ab": 1}}, "must be a list of names with weights"),
        ({"loras": [["a", "1"]]}, "must be a list of names with weights"),
        ({"loras": [["a", 1, 2]]}, "must be a list of names with weights"),
        ({"loras": [["a", float("nan")]]}, "must be a list of names with weights"),
        ({"magcache_ratios": "1"}, "magcache_ratios in .* must be finite numbers"),
        ({"magcache_ratios": [1, None]}, "must be finite numbers"),
        ({"teacache_r2": float("nan")}, "teacache_r2 in .* must be a finite number"),
        ({"teacache_r2": 7}, "teacache_r2 in .* must be at most 1"),
        ({"teacache_range": [1.0]}, "must be two numbers where"),
        ({"magcache_ratios": [-1.0]}, "must be 0 or more"),
        ({"magcache_ratios": [10**400]}, "must be finite numbers"),
        ({"num_images": 2.5}, "num_images in .* must be a whole number of 0"),
        ({"num_images": -5}, "must be a whole number of 0"),
        ({"more": 1}, "and nothing else"),
    ],
)
def test_a_damaged_calibration_is_told(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(asdict(MEASURED) | change))
    with pytest.raises(ModelLoadError, match=message):
        Calibration.read(path)


def test_a_calibration_that_is_no_json_or_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="cannot read"):
        Calibration.read(tmp_path / "c.json")
    for text in ("{", "[" * 100_000):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(ModelLoadError, match="is no JSON"):
            Calibration.read(tmp_path / "c.json")


def test_a_calibration_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.json").mkdir()
    with pytest.raises(RequestError, match=r"calibration: .*c\.json cannot be wri"):
        MEASURED.write(tmp_path / "c.json")


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    values = np.array([1.0, 1 + 2**-9, 1 + 2**-8 + 2**-12, -3.0], np.float32)
    buffer = from_numpy(values, DType.bfloat16, CPU())
    assert buffer.dtype == DType.bfloat16
    assert to_numpy(buffer).tolist() == [1.0, 1.0, 1 + 2**-7, -3.0]
