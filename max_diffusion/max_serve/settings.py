"""What the operator of ``max serve`` chooses, beside MAX's own flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from ..caches import CACHES
from ..checks import whole
from ..errors import RequestError
from ..types import MAX_PICTURES, MAX_SIZE, MAX_STEPS

_PREFIX: Final = "MAX_DIFFUSION_"


@dataclass(frozen=True)
class ServeSettings:
    """Caches and limits; ``MAX_DIFFUSION_CACHES`` sets ``caches``, and so on.

    Attributes:
        caches: Caches that requests may name, separated by commas, or ``all``. Only
            these are compiled, and each kind takes minutes the first time.
        max_prompt_length: Characters of a prompt, of a negative one, and of an entry of
            ``metadata``.
        max_n: Pictures of a request.
        max_size: Pixels a side.
        max_steps: Denoising steps.
    """

    caches: tuple[str, ...] = ("none", "taylorseer")
    max_prompt_length: int = 32_000
    max_n: int = 10
    max_size: int = 2048
    max_steps: int = 200

    def __post_init__(self) -> None:
        """Checks names and ranges."""
        for name in self.caches:
            if name not in CACHES:
                raise RequestError(
                    f"{_PREFIX}CACHES: expected all, or names of {', '.join(CACHES)}, "
                    f"got {name!r}"
                )
        for name, limit in (
            ("max_prompt_length", None),
            ("max_n", MAX_PICTURES),
            ("max_size", MAX_SIZE),
            ("max_steps", MAX_STEPS),
        ):
            whole(_variable(name), getattr(self, name), minimum=1, maximum=limit)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ServeSettings:
        """Reads what is set; the rest keeps its default.

        Raises:
            RequestError: A variable is no number or name, or out of range.
        """
        given: dict[str, object] = {}
        for item in fields(cls):
            text = environment.get(_variable(item.name))
            if text is None:
                continue
            if item.name == "caches":
                names = tuple(name.strip() for name in text.split(","))
                given[item.name] = tuple(CACHES) if names == ("all",) else names
                continue
            try:
                given[item.name] = int(text)
            except ValueError as err:
                raise RequestError(
                    f"{_variable(item.name)}: expected a whole number, got {text!r}"
                ) from err
        return cls(**given)  # type: ignore[arg-type]  # checked in __post_init__


def _variable(name: str) -> str:
    return _PREFIX + name.upper()
