"""What was measured of a model for the caches that need it: a small JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, get_type_hints

from ..core.files import write_text
from ..core.json_values import WrongTypeError, typed
from ..core.loras import Loras
from ..errors import ModelLoadError

_LARGEST: Final = 1e300
_EXPECTED: Final[Mapping[object, str]] = MappingProxyType(
    {
        int: "a whole number of 0 or more",
        float: "a finite number",
        tuple[float, ...]: "finite numbers",
    }
)
CALIBRATION_FILE: Final = "cache_calibration.json"


@dataclass(frozen=True)
class Calibration:
    """Measurements of one model, as ``max-diffusion calibrate`` writes them."""

    num_inference_steps: int = 0
    """Denoising steps of each measured run; 0 if nothing was measured."""
    num_images: int = 0
    """Number of images that were measured."""
    magcache_ratios: tuple[float, ...] = ()
    """Ratio of the size of each step's residual to that of the step before, one per
    step; the first is 1."""
    teacache_coefficients: tuple[float, ...] = ()
    """Polynomial from the change of the modulated input to the change of the residual,
    highest power first; empty if none was fitted."""
    teacache_r2: float = 0.0
    """Share of the residual's change that the polynomial explains, at most 1, where
    every point is judged by a fit to the others."""
    teacache_range: tuple[float, ...] = ()
    """Smallest and largest change of the modulated input that the polynomial was fitted
    to; empty if none was fitted."""
    loras: Loras = ()
    """Names of the LoRA files, without their folders, that the model had when it was
    measured, each with its weight, in order."""

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Reads the measurements from a file; one without ``loras`` is of none.

        Raises:
            ModelLoadError: It is missing or not what ``calibrate`` writes.
        """
        try:
            entries = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as err:
            raise ModelLoadError(
                f"calibration: cannot read {path}: {err.strerror}"
            ) from err
        except (ValueError, RecursionError) as err:
            raise ModelLoadError(f"calibration: {path} is no JSON: {err}") from err
        wanted = get_type_hints(cls)
        kinds = {name: kind for name, kind in wanted.items() if name != "loras"}
        if not isinstance(entries, Mapping) or set(entries) | {"loras"} != set(wanted):
            raise ModelLoadError(
                f"calibration: {path} must hold {', '.join(wanted)} and nothing else; "
                "write it with max-diffusion calibrate"
            )
        values = {
            name: _checked(path, name, entries[name], kind)
            for name, kind in kinds.items()
        }
        result = cls(**values, loras=_loras(path, entries.get("loras", [])))
        for name, is_in_range, expected in (
            (
                "magcache_ratios",
                min(result.magcache_ratios, default=0) >= 0,
                "0 or more",
            ),
            ("teacache_r2", result.teacache_r2 <= 1, "at most 1"),
            (
                "teacache_range",
                len(result.teacache_range) == 2 * bool(result.teacache_coefficients),
                "two numbers where there are coefficients",
            ),
        ):
            if not is_in_range:
                raise ModelLoadError(
                    f"calibration: {name} in {path} must be {expected}, got "
                    f"{values[name]}; write it with max-diffusion calibrate"
                )
        return result

    def write(self, path: Path) -> None:
        """Writes the measurements to a file, whole or not at all.

        Raises:
            RequestError: It cannot be written.
        """
        write_text(path, json.dumps(asdict(self), indent=1) + "\n", "calibration")


def _loras(path: Path, given: Any) -> Loras:
    """A file's list of names with weights."""
    try:
        pairs = [(typed(name, str), typed(weight, float)) for name, weight in given]
        if not all(abs(weight) < _LARGEST for _, weight in pairs):
            raise WrongTypeError("finite weights")
        return tuple(sorted(pairs))
    except (TypeError, ValueError) as err:
        raise ModelLoadError(
            f"calibration: loras in {path} must be a list of names with weights, such "
            f'as [["style.safetensors", 0.8]], got {given!r:.80}; write it with '
            "max-diffusion calibrate"
        ) from err


def _checked(path: Path, name: str, value: Any, kind: Any) -> Any:
    """Returns a file's value if it is finite and has its field's type and range."""
    try:
        found = typed(value, kind)
    except WrongTypeError:
        found = None
    numbers = found if isinstance(found, tuple) else (found,)
    is_finite = all(n is not None and abs(n) < _LARGEST for n in numbers)
    if is_finite and (kind is not int or found >= 0):
        return found
    raise ModelLoadError(
        f"calibration: {name} in {path} must be {_EXPECTED[kind]}, got {value!r}; "
        "write it with max-diffusion calibrate"
    )
