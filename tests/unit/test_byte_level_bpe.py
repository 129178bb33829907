"""Qwen's token ids against transformers, from each form the files come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from folders import CAPTIONS
from qwen_folder import MORE_TEXT, SPECIAL_TOKENS, build_qwen_tokenizer

from max_diffusion import ModelLoadError
from max_diffusion.components import (
    NO_TOKEN,
    TemplateTokenizer,
    load_byte_level_tokenizer,
)

BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
NASTY = [
    "",
    "   ",
    "\n\n begins with lines",
    "ends with one\r\n",
    "IT'S 42.5% OF WHAT they'VE got!!!\t\tyes",
    "naïve café — 東京の夜景 🎨🖌️ cafe\u0301 ﬁ",
    "Привет, мир! مرحبا שלום नमस्ते ไทย 한국어",
    "zero\u200bwidth \u00a0 hard\u2028line\x85next\x00null\x07bell",
    "<|im_start|><|im_end|> in words, <|im_START|> is none <|endoftext|>x<cat>y",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301\u0302",
    "word " * 3000,
]


def texts() -> list[str]:
    """Words between spaces, scripts, controls and special tokens; any characters."""
    rng = np.random.default_rng(8)
    parts = [
        *SPECIAL_TOKENS,
        *(" ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u200b", "\x07", "\u2028"),
        *("a", "red circle", "é", "e\u0301", "東京", "🎨", "ﬁ", "Ж", "مرحبا", "ß", "İ"),
        *("!", "'s", "'LL", "B2", "12345", "...", "<cat>", "<|im_end|", "½", "Ⅷ", "٣"),
    ]
    mixed = ["".join(rng.choice(parts, rng.integers(1, 12))) for _ in range(1500)]
    ends = [(1, 0x300), (0x300, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000)]
    wild = [
        "".join(chr(rng.integers(*ends[rng.integers(4)])) for _ in range(size))
        for size in rng.integers(1, 12, 800)
    ]
    return [*NASTY, *CAPTIONS, *mixed, *wild]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary as transformers 5 saves it."""
    path = tmp_path_factory.mktemp("qwen_tokenizer")
    build_qwen_tokenizer([*CAPTIONS, *MORE_TEXT]).save_pretrained(path)
    return path


def special(text: str, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, "special": True, **off, **flags}


def older(saved: Path, target: Path, form: str) -> None:
    """Writes the same vocabulary in files that earlier versions wrote."""
    model = json.loads((saved / "tokenizer.json").read_text())["model"]
    vocabulary = model["vocab"]
    (target / "vocab.json").write_text(json.dumps(vocabulary))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (target / "merges.txt").write_text("\n".join(merges) + "\n")
    first, *more = (len(vocabulary) + place for place in range(4))
    end, start, stop = SPECIAL_TOKENS
    listed = {end: first, start: more[0], stop: more[1]}
    config: dict[str, Any] = {
        "add_prefix_space": form == "space",
        "additional_special_tokens": [start, stop],
        "bos_token": None,
        "eos_token": stop,
        "pad_token": end,
        "unk_token": None,
        "model_max_length": 131072,
    }
    if form in ("listed", "space"):
        places = {str(place): special(text) for text, place in listed.items()}
        places[str(more[2])] = special("<cat>", special=False)
        config["added_tokens_decoder"] = places
    if form == "legacy":
        (target / "added_tokens.json").write_text(json.dumps(listed))
        named = {"eos_token": special(stop), "pad_token": end}
        named["additional_special_tokens"] = [start, stop]
        (target / "special_tokens_map.json").write_text(json.dumps(named))
    if form != "bare":
        (target / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", ["saved", "listed", "space", "legacy", "bare"])
def test_ids_equal_transformers(saved: Path, tmp_path: Path, form: str) -> None:
    path = saved if form == "saved" else tmp_path
    if form != "saved":
        older(saved, path, form)
    theirs = transformers.Qwen2Tokenizer.from_pretrained(path)
    ours = TemplateTokenizer(load_byte_level_tokenizer(path), BEFORE, AFTER)
    assert ours.vocab_size == len(theirs)
    found = ours.encode(texts(), 10**6)
    assert found.removed == ("",) * len(texts())
    wanted = theirs([f"{BEFORE}{text}{AFTER}" for text in texts()]).input_ids
    for text, row, ids in zip(texts(), found.ids, wanted, strict=True):
        assert row[row != NO_TOKEN].tolist() == ids, text


@pytest.mark.parametrize("length", [1, 20, 57, 300])
def test_long_texts_are_cut_as_transformers_cuts_them(saved: Path, length: int) -> None:
    theirs = transformers.Qwen2Tokenizer.from_pretrained(saved)
    ours = TemplateTokenizer(load_byte_level_tokenizer(saved), BEFORE, AFTER)
    found = ours.encode(NASTY, length)
    wanted = theirs(
        [f"{BEFORE}{text}{AFTER}" for text in NASTY],
        max_length=length,
        truncation=True,
    ).input_ids
    assert [row[row != NO_TOKEN].tolist() for row in found.ids] == wanted
    assert found.removed[-1].endswith("word word word")
    assert found.removed[0] == ""
    # Padding stands at the end alone.
    assert (np.diff((found.ids == NO_TOKEN).astype(int)) >= 0).all()


def test_what_was_cut_is_said_from_its_first_character(saved: Path) -> None:
    ours = TemplateTokenizer(load_byte_level_tokenizer(saved), BEFORE, AFTER)
    text = "a red circle 東京 a blue square"
    for length in range(1, ours.encode([text], 999).ids.shape[1]):
        cut = ours.encode([text], length)
        kept = text.removesuffix(cut.removed[0])
        # A character may be several tokens, and is cut as a whole.
        assert ours.encode([kept], 999).ids.shape[1] >= length or cut.removed == ("",)
        assert text.endswith(cut.removed[0])


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("merges.txt", "a\n", r"merges\.txt: line 1: expected two tokens"),
        ("vocab.json", '{"a": 0}', "vocab.json or merges.txt is damaged"),
        ("vocab.json", None, "not both vocab.json and merges.txt"),
        (
            "tokenizer_config.json",
            '{"additional_special_tokens": 3}',
            "additional_special_tokens must be a list, got 3",
        ),
    ],
)
def test_damaged_files_are_named(
    saved: Path, tmp_path: Path, name: str, contents: str | None, message: str
) -> None:
    older(saved, tmp_path, "bare")
    (tmp_path / name).unlink(missing_ok=True)
    if contents is not None:
        (tmp_path / name).write_text(contents)
    with pytest.raises(ModelLoadError, match=message):
        load_byte_level_tokenizer(tmp_path)
