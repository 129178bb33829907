"""CLIP's and T5's tokenizers, from the files a model folder holds.

Ids equal those of transformers' ``CLIPTokenizer`` and ``T5TokenizerFast`` with
``padding="max_length", truncation=True``, without importing transformers (2 s).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from ..checkpoint.reading import check_file, read_json
from ..errors import ModelLoadError
from .tokenizer_files import (
    add_special_tokens,
    length_limit,
    read_merges,
    read_settings,
    read_tokenizer,
    special_token,
    token_id,
)

_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]"
    r"|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True)
class TokenBatch:
    """Several texts as token ids."""

    ids: np.ndarray
    """Token ids of each text, int64 ``(B, max_length)``, padded."""
    removed: tuple[str, ...]
    """The end of each text that did not fit, one per text; empty where all of it
    did."""


class AbstractTokenizer(ABC):
    """Turns texts into token ids of a fixed length.

    Args:
        model_max_length: Longest input the model was trained on, in tokens.
        prefix: Ids before the text.
        suffix: Ids after the text, kept when the text is cut.
        pad_token_id: Id that fills up to the length asked for.
    """

    def __init__(
        self,
        model_max_length: int,
        prefix: Sequence[int],
        suffix: Sequence[int],
        pad_token_id: int,
    ) -> None:
        self.model_max_length = model_max_length
        self.pad_token_id = pad_token_id
        self._prefix, self._suffix = list(prefix), list(suffix)

    def encode(self, texts: Sequence[str], max_length: int) -> TokenBatch:
        """Encodes each text as exactly ``max_length`` ids, special tokens included."""
        room = max_length - len(self._prefix) - len(self._suffix)
        ids = np.full((len(texts), max_length), self.pad_token_id, np.int64)
        removed = []
        for row, text in enumerate(texts):
            tokens, rest = self._tokens(text, room)
            filled = [*self._prefix, *tokens, *self._suffix]
            ids[row, : len(filled)] = filled
            removed.append(rest)
        return TokenBatch(ids, tuple(removed))

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest."""

    @abstractmethod
    def _tokens(self, text: str, room: int) -> tuple[list[int], str]:
        """Returns at most ``room`` ids of a text, and the text that did not fit."""


@final
class FastTokenizer(AbstractTokenizer):
    """Encodes with a ``tokenizers.Tokenizer``."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_max_length: int,
        prefix: Sequence[int],
        suffix: Sequence[int],
        pad_token_id: int,
    ) -> None:
        super().__init__(model_max_length, prefix, suffix, pad_token_id)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def _tokens(self, text: str, room: int) -> tuple[list[int], str]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= room:
            return encoding.ids, ""
        return encoding.ids[:room], text[encoding.offsets[room][0] :].strip()


def load_clip_tokenizer(path: Path) -> AbstractTokenizer:
    """Loads ``tokenizer.json``, else ``vocab.json`` and ``merges.txt``.

    Raises:
        ModelLoadError: Neither is there, or they are damaged.
    """
    settings = read_settings(path)
    start = special_token(settings.get("bos_token"), "<|startoftext|>")
    end = special_token(settings.get("eos_token"), "<|endoftext|>")
    unknown = special_token(settings.get("unk_token"), "<|endoftext|>")
    pad = special_token(settings.get("pad_token"), "<|endoftext|>")
    if (path / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(path / "tokenizer.json")
    else:
        tokenizer = _clip_from_vocabulary(path, unknown.content)
    add_special_tokens(tokenizer, path, settings, [end, unknown, pad, start])
    ids = [token_id(tokenizer, path, token.content) for token in (start, end, pad)]
    limit = length_limit(settings, 77)
    return FastTokenizer(tokenizer, limit, ids[:1], ids[1:2], ids[2])


def load_t5_tokenizer(path: Path) -> AbstractTokenizer:
    """Loads ``tokenizer.json``, else ``spiece.model``.

    Raises:
        ModelLoadError: Neither is there, or they are damaged.
    """
    settings = read_settings(path)
    end = special_token(settings.get("eos_token"), "</s>")
    unknown = special_token(settings.get("unk_token"), "<unk>")
    pad = special_token(settings.get("pad_token"), "<pad>")
    named = [end, unknown, pad]
    if (path / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(path / "tokenizer.json")
    else:
        extra = [f"<extra_id_{index}>" for index in range(_extra_ids(settings))]
        tokenizer = _t5_from_sentencepiece(path / "spiece.model", extra)
        named += [special_token(text, text) for text in extra]
    add_special_tokens(tokenizer, path, settings, named)
    ids = [token_id(tokenizer, path, token.content) for token in (end, pad)]
    return FastTokenizer(tokenizer, length_limit(settings, 512), (), ids[:1], ids[1])


def _t5_from_sentencepiece(path: Path, extra: Sequence[str]) -> Tokenizer:
    """Builds a unigram model of the pieces, then ``extra``, as transformers 5 does."""
    # Few folders need it, and it imports protobuf.
    from ..checkpoint.sentencepiece_file import read_sentencepiece

    if not path.is_file():
        raise ModelLoadError(
            f"{path.parent.name}: no tokenizer.json and no spiece.model; download the "
            "model again"
        )
    check_file(path)
    try:
        model = read_sentencepiece(path.read_bytes())
        vocabulary = [(piece.text, piece.score) for piece in model.pieces]
        # The last one comes first.
        vocabulary += [(text, 0.0) for text in reversed(extra)]
        tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
        if model.replacements:
            tokenizer.normalizer = normalizers.Precompiled(model.replacements)
    except Exception as err:  # the libraries raise bare Exception
        raise ModelLoadError(
            f"{path.parent.name}/spiece.model: damaged ({err}); download it again"
        ) from err
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    for piece in model.pieces:
        if piece.is_control or piece.is_user_defined:
            token = AddedToken(piece.text, normalized=False, special=piece.is_control)
            tokenizer.add_tokens([token])
    return tokenizer


def _clip_from_vocabulary(path: Path, unknown: str) -> Tokenizer:
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise ModelLoadError(
            f"{path.name}: no tokenizer.json, and not both vocab.json and merges.txt; "
            "download the model again"
        )
    check_file(merges)
    known, pairs = read_json(vocabulary), read_merges(merges)
    try:
        tokenizer = Tokenizer(
            models.BPE(
                vocab=known,
                merges=pairs,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
                fuse_unk=False,
                unk_token=unknown,
            )
        )
    except Exception as err:  # the library raises bare Exception
        raise ModelLoadError(
            f"{path.name}: vocab.json or merges.txt is damaged ({err}); download both "
            "again"
        ) from err
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _extra_ids(settings: Mapping[str, Any]) -> int:
    """Returns how many ``<extra_id_0>`` ... follow T5's pieces, the last one first."""
    value = settings.get("extra_ids", 100)
    if type(value) is not int or value < 0:
        raise ModelLoadError(
            f"tokenizer_config.json: extra_ids must be a whole number of 0 or more, "
            f"got {value!r}; download the tokenizer again"
        )
    return value
