"""LoRA files on one model: which of its matrices each changes, and by what."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, final

from graphs.weights import WeightSpec

from ..errors import ModelLoadError
from .computed import number
from .lora_file import LoraFile, LoraPair
from .reading import short_name, shown
from .tensors import AbstractTensor, MissingTensors, joined
from .weights import ComponentWeights, listed

_WEIGHT: Final = ".weight"
# Of a denoiser in files of ComfyUI, PEFT, and with no prefix at all.
_OF_DENOISER: Final = (
    "",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "base_model.model.transformer.",
)
_OF_UNETS: Final = re.compile(
    r"(down|up)_blocks[._]|(input|output|middle)_blocks?[._]|mid_block[._]"
    r"|lora_te2_text_model"
)


class Rows(Protocol):
    """Rows of a module that a file names otherwise, or fuses with others."""

    @property
    def module(self) -> str:
        """The file's name of the module, without a prefix."""

    def ranges(self, num_rows: int) -> Sequence[tuple[int, int]]:
        """First row and last + 1 of each range, in the order of our module's rows.

        Args:
            num_rows: Of all that the file's module holds of ours.
        """


Places = Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Sequence[Rows]]]
"""From the shapes of a component's matrices, by module, to where files may have each,
too."""


@final
@dataclass(frozen=True)
class LoraNaming:
    """How LoRA files call the modules of one component."""

    prefixes: tuple[str, ...]
    """What may precede a name with dots, such as ``transformer.``."""
    flat_prefixes: tuple[str, ...] = ()
    """What may precede one with underscores for dots, such as ``lora_unet_``."""
    places: Places | None = None
    """Other names, beside the model's own."""

    @classmethod
    def of(
        cls, component: str, *, is_denoiser: bool, places: Places | None = None
    ) -> LoraNaming:
        """The naming of a component that none of its family's says otherwise.

        Args:
            component: Its name.
            is_denoiser: Files also have its modules with no prefix, and as
                ``lora_unet_``.
            places: Other names.
        """
        prefixes: tuple[str, ...] = (f"{component}.",)
        flat: tuple[str, ...] = (f"lora_{component}_",)
        if is_denoiser:
            prefixes, flat = (*prefixes, *_OF_DENOISER), (*flat, "lora_unet_")
        return cls(prefixes, flat, places)

    def stems(self, module: str) -> Iterable[str]:
        """All names that a module's own name has in files."""
        for prefix in self.prefixes:
            yield prefix + module
        for prefix in self.flat_prefixes:
            yield prefix + module.replace(".", "_")


LoraComponents = Mapping[str, tuple[LoraNaming, Mapping[str, WeightSpec]]]
"""Components that may be adapted: how files name their modules, and the checkpoint
tensors that their graphs ask for."""


@final
@dataclass(frozen=True)
class Lora:
    """One LoRA file on one model."""

    path: Path
    adapters: Mapping[str, ComponentWeights]
    """By component, as :meth:`ComponentWeights.adapted` takes them."""
    changed: Mapping[str, frozenset[str]]
    """Names of the weights that it changes, by component."""

    @classmethod
    def open(cls, path: Path, components: LoraComponents) -> Lora:
        """Reads a file and finds the model's matrices that it changes.

        Raises:
            ModelLoadError: As of :meth:`LoraFile.read`; or a module of the file matches
                none of the model's, or has another width.
        """
        return _matched(LoraFile.read(path), _targets(components))


@final
@dataclass(frozen=True)
class _Target:
    """One of our modules, as rows of one of a file's."""

    component: str
    module: str
    shape: tuple[int, ...]
    rows: Rows | None
    """``None`` for all of them."""

    def taken(self, up: AbstractTensor) -> AbstractTensor:
        """This module's rows of a file's matrix."""
        if self.rows is None:
            return up
        ranges = self.rows.ranges(up.shape[0])
        parts = [up.sliced(0, *each) for each in ranges]
        return parts[0] if len(parts) == 1 else joined(parts)


def _targets(components: LoraComponents) -> dict[str, list[_Target]]:
    """Our modules by every name that a file may have for what holds them."""
    found: dict[str, list[_Target]] = {}
    for component, (naming, specs) in components.items():
        shapes = {
            name.removesuffix(_WEIGHT): spec.shape
            for name, spec in specs.items()
            if name.endswith(_WEIGHT) and len(spec.shape) > 1
        }
        places = naming.places(shapes) if naming.places else {}
        for module, shape in shapes.items():
            for stem in naming.stems(module):
                target = _Target(component, module, shape, None)
                found.setdefault(stem, []).append(target)
            for rows in places.get(module, ()):
                target = _Target(component, module, shape, rows)
                for stem in naming.stems(rows.module):
                    found.setdefault(stem, []).append(target)
    return found


def _matched(file: LoraFile, targets: Mapping[str, Sequence[_Target]]) -> Lora:
    strangers: list[str] = []
    misfits: list[str] = []
    twice: list[str] = []
    halves: dict[str, dict[str, AbstractTensor]] = {}
    owners: dict[tuple[str, str], str] = {}
    for stem, pair in file.pairs.items():
        own = targets.get(stem, ())
        if not own:
            strangers.append(shown(stem))
            continue
        down, up = _as_matrices(pair, own[0].shape)
        rows = sum(target.shape[0] for target in own)
        if down.shape[1:] != own[0].shape[1:] or up.shape[0] != rows:
            wanted = (rows, *own[0].shape[1:])
            shape = (up.shape[0], *down.shape[1:])
            misfits.append(f"{shown(stem)} (changes {shape}, here {wanted})")
            continue
        for target in own:
            first = owners.setdefault((target.component, target.module), stem)
            if first != stem:
                twice.append(f"{target.module} ({shown(first)} and {shown(stem)})")
            halves.setdefault(target.component, {}).update(
                {
                    f"{target.module}.lora_A.weight": down,
                    f"{target.module}.lora_B.weight": target.taken(up),
                    f"{target.module}.alpha": number(pair.alpha),
                }
            )
    _check(file, strangers, misfits, twice)
    changed: dict[str, set[str]] = {}
    for component, module in owners:
        changed.setdefault(component, set()).add(module + _WEIGHT)
    return Lora(
        file.path,
        {name: _weights(name, tensors) for name, tensors in halves.items()},
        {name: frozenset(names) for name, names in changed.items()},
    )


def _as_matrices(
    pair: LoraPair, shape: tuple[int, ...]
) -> tuple[AbstractTensor, AbstractTensor]:
    """A pair without the axes of one element that some files have for linear layers."""
    down: AbstractTensor = pair.down
    up: AbstractTensor = pair.up
    if len(shape) == 2:
        if all(size == 1 for size in down.shape[2:]):
            down = down.reshaped(*down.shape[:2])
        up = up.reshaped(*up.shape[:2])
    return down, up


def _check(
    file: LoraFile,
    strangers: Sequence[str],
    misfits: Sequence[str],
    twice: Sequence[str],
) -> None:
    total = len(file.pairs)
    problems = [
        f"{len(names)} of {total} modules {what}: {listed(names)}"
        for what, names in (
            ("match nothing in this model", strangers),
            ("are of another width", misfits),
            ("change what another does", twice),
        )
        if names
    ]
    if problems:
        is_unet = any(_OF_UNETS.search(name) for name in strangers)
        what = "it is of a Stable Diffusion UNet; " if is_unet else ""
        raise ModelLoadError(
            f"lora {short_name(file.path)}: {'; '.join(problems)}; {what}give one that "
            "was trained on this model"
        )


def _weights(component: str, tensors: Mapping[str, AbstractTensor]) -> ComponentWeights:
    def find(name: str) -> AbstractTensor:
        if name not in tensors:
            raise MissingTensors([name])
        return tensors[name]

    # What is stored is all used, which was checked by the file's own names.
    return ComponentWeights(component, {}, find)
