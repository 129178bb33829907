"""CLIP's and T5's tokenizers, from the files a model folder holds.

Ids equal those of transformers' ``CLIPTokenizer`` and ``T5TokenizerFast`` with
``padding="max_length", truncation=True``, without importing transformers (2 s).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from .checkpoint.folder import read_json
from .errors import ModelLoadError
from .files import read_lines

# transformers writes 1e30 for "no limit".
_NO_LIMIT = 10**9
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]"
    r"|[^\s\p{L}\p{N}]+"
)


@dataclass(frozen=True)
class TokenBatch:
    """Several texts as ids."""

    ids: np.ndarray
    """int64 ``(B, max_length)``, padded."""
    removed: tuple[str, ...]
    """The end of each text that did not fit; empty where all did."""


class AbstractTokenizer(ABC):
    """Text to ids of a fixed length.

    Args:
        model_max_length: Longest input the model was trained on, in tokens.
        prefix: Ids before the text.
        suffix: Ids after it, kept when the text is cut.
        pad_token_id: Fills up to the length asked for.
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
        """Each text to exactly ``max_length`` ids, special tokens included."""
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
        """One more than the largest id."""

    @abstractmethod
    def _tokens(self, text: str, room: int) -> tuple[list[int], str]:
        """At most ``room`` ids of a text, and the text that did not fit."""


@final
class FastTokenizer(AbstractTokenizer):
    """Over a ``tokenizers.Tokenizer``."""

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
        """One more than the largest id."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def _tokens(self, text: str, room: int) -> tuple[list[int], str]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        if len(encoding.ids) <= room:
            return encoding.ids, ""
        return encoding.ids[:room], text[encoding.offsets[room][0] :].strip()


@final
class SentencePieceTokenizer(AbstractTokenizer):
    """Over a ``spiece.model``."""

    def __init__(self, processor: Any, model_max_length: int) -> None:
        eos, pad = processor.eos_id(), processor.pad_id()
        super().__init__(model_max_length, (), (eos,), pad)
        self._processor = processor

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return int(self._processor.get_piece_size())

    def _tokens(self, text: str, room: int) -> tuple[list[int], str]:
        ids = self._processor.encode(text)
        if len(ids) <= room:
            return ids, ""
        return ids[:room], self._processor.decode(ids[room:])


def load_clip_tokenizer(path: Path) -> AbstractTokenizer:
    """From ``tokenizer.json``, else from ``vocab.json`` and ``merges.txt``.

    Raises:
        ModelLoadError: Neither is there, or they are damaged.
    """
    settings = _settings(path)
    start = _text(settings.get("bos_token"), "<|startoftext|>")
    end = _text(settings.get("eos_token"), "<|endoftext|>")
    pad = _text(settings.get("pad_token"), end)
    if (path / "tokenizer.json").is_file():
        tokenizer = _from_json(path / "tokenizer.json")
    else:
        unknown = _text(settings.get("unk_token"), end)
        tokenizer = _clip_from_vocabulary(path, unknown)
        tokenizer.add_special_tokens([start, end])
    ids = [_id(tokenizer, path, token) for token in (start, end, pad)]
    limit = _limit(settings, 77)
    return FastTokenizer(tokenizer, limit, ids[:1], ids[1:2], ids[2])


def load_t5_tokenizer(path: Path) -> AbstractTokenizer:
    """From ``tokenizer.json``, else from ``spiece.model``.

    Raises:
        ModelLoadError: Neither is there, or they are damaged.
    """
    settings = _settings(path)
    limit = _limit(settings, 512)
    if (path / "tokenizer.json").is_file():
        tokenizer = _from_json(path / "tokenizer.json")
        end = _id(tokenizer, path, _text(settings.get("eos_token"), "</s>"))
        pad = _id(tokenizer, path, _text(settings.get("pad_token"), "<pad>"))
        return FastTokenizer(tokenizer, limit, (), (end,), pad)
    model = path / "spiece.model"
    if not model.is_file():
        raise ModelLoadError(
            f"{path.name}: no tokenizer.json and no spiece.model; download the model "
            "again"
        )
    # Imported here: only folders without tokenizer.json need it.
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as err:
        raise ModelLoadError(
            f"{path.name}/spiece.model: damaged; download it again"
        ) from err
    return SentencePieceTokenizer(processor, limit)


def _clip_from_vocabulary(path: Path, unknown: str) -> Tokenizer:
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise ModelLoadError(
            f"{path.name}: no tokenizer.json, and not both vocab.json and merges.txt; "
            "download the model again"
        )
    pairs = _merges(merges)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=read_json(vocabulary),
            merges=pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token=unknown,
        )
    )
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


def _merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of tokens, one a line; only a space separates them."""
    try:
        lines = read_lines(path)
    except UnicodeDecodeError as err:
        raise ModelLoadError(
            f"{path.parent.name}/merges.txt: no UTF-8 text; download it again"
        ) from err
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#version"):
            continue
        first, _, second = line.partition(" ")
        if not first or not second or " " in second:
            raise ModelLoadError(
                f"{path.parent.name}/merges.txt: line {number}: expected two tokens "
                f"with a space between, got {line!r}; download it again"
            )
        pairs.append((first, second))
    return pairs


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises bare Exception
        raise ModelLoadError(
            f"{path.parent.name}/tokenizer.json: damaged ({err}); download it again"
        ) from err


def _settings(path: Path) -> dict[str, Any]:
    """``special_tokens_map.json`` under ``tokenizer_config.json``."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            merged |= {k: v for k, v in read_json(path / name).items() if v is not None}
    return merged


def _limit(settings: dict[str, Any], default: int) -> int:
    value = settings.get("model_max_length", default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 4:
        raise ModelLoadError(
            "tokenizer_config.json: model_max_length must be 4 or more, got "
            f"{value!r}; download the tokenizer again"
        )
    return int(value) if value < _NO_LIMIT else default


def _text(token: Any, default: str) -> str:
    """A special token, written as text or as an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else default


def _id(tokenizer: Tokenizer, path: Path, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ModelLoadError(
            f"{path.name}: the vocabulary has no {token}; the tokenizer's files do not "
            "belong together"
        )
    return int(found)
