"""CLIP's and T5's tokenizers, from the files a model folder holds.

Ids equal those of transformers' ``CLIPTokenizer`` and ``T5TokenizerFast`` with
``padding="max_length", truncation=True``, without importing transformers (2 s).
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from ..checkpoint.reading import check_file, read_json
from ..core.files import read_lines
from ..errors import ModelLoadError

_NAMED = ("bos", "eos", "unk", "pad")
# transformers writes 1e30 for "no limit".
_NO_LIMIT = 10**9
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
    settings = _settings(path)
    start = _token(settings.get("bos_token"), "<|startoftext|>")
    end = _token(settings.get("eos_token"), "<|endoftext|>")
    unknown = _token(settings.get("unk_token"), "<|endoftext|>")
    pad = _token(settings.get("pad_token"), "<|endoftext|>")
    if (path / "tokenizer.json").is_file():
        tokenizer = _from_json(path / "tokenizer.json")
    else:
        tokenizer = _clip_from_vocabulary(path, unknown.content)
    _add_special_tokens(tokenizer, path, settings, [end, unknown, pad, start])
    ids = [_id(tokenizer, path, token.content) for token in (start, end, pad)]
    limit = _limit(settings, 77)
    return FastTokenizer(tokenizer, limit, ids[:1], ids[1:2], ids[2])


def load_t5_tokenizer(path: Path) -> AbstractTokenizer:
    """Loads ``tokenizer.json``, else ``spiece.model``.

    Raises:
        ModelLoadError: Neither is there, or they are damaged.
    """
    settings = _settings(path)
    end = _token(settings.get("eos_token"), "</s>")
    unknown = _token(settings.get("unk_token"), "<unk>")
    pad = _token(settings.get("pad_token"), "<pad>")
    named = [end, unknown, pad]
    if (path / "tokenizer.json").is_file():
        tokenizer = _from_json(path / "tokenizer.json")
    else:
        extra = [f"<extra_id_{index}>" for index in range(_extra_ids(settings))]
        tokenizer = _t5_from_sentencepiece(path / "spiece.model", extra)
        named += [_token(text, text) for text in extra]
    _add_special_tokens(tokenizer, path, settings, named)
    ids = [_id(tokenizer, path, token.content) for token in (end, pad)]
    return FastTokenizer(tokenizer, _limit(settings, 512), (), ids[:1], ids[1])


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


def _add_special_tokens(
    tokenizer: Tokenizer,
    path: Path,
    settings: Mapping[str, Any],
    named: Sequence[AddedToken],
) -> None:
    """Makes tokens of their own of what the settings list, then of the named ones.

    Written out in a prompt, they are then cut out of it before all else.
    """
    listed = settings.get("added_tokens_decoder", {})
    try:
        places = {int(key): _token(token, "") for key, token in listed.items()}
    except (AttributeError, TypeError, ValueError) as err:
        raise ModelLoadError(
            f"{path.name}/tokenizer_config.json: added_tokens_decoder must hold tokens "
            f"by id, got {listed!r:.80}; download the tokenizer again"
        ) from err
    for token in (*(places[place] for place in sorted(places)), *named):
        known = {one.content for one in tokenizer.get_added_tokens_decoder().values()}
        if token.content not in known:
            tokenizer.add_tokens([token])
    for place, token in places.items():
        found = tokenizer.token_to_id(token.content)
        if found != place:
            raise ModelLoadError(
                f"{path.name}: {token.content} is token {found}, and {place} in "
                "tokenizer_config.json; the tokenizer's files do not belong together"
            )


def _clip_from_vocabulary(path: Path, unknown: str) -> Tokenizer:
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise ModelLoadError(
            f"{path.name}: no tokenizer.json, and not both vocab.json and merges.txt; "
            "download the model again"
        )
    check_file(merges)
    known, pairs = read_json(vocabulary), _merges(merges)
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


def _merges(path: Path) -> list[tuple[str, str]]:
    """Reads pairs of tokens, one pair per line; only a space separates the two."""
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
    check_file(path)
    try:
        return Tokenizer.from_buffer(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except Exception as err:  # the library raises bare Exception
        raise ModelLoadError(
            f"{path.parent.name}/tokenizer.json: damaged ({err}); download it again"
        ) from err


def _settings(path: Path) -> dict[str, Any]:
    """Reads ``tokenizer_config.json``, and the older files where they count."""
    config, named, added = (
        {k: v for k, v in read_json(path / name).items() if v is not None}
        if (path / name).is_file()
        else {}
        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        )
    )
    # transformers passes over them where the settings list all added tokens.
    if "added_tokens_decoder" in config:
        return config
    settings = config | named
    special = {_token(settings.get(f"{name}_token"), "").content for name in _NAMED}
    listed = {
        place: {"content": text, "special": text in special}
        for text, place in added.items()
    }
    return settings | ({"added_tokens_decoder": listed} if listed else {})


def _extra_ids(settings: Mapping[str, Any]) -> int:
    """Returns how many ``<extra_id_0>`` ... follow T5's pieces, the last one first."""
    value = settings.get("extra_ids", 100)
    if type(value) is not int or value < 0:
        raise ModelLoadError(
            f"tokenizer_config.json: extra_ids must be a whole number of 0 or more, "
            f"got {value!r}; download the tokenizer again"
        )
    return value


def _limit(settings: dict[str, Any], default: int) -> int:
    value = settings.get("model_max_length", default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 4:
        raise ModelLoadError(
            "tokenizer_config.json: model_max_length must be 4 or more, got "
            f"{value!r}; download the tokenizer again"
        )
    return int(value) if value < _NO_LIMIT else default


def _token(token: Any, default: str) -> AddedToken:
    """Creates a special token from text or from an object with its content."""
    given = token if isinstance(token, dict) else {"content": token}
    text = given.get("content")
    flags = {
        name: given[name]
        for name in ("lstrip", "normalized", "rstrip", "single_word", "special")
        if isinstance(given.get(name), bool)
    }
    flags.setdefault("special", True)
    # Whether it is looked for in the normalised text, as CLIP's in lower case.
    flags.setdefault("normalized", not flags["special"])
    return AddedToken(text if isinstance(text, str) else default, **flags)


def _id(tokenizer: Tokenizer, path: Path, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ModelLoadError(
            f"{path.name}: the vocabulary has no {token}; the tokenizer's files do not "
            "belong together"
        )
    return int(found)
