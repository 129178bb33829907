"""A component's weights: strict against what its graphs ask for, cast on request."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

import numpy as np
from max.driver import Buffer
from max.dtype import DType

from graphs.weights import WeightSlot, WeightSpec

from ..errors import ModelLoadError
from .casting import FLOATS, blamed, read_as
from .computed import FLOAT8, adapted, decoded, scaled
from .packing import packed
from .reading import FileStamp, shown
from .safetensors_file import read_header
from .tensors import (
    AbstractStoredTensor,
    AbstractTensor,
    MissingTensors,
    NonFiniteTensor,
    UnfitTensor,
    origin,
)

_SHOWN = 10
# That pack: each holds a tensor in memory.
_THREADS = 2


@final
class ComponentWeights:
    """The tensors of one component by the names its graphs ask for; not read.

    A name finds a tensor of the files, or what is made of some of them. Every method
    that says how returns other weights over the same files, so one may follow another:
    ``weights.under("vae.").dequantised(scale_name).through(recipe)``.

    Args:
        name: The component, for messages.
        tensors: All that is stored, by name.
        find: The tensor that a name stands for; may raise MissingTensors or
            UnfitTensor. Default the stored one of that name.
        adapters: What is stored of adapters, which no pattern for the model excuses.
        names: That may be asked for, as far as is known; default the stored ones.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, AbstractStoredTensor],
        find: Callable[[str], AbstractTensor] | None = None,
        adapters: Sequence[AbstractStoredTensor] = (),
        names: Collection[str] | None = None,
    ) -> None:
        self.name = name
        self.tensors = tensors
        """What is stored and has to be used, by name."""
        self.names = frozenset(tensors if names is None else names)
        """What graphs may see of it: compiled ones are found by these names."""
        self._find = find or self._stored
        self._adapters = tuple(adapters)

    @classmethod
    def from_files(cls, name: str, files: Sequence[Path]) -> ComponentWeights:
        """Reads the headers of one component's files.

        Raises:
            ModelLoadError: A file is damaged, or two hold the same tensor.
        """
        tensors: dict[str, AbstractStoredTensor] = {}
        for path in files:
            for key, tensor in read_header(path).items():
                if key in tensors:
                    raise ModelLoadError(
                        f"{name}: {shown(key)} is in {tensors[key].file.name} and in "
                        f"{path.name}; remove the file that does not belong"
                    )
                tensors[key] = tensor
        return cls(name, tensors)

    def __getitem__(self, name: str) -> AbstractTensor:
        """The tensor that ``name`` stands for.

        Raises:
            MissingTensors: The files lack what it is made of.
            UnfitTensor: Their shapes do not allow it.
        """
        return self._find(name)

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def get(self, name: str) -> AbstractTensor | None:
        """The tensor that ``name`` stands for; ``None`` if the files lack it.

        Raises:
            UnfitTensor: What it is made of has shapes that do not allow it.
        """
        try:
            return self._find(name)
        except MissingTensors:
            return None

    def all(self, *names: str) -> list[AbstractTensor]:
        """Several tensors, of which one is to be made.

        Raises:
            MissingTensors: Names all that are missing.
            UnfitTensor: A shape does not allow one of them.
        """
        found: list[AbstractTensor] = []
        missing: list[str] = []
        stored: list[AbstractStoredTensor] = []
        for name in names:
            try:
                found.append(self._find(name))
                stored += found[-1].stored
            except MissingTensors as err:
                missing += err.names
                stored += err.stored
        if missing:
            raise MissingTensors(missing, stored)
        return found

    def through(
        self,
        recipe: Callable[[ComponentWeights, str], AbstractTensor],
        names: Collection[str] | None = None,
    ) -> ComponentWeights:
        """Each tensor made by a recipe.

        Args:
            recipe: Given these weights and the name asked for.
            names: What it makes, where that is known: with those of a plain file,
                graphs that were compiled for one are found without building any.
        """
        names = self.names if names is None else names
        return self._over(self.tensors, lambda name: recipe(self, name), names)

    def renamed(
        self, names: Mapping[str, str] | Callable[[str], str]
    ) -> ComponentWeights:
        """Tensors under other names.

        Args:
            names: From the name asked for to the one it is found under here; what a
                mapping leaves out keeps its name.
        """
        if isinstance(names, Mapping):
            return self.through(lambda weights, name: weights[names.get(name, name)])
        return self.through(lambda weights, name: weights[names(name)])

    def under(self, prefix: str) -> ComponentWeights:
        """Only what is stored under a prefix, without it: the rest is another's."""
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }
        return self._over(tensors, lambda name: self._find(prefix + name))

    def without(self, *patterns: str) -> ComponentWeights:
        """What matches a pattern may be left over, such as marks of a format."""
        tensors = {
            name: tensor
            for name, tensor in self.tensors.items()
            if not _matches(name, patterns)
        }
        return self._over(tensors, self._find)

    def dequantised(
        self, scale_name: Callable[[str], str], block: Sequence[int] | None = None
    ) -> ComponentWeights:
        """Tensors with a scale multiplied by it, float8 without one as its numbers.

        Args:
            scale_name: From a tensor's name to its scale's, if it has one.
            block: As for :func:`~.computed.scaled`.
        """

        def recipe(weights: ComponentWeights, name: str) -> AbstractTensor:
            values, other = weights[name], scale_name(name)
            scale = None if other == name else weights.get(other)
            if scale is not None:
                return scaled(values, scale, block)
            return decoded(values) if values.dtype in FLOAT8 else values

        scales = {scale_name(name) for name in self.names if scale_name(name) != name}
        return self.through(recipe, self.names - scales)

    def adapted(
        self, adapter: ComponentWeights, strength: float = 1.0
    ) -> ComponentWeights:
        """Merges a low-rank adapter.

        Args:
            adapter: To a matrix ``x.weight``, ``x.lora_A.weight``, ``x.lora_B.weight``
                and, if it is not the rank, ``x.alpha``. What of it fits no tensor that
                is asked for is unused.
            strength: 1 as it was trained.
        """

        def find(name: str) -> AbstractTensor:
            weight, stem = self._find(name), name.removesuffix(".weight")
            pair = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
            down, up = map(adapter.get, pair)
            if stem == name or down is None or up is None:
                return weight
            alpha = adapter.get(f"{stem}.alpha")
            return adapted(weight, down, up, alpha, strength)

        # Not by name: several adapters hold tensors of the same ones.
        adapters = (*self._adapters, *adapter.tensors.values())
        return ComponentWeights(self.name, self.tensors, find, adapters, self.names)

    def problems(
        self, expected: Mapping[str, WeightSpec], ignore: Sequence[str] = ()
    ) -> list[str]:
        """What keeps these weights from being those that the graphs ask for.

        Args:
            expected: Shape and dtype of every weight asked for.
            ignore: Patterns of names that may be left over.

        Returns:
            One text a kind (missing, unused, wrong shape, wrong dtype), with the count
            and the first names; empty if all is well.
        """
        missing, shapes, dtypes = [], [], []
        used: set[AbstractStoredTensor] = set()
        for key, spec in expected.items():
            try:
                tensor = self[key]
            except MissingTensors as err:
                used.update(err.stored)
                is_same = err.names == (key,)
                files = "" if is_same else f" ({', '.join(err.names)} in the files)"
                missing.append(key + files)
                continue
            except UnfitTensor as err:
                used.update(err.stored)
                shapes.append(f"{key} ({err})")
                continue
            used.update(tensor.stored)
            made = origin(key, tensor)
            made = made and f" from {made}"
            if tensor.shape != spec.shape:
                shapes.append(
                    f"{key} (expected {spec.shape}, got {tensor.shape}{made})"
                )
            if tensor.dtype not in (spec.dtype, *FLOATS):
                code = "/".join(dict.fromkeys(item.code for item in tensor.stored))
                dtype = tensor.dtype.name if tensor.dtype else code
                dtypes.append(f"{key} ({dtype}{made})")
        unused = [
            shown(tensor.name)
            for key, tensor in self.tensors.items()
            if tensor not in used and not _matches(key, ignore)
        ]
        unused += [
            shown(tensor.name) for tensor in self._adapters if tensor not in used
        ]
        kinds = {
            "missing": missing,
            "unused": unused,
            "of the wrong shape": shapes,
            "of a dtype that cannot be cast": dtypes,
        }
        return [
            f"{self.name}: {len(names)} weights {kind}: {listed(names)}"
            for kind, names in kinds.items()
            if names
        ]

    def load(
        self, slots: Mapping[str, WeightSlot], *, check_finite: bool = True
    ) -> dict[str, np.ndarray | Buffer]:
        """What fills every slot, in its dtype; one tensor after the other.

        What lies in a file as it is asked for is mapped without a copy, the rest is
        made and cast.

        Args:
            slots: What the graphs asked for; :meth:`problems` found none.
            check_finite: Refuse NaN and infinity, of the files and of what is made of
                them; reads every weight once.

        Raises:
            NonFiniteTensor: A weight is not finite; ``stored`` is what is to blame.
            ModelLoadError: A file has changed since its header was read, or is gone.
        """
        for stamp in self._stamps(slots):
            stamp.check()
        broken: dict[str, DType] = {}

        def read(name: str, slot: WeightSlot) -> np.ndarray:
            tensor = self[name]
            if slot.columns is not None:
                tensor = tensor.sliced(1, *slot.columns)
            found, is_finite = read_as(tensor, slot.dtype, check_finite=check_finite)
            if not is_finite:
                broken[name] = slot.dtype
            return found

        def filled(slot: WeightSlot) -> np.ndarray | Buffer | None:
            # One by one: a joined matrix may be several that are computed.
            parts = (read(name, slot) for name in slot.tensors)
            if broken:
                for _ in parts:  # only looked at, to tell all that are broken
                    pass
                return None
            if slot.is_packed:
                return packed(slot, parts)
            bits = list(parts)
            return _viewed(bits[0] if len(bits) == 1 else np.concatenate(bits), slot)

        arrays = {
            key: filled(slot) for key, slot in slots.items() if not slot.is_packed
        }
        # Two at a time: packing is copying, for which Python is let go.
        rest = {key: slot for key, slot in slots.items() if slot.is_packed}
        with ThreadPoolExecutor(_THREADS) as pool:
            arrays |= dict(zip(rest, pool.map(filled, rest.values()), strict=True))
        if broken:
            asked = dict.fromkeys(
                name for slot in slots.values() for name in slot.tensors
            )
            raise self._non_finite({n: broken[n] for n in asked if n in broken})
        return {key: array for key, array in arrays.items() if array is not None}

    def _stamps(self, slots: Mapping[str, WeightSlot]) -> Iterable[FileStamp]:
        """Of the files that fill slots, each once."""
        names = {name for slot in slots.values() for name in slot.tensors}
        stored = (item for name in names for item in self[name].stored)
        stamps = {id(item.stamp): item.stamp for item in stored if item.stamp}
        return dict.fromkeys(stamps.values())

    def _non_finite(self, broken: Mapping[str, DType]) -> NonFiniteTensor:
        """Tells of weights by what is to blame, each with the dtype asked for."""
        kinds: dict[tuple[str, str], list[str]] = {}
        culprits: list[AbstractStoredTensor] = []
        for name, dtype in broken.items():
            tensor = self[name]
            problem, advice, stored = blamed(tensor, dtype)
            culprits += stored
            made = origin(name, tensor)
            names = kinds.setdefault((problem, advice), [])
            names.append(name + (made and f" (from {made})"))
        problems = [
            f"{len(names)} weights {problem}: {listed(names)}; {advice}"
            for (problem, advice), names in kinds.items()
        ]
        return NonFiniteTensor(f"{self.name}: {'; '.join(problems)}", culprits)

    def _over(
        self,
        tensors: Mapping[str, AbstractStoredTensor],
        find: Callable[[str], AbstractTensor],
        names: Collection[str] | None = None,
    ) -> ComponentWeights:
        return ComponentWeights(self.name, tensors, find, self._adapters, names)

    def _stored(self, name: str) -> AbstractTensor:
        if name not in self.tensors:
            raise MissingTensors([name])
        return self.tensors[name]


WeightTransform = Callable[[Mapping[str, Any], ComponentWeights], ComponentWeights]
"""From a component's ``config.json`` and the tensors of its files to those that its
graphs ask for. Reads nothing yet."""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _viewed(bits: np.ndarray, slot: WeightSlot) -> np.ndarray | Buffer:
    if slot.dtype == DType.bfloat16:
        # numpy has no bfloat16: the buffer reads the same bytes as one.
        return Buffer.from_numpy(bits).view(DType.bfloat16, slot.shape)
    return bits


def listed(names: Sequence[str]) -> str:
    """The first names of a problem, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
