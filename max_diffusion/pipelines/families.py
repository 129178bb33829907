"""The model families there are, and the options that their requests have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from importlib import import_module
from types import MappingProxyType
from typing import Final

from ..core.options import DeclaredOption, RequestOptions, declared_options
from ..core.report import RunReport
from ..core.request import GenerationRequest
from ..core.setting_names import RESERVED
from ..errors import RequestError
from .text_to_image import TextToImagePipeline

# Saved by diffusers' classes for other tasks, with the parts of FluxPipeline.
OTHER_TASKS: Final = ("FluxImg2ImgPipeline", "FluxInpaintPipeline")
# A family of the package is imported when a folder needs it. The one thing that grows:
# like an import, a registration is of the whole process.
_kinds: Final[dict[str, tuple[str, str] | type[TextToImagePipeline]]] = {
    **dict.fromkeys(
        ("FluxPipeline", *OTHER_TASKS), ("max_diffusion.models.flux1", "Flux1Pipeline")
    ),
    "FluxKontextPipeline": ("max_diffusion.models.flux1", "Flux1KontextPipeline"),
    "FluxFillPipeline": ("max_diffusion.models.flux1", "Flux1FillPipeline"),
    "CogVideoXPipeline": ("max_diffusion.models.cogvideox", "CogVideoXPipeline"),
    "QwenImagePipeline": ("max_diffusion.models.qwen_image", "QwenImagePipeline"),
    "Flux2Pipeline": ("max_diffusion.models.flux2", "Flux2Pipeline"),
    "Flux2KleinPipeline": ("max_diffusion.models.flux2", "Flux2KleinPipeline"),
    "ZImagePipeline": ("max_diffusion.models.z_image", "ZImagePipeline"),
}
PIPELINES: Final[Mapping[str, tuple[str, str] | type[TextToImagePipeline]]] = (
    MappingProxyType(_kinds)
)
"""Pipelines by the ``_class_name`` that a model folder's ``model_index.json`` has;
shows what is registered later, too."""


# What options of a family may not be called: settings of every model, and what reports
# say beside them.
_TAKEN: Final = frozenset(
    (
        *(
            item.name
            for kind in (GenerationRequest, RunReport)
            for item in fields(kind)
        ),
        *RESERVED,
    )
)


def register_model(class_name: str, kind: type[TextToImagePipeline]) -> None:
    """Makes a model family known, by what its folders call themselves.

    From then on ``load_pipeline``, the command line, the engine and the servers take
    such folders as they take the package's own families.

    Args:
        class_name: ``_class_name`` in the folder's ``model_index.json``.
        kind: The family's pipeline, with ``components`` and ``class_names``.

    Raises:
        RequestError: It lacks something, or the name is taken.
    """
    where = f"register_model: {class_name}"
    if not (isinstance(kind, type) and issubclass(kind, TextToImagePipeline)):
        raise RequestError(
            f"{where}: expected a subclass of TextToImagePipeline, got {kind!r}"
        )
    missing = sorted(kind.__abstractmethods__)
    if missing:
        raise RequestError(f"{where}: {kind.__qualname__} lacks {', '.join(missing)}")
    roles = set(kind.components or ())
    if not roles or not roles <= set(getattr(kind, "class_names", ())):
        raise RequestError(
            f"{where}: {kind.__qualname__} must have components, and their classes in "
            "class_names"
        )
    known = _kinds.get(class_name)
    # Raises where it declares what another family has of another type.
    _merged({**_options_by_class(), class_name: kind.options_class})
    if known is not None and known is not kind:
        raise RequestError(f"{where} is taken already; choose another name")
    _kinds[class_name] = kind


def pipeline_class(class_name: str) -> type[TextToImagePipeline]:
    """A family of :data:`PIPELINES`, imported if need be."""
    found = PIPELINES[class_name]
    if isinstance(found, tuple):
        module, name = found
        kind: type[TextToImagePipeline] = vars(import_module(module))[name]
        return kind
    return found


def declared_by_all() -> Mapping[str, DeclaredOption]:
    """The options of all known families by name, each with its widest range.

    What an option does is told of each family that says it in other words.

    Imports every family.
    """
    return _merged(_options_by_class())


def _options_by_class() -> dict[str, type[RequestOptions]]:
    return {name: pipeline_class(name).options_class for name in PIPELINES}


def _merged(
    kinds: Mapping[str, type[RequestOptions]],
) -> Mapping[str, DeclaredOption]:
    found: dict[str, tuple[str, DeclaredOption]] = {}
    for owner, kind in kinds.items():
        for name, declared in declared_options(kind, _TAKEN).items():
            first, known = found.setdefault(name, (owner, declared))
            if known.kind is not declared.kind:
                raise RequestError(
                    f"register_model: {owner}: its option {name} is of type "
                    f"{declared.kind.__name__}, and {first}'s is of type "
                    f"{known.kind.__name__}; choose another name"
                )
            words = known.help
            if declared.help not in words:
                words = f"{words}. Of {owner}: {declared.help}"
            found[name] = (
                first,
                replace(
                    known,
                    help=words,
                    minimum=_widest(min, known.minimum, declared.minimum),
                    maximum=_widest(max, known.maximum, declared.maximum),
                ),
            )
    return {name: declared for name, (_, declared) in found.items()}


def _widest(
    choose: Callable[[float, float], float], one: float | None, other: float | None
) -> float | None:
    return None if one is None or other is None else choose(one, other)
