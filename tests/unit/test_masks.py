"""Step masks against what cache-dit 1.5.3's steps_mask gave, recorded."""

from __future__ import annotations

import pytest

from max_diffusion import StepMaskConfig, TaylorSeerConfig
from max_diffusion.caches import POLICIES, StepRules

# slow, medium, fast, ultra; 1 computes.
MASKS: dict[int, tuple[str, str, str, str]] = {
    4: (
        "1101",
        "1101",
        "1101",
        "1101",
    ),
    6: (
        "111001",
        "111001",
        "111001",
        "111001",
    ),
    8: (
        "11111011",
        "11110101",
        "11101001",
        "11001001",
    ),
    9: (
        "111110111",
        "111110101",
        "111101001",
        "111001001",
    ),
    12: (
        "111101101111",
        "111101101001",
        "111010010011",
        "110100100011",
    ),
    15: (
        "111101101101101",
        "111101101001001",
        "111010010010001",
        "110100100010001",
    ),
    16: (
        "1111111101110011",
        "1111110110001001",
        "1111100000000001",
        "1100000000000001",
    ),
    20: (
        "11111111011100111001",
        "11111101100011000101",
        "11111101000000000001",
        "11110000000000000001",
    ),
    27: (
        "111111110111001110011001001",
        "111111011000110001100011001",
        "111111010001000010000010001",
        "111100100000100000010000001",
    ),
    28: (
        "1111111101110011100110010001",
        "1111110110001100011000110001",
        "1111110100010000100000100001",
        "1111001000001000000100000001",
    ),
    29: (
        "11111111111101110011100110011",
        "11111111101100011000110001101",
        "11111111101000100001000001001",
        "11111100100000100000010000001",
    ),
    35: (
        "11111111111110011110011100110010001",
        "11111111100111000011100011000110001",
        "11111111100110000110000100000100001",
        "11111100011000000001000000100000001",
    ),
    50: (
        "11111111111111111111110011111000111110001110001101",
        "11111111111111110011100000111000001110000011100001",
        "11111111111001100000110000000110000000001100000001",
        "11111110001100000000011000000000001100000000000001",
    ),
    100: (
        "11111111111111111111111111111111111100011111111111"
        "11000000001111111111111000001111100000110000000011",
        "11111111111111111111111111000111111110000000000000"
        "11111111000000000000011111111000000001111100000001",
        "11111111111111111111111111000111000000000000011100"
        "00000000000000001110000000000000000000001100000001",
        "11111111111111111100000000111000000000000000000000"
        "11100000000000000000000000000110000000000000000001",
    ),
}


def written(config: StepRules, num_steps: int) -> str:
    required = config.required_steps(num_steps)
    assert required <= set(range(num_steps))
    return "".join("01"[step in required] for step in range(num_steps))


@pytest.mark.parametrize("num_steps", MASKS)
@pytest.mark.parametrize("kind", [StepMaskConfig, TaylorSeerConfig])
def test_masks_are_those_of_cache_dit(kind: type[StepRules], num_steps: int) -> None:
    masks = [written(kind(compute_steps=name), num_steps) for name in POLICIES]
    assert tuple(masks) == MASKS[num_steps]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 7])
def test_where_cache_dit_has_no_mask_all_is_computed(num_steps: int) -> None:
    for name in POLICIES:
        assert (
            written(TaylorSeerConfig(compute_steps=name), num_steps) == "1" * num_steps
        )


def test_long_runs_compute_as_many_steps_as_there() -> None:
    counts = {
        num_steps: [
            len(TaylorSeerConfig(compute_steps=name).required_steps(num_steps))
            for name in POLICIES
        ]
        for num_steps in (28, 50, 200, 1000)
    }
    assert counts == {
        28: [18, 15, 11, 8],
        50: [38, 29, 20, 14],
        200: [132, 113, 74, 49],
        1000: [702, 575, 427, 298],
    }
