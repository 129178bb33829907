"""One file of weights outside of a model folder: safetensors or GGUF."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, final

from ..errors import ModelLoadError, RequestError
from .gguf_file import MAGIC, Value, read_gguf
from .reading import check_file, short_name
from .safetensors_file import read_file
from .tensors import AbstractStoredTensor
from .weights import ComponentWeights, WeightTransform

# What torch.save writes: a zip file, or of old a pickle.
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")
# A safetensors header is a JSON object after its length.
_BRACE: Final = 8


@final
@dataclass(frozen=True)
class CheckpointFile:
    """A file's header; no tensor is read."""

    path: Path
    tensors: Mapping[str, AbstractStoredTensor]
    """By name."""
    told: Mapping[str, Value]
    """What the file says of itself: a safetensors' ``__metadata__``, a GGUF's keys."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], what: str) -> CheckpointFile:
        """Reads the header of a file, whatever it is called.

        Args:
            path: The file.
            what: The argument, for messages, such as ``transformer``.

        Raises:
            RequestError: The path is no path.
            ModelLoadError: There is no such file, or it is neither a safetensors nor a
                GGUF file, or damaged.
        """
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise RequestError(f"{what}: expected the path of a file, got {path!r}")
        file = Path(path)
        _check_there(file, what)
        check_file(file)
        with file.open("rb") as opened:
            head = opened.read(_BRACE + 1)
        if head.startswith(MAGIC):
            header = read_gguf(file)
            return cls(file, header.tensors, header.values)
        if head.startswith(_PICKLES):
            raise ModelLoadError(
                f"{what}: {short_name(file)} is a pickle, which is not read: it may "
                "hold any program; save the weights as safetensors"
            )
        if head[_BRACE:] != b"{":
            raise ModelLoadError(
                f"{what}: {short_name(file)} is neither a safetensors nor a GGUF file; "
                "check the path, or download it again"
            )
        tensors, told = read_file(file)
        return cls(file, tensors, told)

    def weights_of(self, component: str) -> ComponentWeights:
        """All of the file's tensors, for messages those of a component."""
        return ComponentWeights(f"{component} of {self.path.name}", self.tensors)


class PartsOfFile(Protocol):
    """Says, of a model family, which components a file holds and how each is read."""

    def __call__(self, file: CheckpointFile, /) -> Mapping[str, WeightTransform]:
        """Returns them by component; reads nothing yet.

        Args:
            file: Outside of a model folder.

        Returns:
            What makes of all of the file's tensors those that the component's graphs
            ask for; of the transformer at least.

        Raises:
            ModelLoadError: It is of another model, or holds what is not known.
        """
        ...


def _check_there(file: Path, what: str) -> None:
    try:
        is_folder, is_there = file.is_dir(), file.exists()
    except (OSError, ValueError):  # a name too long, a null byte
        is_folder = is_there = False
    if is_folder:
        raise ModelLoadError(
            f"{what}: {file} is a folder; expected one file of weights, safetensors or "
            "GGUF; a model's folder is given as the model"
        )
    if not is_there:
        raise ModelLoadError(f"{what}: no file {str(file)!r:.200}; check the path")
