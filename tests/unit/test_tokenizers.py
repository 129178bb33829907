"""Token ids against transformers, from each form the files come in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from folders import CAPTIONS

from max_diffusion import ModelLoadError
from max_diffusion.tokenizers import (
    _merges,
    load_clip_tokenizer,
    load_t5_tokenizer,
)

NASTY = [
    "",
    "   ",
    "A RED Circle",
    "a red circle above a blue square.",
    "naïve café — 東京 🎨🖌️",
    "tab\tnew\nline\x07bell",
    "it's 42.5% of what they've got!!!",
    "zero\u200bwidth and \u00a0 hard space",
    "word " * 10_000,
    "x" * 3000,
    "<|endoftext|> in the middle </s> and <pad>",
]


def random_texts(count: int) -> list[str]:
    rng = np.random.default_rng(4)
    alphabet = list("abcdefghij ABC  123 .,'!?-é東🎨\t")
    return ["".join(rng.choice(alphabet, rng.integers(0, 90))) for _ in range(count)]


TEXTS = [*NASTY, *CAPTIONS, *random_texts(200)]


@pytest.mark.parametrize("length", [8, 32, 77])
def test_clip_ids_equal_transformers(flux_folder: Path, length: int) -> None:
    path = flux_folder / "tokenizer"
    theirs = transformers.CLIPTokenizer.from_pretrained(path)
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    ours = load_clip_tokenizer(path).encode(TEXTS, length)
    assert ours.ids.tolist() == theirs(TEXTS, **options).input_ids


@pytest.mark.parametrize("length", [8, 32, 128])
def test_t5_ids_equal_transformers(flux_folder: Path, length: int) -> None:
    path = flux_folder / "tokenizer_2"
    theirs = transformers.T5TokenizerFast.from_pretrained(path)
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    ours = load_t5_tokenizer(path).encode(TEXTS, length)
    assert ours.ids.tolist() == theirs(TEXTS, **options).input_ids


def test_clip_from_vocabulary_and_merges(flux_folder: Path, tmp_path: Path) -> None:
    path = flux_folder / "tokenizer"
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    ours = load_clip_tokenizer(tmp_path).encode(TEXTS, 32)
    theirs = load_clip_tokenizer(path).encode(TEXTS, 32)
    assert np.array_equal(ours.ids, theirs.ids)


@pytest.mark.parametrize(
    ("head", "end"), [("", "\n"), ("\ufeff", "\r\n"), ("#version: 0.2\n", "\n")]
)
def test_merges_of_any_system(
    flux_folder: Path, tmp_path: Path, head: str, end: str
) -> None:
    path = flux_folder / "tokenizer"
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    lines = end.join(" ".join(pair) for pair in model["merges"]) + end
    vocabulary = json.dumps(model["vocab"])
    (tmp_path / "vocab.json").write_bytes(
        (head[:1] + vocabulary).encode() if head == "\ufeff" else vocabulary.encode()
    )
    (tmp_path / "merges.txt").write_bytes((head + lines).encode())
    ours = load_clip_tokenizer(tmp_path).encode(TEXTS, 32)
    theirs = load_clip_tokenizer(path).encode(TEXTS, 32)
    assert np.array_equal(ours.ids, theirs.ids)


def test_a_merge_may_hold_what_python_takes_for_the_end_of_a_line(
    tmp_path: Path,
) -> None:
    """Of byte-level letters none is, but a vocabulary may have others."""
    marks = "\x85\u2028\x0b\x0c"
    merges = "".join(f"a{mark} b</w>\n" for mark in marks)
    (tmp_path / "merges.txt").write_bytes(merges.encode())
    assert _merges(tmp_path / "merges.txt") == [(f"a{mark}", "b</w>") for mark in marks]


@pytest.mark.parametrize("line", ["a", "a b c", " a", "a "])
def test_a_line_that_is_no_merge_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\na b\n{line}\n")
    with pytest.raises(
        ModelLoadError, match=r"merges\.txt: line 3: expected two tokens"
    ):
        _merges(tmp_path / "merges.txt")


def test_t5_from_sentencepiece(tmp_path: Path) -> None:
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CAPTIONS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "spiece.model")
    )
    batch = load_t5_tokenizer(tmp_path).encode([CAPTIONS[0], "a"], 12)
    pieces = processor.encode(CAPTIONS[0])
    assert batch.ids[0].tolist() == [*pieces[:11], 1]
    assert batch.ids[1].tolist() == [*processor.encode("a"), 1, *[0] * 12][:12]
    assert batch.removed[0] == processor.decode(pieces[11:])


def test_what_was_cut_is_told(flux_folder: Path) -> None:
    tokenizer = load_clip_tokenizer(flux_folder / "tokenizer")
    batch = tokenizer.encode(["a red circle above", "a red"], 5)
    assert batch.removed == ("above", "")
    assert tokenizer.model_max_length == 32


def test_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"not both vocab\.json and merges\.txt"):
        load_clip_tokenizer(tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"no tokenizer\.json and no spiece\.model"
    ):
        load_t5_tokenizer(tmp_path)
