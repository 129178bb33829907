"""SentencePiece models, as far as T5's tokenizer needs them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from ..errors import ModelLoadError

# Kinds of pieces, of which a text's own words are normal ones.
_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Piece:
    """A word or a part of one; its id is its place."""

    text: str
    score: float
    """Logarithm of its probability."""
    kind: int = 1

    @property
    def is_control(self) -> bool:
        """Whether it stands for no text, as an end token does."""
        return self.kind == _CONTROL

    @property
    def is_user_defined(self) -> bool:
        """Whether it is cut out of a text before all else."""
        return self.kind == _USER_DEFINED


@dataclass(frozen=True)
class SentencePieceModel:
    """What a ``spiece.model`` holds."""

    pieces: tuple[Piece, ...]
    replacements: bytes
    """Rules that normalise text, compiled; empty for none."""


def read_sentencepiece(data: bytes) -> SentencePieceModel:
    """Reads a model, a protocol buffer of sentencepiece's ``ModelProto``.

    Raises:
        ModelLoadError: It has no pieces, or is damaged.
    """
    pieces, replacements = [], b""
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(value))
            score = struct.unpack("<f", struct.pack("<I", fields[2]))[0]
            pieces.append(Piece(fields[1].decode(), score, fields.get(3, 1)))
        elif number == 3:
            replacements = dict(_fields(value)).get(2, b"")
    if not pieces:
        raise ModelLoadError("no pieces")
    return SentencePieceModel(tuple(pieces), replacements)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: bytes, or an integer of the bits."""
    # A message without fields keeps those it does not know, so that none of
    # sentencepiece's own definitions is needed, which want a protobuf of their version.
    for field in UnknownFieldSet(Empty.FromString(message)):
        yield field.field_number, field.data
