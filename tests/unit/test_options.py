"""Several caches in one option, each with its own."""

from __future__ import annotations

import re

import pytest
from varied_caches import VARIED

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    MagCacheConfig,
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
)
from max_diffusion.caches import caches_from_text, label_of


@pytest.mark.parametrize(
    ("text", "caches"),
    [
        ("taylorseer", [TaylorSeerConfig()]),
        ("taylorseer,auto", [TaylorSeerConfig(), CACHES["auto"]()]),
        (
            "taylorseer:cache_interval=3:max_order=2,auto",
            [TaylorSeerConfig(3, max_order=2), CACHES["auto"]()],
        ),
        (
            "step-mask:compute_steps=0,5,9,auto",
            [StepMaskConfig(compute_steps=(0, 5, 9)), CACHES["auto"]()],
        ),
        (
            "magcache:ratios=1,0.5:threshold=0.2,magcache:ratios=0.25",
            [MagCacheConfig(0.2, ratios=(1.0, 0.5)), MagCacheConfig(ratios=(0.25,))],
        ),
        (
            "step-mask:compute_steps=fast,taylorseer:compute_steps=1,2",
            [
                StepMaskConfig(compute_steps="fast"),
                TaylorSeerConfig(compute_steps=(1, 2)),
            ],
        ),
        ("magcache:ratios=", [MagCacheConfig()]),
        (
            "taylorseer:max_order=1, magcache",
            [TaylorSeerConfig(max_order=1), MagCacheConfig()],
        ),
        ("all", [kind() for kind in CACHES.values()]),
        (
            "step-mask:compute_steps=1,2,all",
            [StepMaskConfig(compute_steps=(1, 2)), *(k() for k in CACHES.values())],
        ),
        (
            "all,taylorseer:target=modules",
            [
                *(kind() for kind in CACHES.values()),
                TaylorSeerConfig(target="modules"),
            ],
        ),
        ("taylorseer,taylorseer:max_order=1", [TaylorSeerConfig(), TaylorSeerConfig()]),
    ],
)
def test_caches_are_separated_by_commas(
    text: str, caches: list[AbstractCacheConfig]
) -> None:
    assert caches_from_text(text) == tuple(caches)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"--caches: expected all, or {', '.join(CACHES)}, got ''"),
        ("taylorseer,", "got ''"),
        (",taylorseer", "got ''"),
        ("tea", f"--caches: expected all, or {', '.join(CACHES)}, got 'tea'"),
        ("all:x=1", "got 'all'"),
        ("taylorseer,tea,auto", "got 'tea'"),
        ("taylorseer:max_order=2,tea", "max_order must be a whole number, got '2,tea'"),
        ("taylorseer:max_order", "--caches: expected key=value, got 'max_order'"),
        ("taylorseer:", "--caches: expected key=value, got ''"),
        ("taylorseer:order=2", "--caches: taylorseer has no option 'order'; it has"),
        ("none:x=1", "none has no option 'x'; it has none"),
        (
            "taylorseer:max_order=1:max_order=2",
            "--caches: max_order is given twice; give it once",
        ),
        ("taylorseer:max_order=9", "max_order must be at most 4, got 9"),
        (
            "step-mask:compute_steps=0,x",
            "compute_steps must be step indices like 0,5,9 or a policy, got '0,x'",
        ),
        (
            "magcache:ratios=1,x",
            "ratios must be numbers separated by commas, got '1,x'",
        ),
    ],
)
def test_other_caches_are_an_error_of_one_line(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as error:
        caches_from_text(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CACHES)
def test_labels_are_read_as_what_they_name(name: str) -> None:
    assert label_of(CACHES[name]()) == name
    assert caches_from_text(label_of(VARIED[name])) == (VARIED[name],)


def test_all_labels_together_are_read_in_their_order() -> None:
    text = ",".join(map(label_of, VARIED.values()))
    assert caches_from_text(text) == tuple(VARIED.values())


def test_labels_tell_what_differs_and_nothing_else() -> None:
    assert (
        label_of(TaylorSeerConfig(3, 9, 2)) == "taylorseer:cache_interval=3:max_order=2"
    )
    mask = StepMaskConfig(compute_steps=(0, 5))
    assert label_of(mask) == "step-mask:compute_steps=0,5"
