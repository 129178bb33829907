"""What a tokenizer's folder holds, in the forms that transformers has written it."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..checkpoint.reading import check_file, read_json
from ..core.files import read_lines
from ..errors import ModelLoadError

_NAMED = ("bos", "eos", "unk", "pad")
# transformers writes 1e30 for "no limit".
_NO_LIMIT = 10**9


def read_merges(path: Path) -> list[tuple[str, str]]:
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


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads a ``tokenizer.json``.

    Raises:
        ModelLoadError: It is damaged.
    """
    check_file(path)
    try:
        return Tokenizer.from_buffer(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except Exception as err:  # the library raises bare Exception
        raise ModelLoadError(
            f"{path.parent.name}/tokenizer.json: damaged ({err}); download it again"
        ) from err


def read_settings(path: Path) -> dict[str, Any]:
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
    special = {
        special_token(settings.get(f"{name}_token"), "").content for name in _NAMED
    }
    listed = {
        place: {"content": text, "special": text in special}
        for text, place in added.items()
    }
    return settings | ({"added_tokens_decoder": listed} if listed else {})


def length_limit(settings: dict[str, Any], default: int) -> int:
    """Returns the longest input in tokens; the default where there is no limit.

    Raises:
        ModelLoadError: It is no length.
    """
    value = settings.get("model_max_length", default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 4:
        raise ModelLoadError(
            "tokenizer_config.json: model_max_length must be 4 or more, got "
            f"{value!r}; download the tokenizer again"
        )
    return int(value) if value < _NO_LIMIT else default


def special_token(token: Any, default: str) -> AddedToken:
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


def token_id(tokenizer: Tokenizer, path: Path, token: str) -> int:
    """Returns a token's id.

    Raises:
        ModelLoadError: The vocabulary lacks it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ModelLoadError(
            f"{path.name}: the vocabulary has no {token}; the tokenizer's files do not "
            "belong together"
        )
    return int(found)


def require_special_tokens(
    tokenizer: Tokenizer, path: Path, tokens: Sequence[str]
) -> None:
    """Checks that tokens of a template are cut out of texts before all else.

    Raises:
        ModelLoadError: One is not; it would be read as the letters of its name.
    """
    known = {one.content for one in tokenizer.get_added_tokens_decoder().values()}
    missing = [token for token in tokens if token not in known]
    if missing:
        raise ModelLoadError(
            f"{path.name}: {', '.join(missing)} must be special tokens, as the model "
            "was trained; download the tokenizer again, or give the model's own"
        )


def add_special_tokens(
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
        places = {int(key): special_token(token, "") for key, token in listed.items()}
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


def check_ids(role: str, vocab_size: int, rows: int) -> None:
    """Checks that a text encoder's table has a row for each id of its tokenizer.

    Raises:
        ModelLoadError: It lacks some, which would be read from other memory.
    """
    if vocab_size > rows:
        raise ModelLoadError(
            f"{role}: its {vocab_size} ids are more than the {rows} of the text "
            "encoder; are they of one model?"
        )
