"""The demo model's tokenizers: CLIP's byte-level BPE and T5's Unigram, on captions."""

from __future__ import annotations

import json
import math
import string
from collections import Counter

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

# Tokens per caption, padding and end token included; the longest caption takes 23.
TEXT_LENGTH = 32
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learned from the captions.

    Every byte is in the vocabulary alone and at a word's end, so any text encodes.
    """
    template = CLIPTokenizer(vocab={_START: 0, _END: 1})._tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_END))
    learner.normalizer = template.normalizer
    learner.pre_tokenizer = template.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocab: dict[str, int] = learned["vocab"]
    for token in [*(f"{byte}</w>" for byte in alphabet), _START, _END]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def build_t5_tokenizer(captions: list[str], length: int = TEXT_LENGTH) -> T5Tokenizer:
    """A T5 tokenizer with one piece per caption word and single letters for the rest.

    Unigram training splits so small a vocabulary into letters, so the pieces are the
    words themselves, scored by frequency as the trainer would.
    """
    template = T5Tokenizer(extra_ids=0)._tokenizer
    counts = Counter(
        piece
        for text in captions
        for word in text.rstrip(".").replace(",", " ,").split()
        for piece, _ in template.pre_tokenizer.pre_tokenize_str(word)
    )
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [
        (p.replace("▁,", ","), math.log(n / total)) for p, n in counts.most_common()
    ]
    letters = ["▁", *string.ascii_letters, *string.digits, *".!?'\"-:;()"]
    known = {piece for piece, _ in pieces}
    pieces += [(letter, -14.0) for letter in letters if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)
