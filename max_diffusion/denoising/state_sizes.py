"""How many bytes caches would keep, from the shapes of graphs that nobody compiles."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, get_args

from max.graph import Dim, Module, Shape, StaticDim

from graphs.denoiser import ModuleLevel, StepGraphs

from ..caches import StateSizes
from ..execution.graph_context import in_graph_context

if TYPE_CHECKING:
    from .denoiser import DenoiserComponent


class StateSizer:
    """Sizes of what a transformer gives, each found out once.

    Args:
        component: The transformer.
    """

    def __init__(self, component: DenoiserComponent) -> None:
        self._component = component
        # Facts of the model: nothing of a request is in them.
        self._elements: dict[str, tuple[int, int]] = {}

    @in_graph_context
    def of(
        self,
        shape: tuple[int, int, int],
        branches: int = 1,
        levels: Collection[str] = get_args(ModuleLevel),
        reference_tokens: int = 0,
    ) -> StateSizes:
        """What caches would keep, from the shapes of graphs that nobody compiles.

        Args:
            shape: ``(B, S_img, S_txt)``, of the tokens that are drawn.
            branches: 2 with true guidance.
            levels: Of the modules to look at; the first time a large model's take
                seconds.
            reference_tokens: Of a reference picture, which all blocks see.
        """
        batch, *lengths = (int(size) for size in shape)
        item = batch * self._component.denoiser().dtype.size_in_bytes
        image, text = lengths

        seen = image + reference_tokens

        def size(name: str, image: int = seen) -> int:
            of_image, of_text = self._token_elements(name)
            return item * (of_image * image + of_text * text)

        width = self._component.denoiser().width
        return StateSizes(
            prediction=size("output", image),
            image=item * seen * width,
            text=item * text * width,
            modulated_input=size("modulated_input"),
            modules={
                level: size(level) for level in get_args(ModuleLevel) if level in levels
            },
            branches=branches,
        )

    @in_graph_context
    def of_inputs(
        self, shape: tuple[int, int, int], branches: int = 1, reference_tokens: int = 0
    ) -> int:
        """Bytes of what steps are given beside latents: texts, and tables of positions.

        Args:
            shape: As for :meth:`of`.
            branches: As for :meth:`of`. What has no batch axis, both share.
            reference_tokens: As for :meth:`of`.
        """
        batch, image, text = (int(size) for size in shape)
        rows = Dim("batch")
        types = self._component.denoiser().input_types(
            "batch", image + reference_tokens, text
        )

        def length(dim: Dim) -> int:
            if isinstance(dim, StaticDim):
                return int(dim)
            # Another that is a request's own is of its text, part of it.
            return batch if dim == rows else text

        return sum(
            (branches if kind.shape[0] == rows else 1)
            * kind.dtype.size_in_bytes
            * math.prod(map(length, kind.shape))
            for name, kind in types.items()
            # Counted with the latents, and with the pictures.
            if name not in ("latents", "known")
        )

    def _token_elements(self, name: str) -> tuple[int, int]:
        """Elements of a kind of value for each image token, and each text token."""
        if name not in self._elements:
            # By these lengths, image, text and joint sequences are told apart.
            graphs = StepGraphs(
                Module(),
                self._component.denoiser(),
                self._component.weight_scope(is_plain=True),
                (1, 1, 2),
            )
            if name == "output":
                self._elements[name] = _elements([graphs.add_output()])
            elif name == "modulated_input":
                self._elements[name] = _elements([graphs.add_modulated_input()])
            else:
                for level, shapes in graphs.module_shapes().items():
                    self._elements[level] = _elements(shapes)
        return self._elements[name]


def _elements(shapes: Sequence[Shape]) -> tuple[int, int]:
    """Elements of all these for each image token, and each text token."""
    image = text = 0
    for _, length, width in shapes:
        image += int(width) * (int(length) in (1, 3))
        text += int(width) * (int(length) in (2, 3))
    return image, text
