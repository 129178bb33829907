"""Byte-level tokenizers of Qwen and Mistral: prompts in a template, of any length.

Ids equal those of transformers' ``Qwen2Tokenizer``, and of what ``tokenizer.json`` says
for others, without importing transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from ..checkpoint.reading import check_file, read_json
from ..errors import ModelLoadError
from .tokenizer_files import (
    add_special_tokens,
    read_merges,
    read_settings,
    read_tokenizer,
    special_token,
    token_id,
)
from .tokenizers import TokenBatch

NO_TOKEN: Final = -1
"""Stands after a text that is shorter than others of its batch; no token's id."""
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END: Final = "<|endoftext|>"


@final
class TemplateTokenizer:
    """Encodes texts inside of a template, which becomes one text with each.

    Args:
        tokenizer: What encodes; truncates and pads nothing.
        before: What comes before a text.
        after: What comes after it.
    """

    def __init__(self, tokenizer: Tokenizer, before: str, after: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._before, self._after = before, after

    @property
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def encode(self, texts: Sequence[str], max_length: int) -> TokenBatch:
        """Encodes each text with its template, as at most ``max_length`` ids.

        What is longer is cut at its end, the template's included.

        Returns:
            Ids ``(B, length of the longest)``, after shorter ones :data:`NO_TOKEN`.
        """
        rows, removed = [], []
        for text in texts:
            whole = f"{self._before}{text}{self._after}"
            encoding = self._tokenizer.encode(whole, add_special_tokens=False)
            rows.append(encoding.ids[:max_length])
            end = len(text)
            if len(encoding.ids) > max_length:
                end = max(0, encoding.offsets[max_length][0] - len(self._before))
            removed.append(text[end:].strip())
        ids = np.full((len(rows), max(map(len, rows))), NO_TOKEN, np.int64)
        for row, found in zip(ids, rows, strict=True):
            row[: len(found)] = found
        return TokenBatch(ids, tuple(removed))


def load_byte_level_tokenizer(path: Path, end: str = _END) -> Tokenizer:
    """Loads ``tokenizer.json``, else ``vocab.json`` and ``merges.txt``.

    Args:
        path: Folder with them.
        end: The special token that there is in any case.

    Raises:
        ModelLoadError: Neither is there, or they are damaged.
    """
    settings = read_settings(path)
    if (path / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(path / "tokenizer.json")
    else:
        has_space = settings.get("add_prefix_space") is True
        tokenizer = _from_vocabulary(path, has_space)
    more = settings.get("additional_special_tokens", [])
    if not isinstance(more, list):
        raise ModelLoadError(
            f"{path.name}/tokenizer_config.json: additional_special_tokens must be a "
            f"list, got {more!r:.80}; download the tokenizer again"
        )
    # In the order of transformers, which gives new ones their ids.
    named = [
        special_token(settings[name], end)
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if name in settings
    ]
    named += [special_token(token, "") for token in more]
    last = special_token(end, end)
    add_special_tokens(tokenizer, path, settings, [*named, last])
    return tokenizer


def padding_id(
    tokenizer: Tokenizer, path: Path, side: str = "right", default: str = _END
) -> int:
    """Returns the id of what fills texts up.

    Args:
        tokenizer: From :func:`load_byte_level_tokenizer`.
        path: Folder with its settings.
        side: Where it stands, ``left`` or ``right``.
        default: The token where the settings name none.

    Raises:
        ModelLoadError: Texts are to be filled up at their other side or cut at their
            beginnings, or there is no such token.
    """
    settings = read_settings(path)
    own = tokenizer.padding or {}
    for name, wanted, found in (
        ("padding_side", side, settings.get("padding_side", own.get("direction"))),
        ("truncation_side", "right", settings.get("truncation_side")),
    ):
        if found not in (wanted, None):
            raise ModelLoadError(
                f"{path.name}: {name} must be {wanted!r}, as the model was trained, "
                f"got {found!r:.40}"
            )
    named = settings.get("pad_token", default)
    return token_id(tokenizer, path, special_token(named, default).content)


def _from_vocabulary(path: Path, has_prefix_space: bool) -> Tokenizer:
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        raise ModelLoadError(
            f"{path.name}: no tokenizer.json, and not both vocab.json and merges.txt; "
            "download the model again"
        )
    check_file(merges)
    known, pairs = read_json(vocabulary), read_merges(merges)
    try:
        tokenizer = Tokenizer(models.BPE(vocab=known, merges=pairs, fuse_unk=False))
    except Exception as err:  # the library raises bare Exception
        raise ModelLoadError(
            f"{path.name}: vocab.json or merges.txt is damaged ({err}); download both "
            "again"
        ) from err
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(
                add_prefix_space=has_prefix_space, use_regex=False
            ),
        ]
    )
    return tokenizer
