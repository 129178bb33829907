"""Token ids against transformers, from each form the files come in."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from folders import CAPTIONS

from max_diffusion import ModelLoadError
from max_diffusion.components.tokenizer_files import read_merges
from max_diffusion.components.tokenizers import (
    AbstractTokenizer,
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


def special_token(text: str, **flags: bool) -> dict[str, Any]:
    """As transformers writes a token into its settings."""
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": text, "special": True, **off, **flags}


def written_out(count: int) -> list[str]:
    """Texts in which special tokens stand between spaces, scripts and controls."""
    rng = np.random.default_rng(8)
    parts = [
        *("</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_42>", "<extra_id_99>"),
        *("<|endoftext|>", "<|startoftext|>", "<|StartOfText|>", " ", "  ", "\t", "\n"),
        *(
            "a",
            "red circle",
            "é",
            "東",
            "🎨",
            "ﬁ",
            "\u00a0",
            "\u200b",
            "▁",
            "Ж",
            "\x07",
        ),
        *("!", "'s", "B2", "<cat>", "Red Circle", "e\u0301", "\u2028", "\x85", "مرحبا"),
    ]
    return ["".join(rng.choice(parts, rng.integers(1, 9))) for _ in range(count)]


def any_characters(count: int) -> list[str]:
    rng = np.random.default_rng(9)
    ends = [(1, 0x300), (0x300, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000)]
    return [
        "".join(chr(rng.integers(*ends[rng.integers(4)])) for _ in range(size))
        for size in rng.integers(1, 12, count)
    ]


SPECIAL_TEXTS = [*TEXTS, *written_out(1500), *any_characters(800)]
CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")


def clip_folder(source: Path, target: Path) -> dict[str, int]:
    """Vocabulary and merges of a tokenizer in their older files."""
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (target / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (target / "merges.txt").write_text("\n".join(merges))
    return dict(model["vocab"])


@pytest.mark.parametrize(
    "form",
    ["bare", "listed", "pad", "map", "more", "legacy", "legacy map", "legacy more"],
)
def test_clip_from_vocabulary_and_merges(
    form: str, flux_folder: Path, tmp_path: Path
) -> None:
    vocabulary = clip_folder(flux_folder / "tokenizer", tmp_path)
    start, end = CLIP_ENDS
    # As OpenAI's: only the start is looked for in lower case.
    listed = {
        str(vocabulary[start]): special_token(start, normalized=True),
        str(vocabulary[end]): special_token(end),
    }
    config: dict[str, Any] = {"bos_token": start, "eos_token": end, "unk_token": end}
    config |= {"pad_token": end, "model_max_length": 77}
    named = {
        name: special_token(text, normalized=True)
        for name, text in zip(("bos_token", "eos_token"), CLIP_ENDS, strict=True)
    }
    if form == "pad":
        config["pad_token"] = "!"
    if form == "more":
        size = len(vocabulary)
        listed[str(size)] = special_token("<cat>", special=False)
        listed[str(size + 1)] = special_token("Red Circle", normalized=True)
    if form == "legacy":
        config |= {k: {**v, "__type": "AddedToken"} for k, v in named.items()}
    if "legacy" not in form:
        config["added_tokens_decoder"] = listed
    if form == "legacy more":
        added = {"<cat>": len(vocabulary), "Red Circle": len(vocabulary) + 1}
        (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    if "map" in form:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    if form != "bare":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = load_clip_tokenizer(tmp_path)
    assert ours.vocab_size == len(theirs) == len(vocabulary) + 2 * ("more" in form)
    options = {"padding": "max_length", "max_length": 24, "truncation": True}
    wanted = theirs(SPECIAL_TEXTS, **options).input_ids
    assert ours.encode(SPECIAL_TEXTS, 24).ids.tolist() == wanted


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


@pytest.mark.parametrize(
    ("role", "load"),
    [("tokenizer", load_clip_tokenizer), ("tokenizer_2", load_t5_tokenizer)],
)
def test_a_byte_order_mark_is_no_part_of_a_tokenizer(
    flux_folder: Path,
    tmp_path: Path,
    role: str,
    load: Callable[[Path], AbstractTokenizer],
) -> None:
    for path in (flux_folder / role).glob("*.json"):
        (tmp_path / path.name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert (tmp_path / "tokenizer.json").is_file()
    wanted = load(flux_folder / role).encode(TEXTS, 32)
    assert np.array_equal(load(tmp_path).encode(TEXTS, 32).ids, wanted.ids)


def test_a_merge_may_hold_what_python_takes_for_the_end_of_a_line(
    tmp_path: Path,
) -> None:
    """Of byte-level letters none is, but a vocabulary may have others."""
    marks = "\x85\u2028\x0b\x0c"
    merges = "".join(f"a{mark} b</w>\n" for mark in marks)
    (tmp_path / "merges.txt").write_bytes(merges.encode())
    assert read_merges(tmp_path / "merges.txt") == [
        (f"a{mark}", "b</w>") for mark in marks
    ]


@pytest.mark.parametrize("line", ["a", "a b c", " a", "a "])
def test_a_line_that_is_no_merge_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\na b\n{line}\n")
    with pytest.raises(
        ModelLoadError, match=r"merges\.txt: line 3: expected two tokens"
    ):
        read_merges(tmp_path / "merges.txt")


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as T5's: its ids, its normaliser."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("spiece")
    corpus = folder / "corpus.txt"
    others = ["naïve café — 東京 🎨 it's 42.5% of what they've got!!!", "Привет, мир"]
    corpus.write_text("\n".join([*CAPTIONS, *others] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "spiece"),
        vocab_size=150,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "spiece.model"


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own definitions in place of sentencepiece's.

    Those of 0.2.3 want another protobuf than MAX allows.
    """
    from transformers.utils import sentencepiece_model_pb2_new

    def definitions(message: str = "") -> object:
        return sentencepiece_model_pb2_new

    module = importlib.import_module("transformers.convert_slow_tokenizer")
    monkeypatch.setattr(module, "import_protobuf", definitions)


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize("form", ["bare", "listed", "map", "few", "none", "more"])
def test_t5_from_sentencepiece(form: str, spiece: Path, tmp_path: Path) -> None:
    import sentencepiece

    shutil.copy(spiece, tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece)).vocab_size()
    extra = [f"<extra_id_{index}>" for index in range(100)]
    config: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>"}
    config |= {"extra_ids": {"few": 5, "none": 0}.get(form, 100)}
    listed = {
        str(place): special_token(text)
        for place, text in enumerate(("<pad>", "</s>", "<unk>"))
    }
    for index, text in enumerate(reversed(extra)):  # as T5's are published
        listed[str(pieces + index)] = special_token(text, lstrip=True, rstrip=True)
    if form == "more":
        listed[str(pieces + 100)] = special_token("<cat>", special=False)
    if form in ("listed", "more"):
        config |= {"added_tokens_decoder": listed, "additional_special_tokens": extra}
    if form == "map":
        named = {"additional_special_tokens": [special_token(text) for text in extra]}
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
        config["additional_special_tokens"] = extra
    if form != "bare":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    ours = load_t5_tokenizer(tmp_path)
    added = {"few": 5, "none": 0, "more": 101}.get(form, 100)
    assert ours.vocab_size == len(theirs) == pieces + added
    options = {"padding": "max_length", "max_length": 24, "truncation": True}
    wanted = theirs(SPECIAL_TEXTS, **options).input_ids
    assert ours.encode(SPECIAL_TEXTS, 24).ids.tolist() == wanted


def test_t5_special_tokens_written_out(spiece: Path) -> None:
    """The ids themselves: the first 100 after the pieces, the last one first."""
    ours = load_t5_tokenizer(spiece.parent)
    pieces = ours.vocab_size - 100
    batch = ours.encode(["</s>", "<pad><extra_id_0>", " <extra_id_99> </s> "], 4)
    assert batch.ids.tolist() == [
        [1, 1, 0, 0],
        [0, pieces + 99, 1, 0],
        [pieces, 1, 1, 0],
    ]
    assert ours.encode([CAPTIONS[0]], 3).removed[0].endswith("blue square")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("spiece.model", b"\x0e\xff\xff", r"spiece\.model: damaged"),
        ("spiece.model", b"", "no pieces"),
        ("tokenizer_config.json", b'{"extra_ids": -1}', "extra_ids must be a whole"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"7": {"content": "</s>"}}}',
            "</s> is token 1, and 7 in tokenizer_config.json",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "must hold tokens"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"x": {}}}',
            "must hold tokens by id",
        ),
    ],
)
def test_damaged_t5_files_are_said(
    name: str, content: bytes, message: str, spiece: Path, tmp_path: Path
) -> None:
    shutil.copy(spiece, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        load_t5_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("merges", "message"),
    [
        (b"#version\nxx yy", r"merges\.txt is damaged"),
        (b"one", r"merges\.txt: line 1: expected two tokens"),
        (b"\xff\xff \xfe", r"merges\.txt: no UTF-8 text"),
    ],
)
def test_damaged_merges_are_said(
    merges: bytes, message: str, flux_folder: Path, tmp_path: Path
) -> None:
    clip_folder(flux_folder / "tokenizer", tmp_path)
    (tmp_path / "merges.txt").write_bytes(merges)
    with pytest.raises(ModelLoadError, match=message):
        load_clip_tokenizer(tmp_path)


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
