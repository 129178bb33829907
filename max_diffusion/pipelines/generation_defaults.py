"""What a model's folder says that requests take where they leave it open."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self

from ..core.validation import not_negative, whole
from ..errors import ModelLoadError, RequestError

if TYPE_CHECKING:
    from .text_to_image import TextToImagePipeline

DEFAULTS_FILE: Final = "generation_defaults.json"
_CHECKS: Final[Mapping[str, Callable[[str, Any], Any]]] = MappingProxyType(
    {"num_inference_steps": partial(whole, minimum=1)}
)
"""Of numbers that are other than 0 or more."""


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of one folder, for a model that wants others than its family.

    Attributes:
        num_inference_steps: Denoising steps, at least 1.
        guidance_scale: What the transformer is told, 0 or more.
        true_cfg_scale: Weight of classifier-free guidance, 0 or more; 1 is off.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads ``generation_defaults.json``; a folder without one has none.

        Raises:
            ModelLoadError: It is no JSON, names something else, or a value is out of
                range.
        """
        path = folder / DEFAULTS_FILE
        if not path.is_file():
            return cls()
        try:
            entries = json.loads(path.read_text(encoding="utf-8-sig"))
        except OSError as err:
            raise ModelLoadError(f"cannot read {path}: {err.strerror}") from err
        except (ValueError, RecursionError) as err:
            raise ModelLoadError(f"{path} is no JSON: {err}") from err
        names = [field.name for field in fields(cls)]
        if not isinstance(entries, Mapping) or not set(entries) <= set(names):
            raise ModelLoadError(
                f"{path} may hold {', '.join(names)} and nothing else, got "
                f"{json.dumps(entries):.80}"
            )
        try:
            return cls(
                **{
                    name: _CHECKS.get(name, not_negative)(f"{path}: {name}", value)
                    for name, value in entries.items()
                }
            )
        except RequestError as err:
            raise ModelLoadError(str(err)) from err

    def set_on(self, pipeline: TextToImagePipeline) -> None:
        """Makes these the pipeline's.

        Raises:
            ModelLoadError: A guidance scale, of a model that is told none.
        """
        if self.num_inference_steps is not None:
            pipeline.default_num_inference_steps = self.num_inference_steps
        if self.guidance_scale is not None:
            if not pipeline.has_guidance:
                raise ModelLoadError(
                    f"{DEFAULTS_FILE}: guidance_scale has no effect on a model that is "
                    "told none; true_cfg_scale guides any"
                )
            pipeline.default_guidance_scale = self.guidance_scale
        if self.true_cfg_scale is not None:
            pipeline.default_true_cfg_scale = self.true_cfg_scale
        pipeline.own_defaults = self

    @property
    def sources(self) -> Mapping[str, str]:
        """The file, by the names of what it says."""
        given = {name for name, value in vars(self).items() if value is not None}
        return dict.fromkeys(given, DEFAULTS_FILE)
