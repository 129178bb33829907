"""What the operator of ``max serve`` chooses, beside MAX's own flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final

from ...caches import (
    AbstractCacheConfig,
    NoCacheConfig,
    TaylorSeerConfig,
    caches_from_text,
)
from ...core.loras import files_by_name
from ...core.request import MAX_IMAGES, MAX_SIZE, MAX_STEPS
from ...core.validation import whole
from ...errors import RequestError
from ...plugins import load_plugins

_PREFIX: Final = "MAX_DIFFUSION_"


@dataclass(frozen=True)
class ServeSettings:
    """Caches and limits; ``MAX_DIFFUSION_CACHES`` sets ``caches``, and so on.

    Attributes:
        plugins: Modules or ``.py`` files, separated by commas, that register caches; as
            ``serve --plugin``.
        caches: Caches that requests may name; in the environment as ``serve --caches``
            takes them. Only these are compiled, and each kind takes minutes the first
            time.
        transformer: File of the transformer's weights, instead of the model's.
        loras: Files of LoRAs by the names that requests choose them by; in the
            environment as ``NAME=FILE,NAME=FILE``.
        lora_memory: Most bytes of the matrices that these change, as ``serve
            --lora-memory``; ``None`` is a quarter of what the worker's device has free.
        pictures: ``1`` where requests may bring pictures to start from, ``0``
            otherwise; a model that needs some takes them in any case.
        precompiled: Folders of ``max-diffusion compile``, separated by commas.
        require_precompiled: ``1`` where nothing may be compiled, ``0`` otherwise.
        max_prompt_length: Most characters of a prompt, of a negative prompt, and of an
            entry of ``metadata``.
        max_n: Most images of a request.
        max_size: Most pixels of an image's side.
        max_steps: Most denoising steps of a request.
        max_frames: Most frames of a video.
    """

    plugins: tuple[str, ...] = ()
    caches: tuple[AbstractCacheConfig, ...] = (NoCacheConfig(), TaylorSeerConfig())
    transformer: str | None = None
    loras: Mapping[str, str] = field(default_factory=dict)
    lora_memory: int | None = None
    pictures: int = 0
    precompiled: tuple[str, ...] = ()
    require_precompiled: int = 0
    max_prompt_length: int = 32_000
    max_n: int = 10
    max_size: int = 2048
    max_steps: int = 200
    max_frames: int = 161

    def __post_init__(self) -> None:
        """Checks the range of each limit."""
        if self.lora_memory is not None:
            whole(_variable("lora_memory"), self.lora_memory, minimum=1)
            if not self.loras:
                raise RequestError(
                    f"{_variable('lora_memory')}: has no effect without "
                    f"{_variable('loras')}; leave it out, or name files"
                )
        for name in ("pictures", "require_precompiled"):
            whole(_variable(name), getattr(self, name), minimum=0, maximum=1)
        for name, limit in (
            ("max_prompt_length", None),
            ("max_frames", None),
            ("max_n", MAX_IMAGES),
            ("max_size", MAX_SIZE),
            ("max_steps", MAX_STEPS),
        ):
            whole(_variable(name), getattr(self, name), minimum=1, maximum=limit)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ServeSettings:
        """Reads the variables that are set; the rest keeps its default.

        Raises:
            RequestError: A variable is no number or name, or out of range; a plugin
                fails.
        """
        given: dict[str, object] = {}
        for item in fields(cls):
            text = environment.get(_variable(item.name))
            if text is None:
                continue
            if item.name == "plugins":
                given[item.name] = names = tuple(filter(None, text.split(",")))
                load_plugins(names, _variable(item.name))  # before caches are named
                continue
            if item.name == "precompiled":
                given[item.name] = tuple(filter(None, text.split(",")))
                continue
            if item.name == "loras":
                texts = tuple(filter(None, text.split(",")))
                given[item.name] = files_by_name(_variable(item.name), texts)
                continue
            if item.name == "transformer":
                given[item.name] = text
                continue
            if item.name == "caches":
                given[item.name] = caches_from_text(text, _variable(item.name))
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
