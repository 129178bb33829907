"""What requests may set on some models only, declared by the family as a dataclass.

A family's options are a frozen subclass of :class:`RequestOptions` whose fields are
made by :func:`option`. The command line, the HTTP schema and ``generate`` are made from
these fields, and every model refuses by name what it does not declare.
"""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, get_type_hints

from ..errors import RequestError
from .setting_names import SHORT_FORMS
from .validation import finite, text, whole

_KINDS: Final[Mapping[object, type]] = MappingProxyType(
    {int | None: int, float | None: float, str | None: str, bool | None: bool}
)
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")

Need: TypeAlias = Literal["guidance", "frames"]
"""What an option may have no effect without: true guidance, or more than one frame."""


@dataclass(frozen=True)
class RequestOptions:
    """Base of each family's own options; itself the options of a family with none.

    A subclass is a frozen dataclass; its fields are of type ``int | None``,
    ``float | None``, ``str | None`` or ``bool | None``, where ``None`` leaves the
    choice to the model.
    """


@dataclass(frozen=True)
class DeclaredOption:
    """One option of requests as its model family declares it."""

    name: str
    """Name of the option as a keyword of ``generate`` and as a field over HTTP; on the
    command line with hyphens."""
    kind: type
    """Type of the option's values: ``int``, ``float``, ``str`` or ``bool``."""
    help: str
    """One line that says what the option does, in which unit."""
    minimum: float | None
    """Least number that any model takes; ``None`` for no limit."""
    maximum: float | None
    """Largest number that any model takes; ``None`` for no limit."""
    needs: Need | None = None
    """What it has no effect without; the report warns where that is missing."""


def option(
    help: str,  # as argparse calls it
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    needs: Need | None = None,
) -> Any:
    """Declares a field of a :class:`RequestOptions` subclass; its default is ``None``.

    Args:
        help: One line that says what the option does, in which unit.
        minimum: The least number that is taken; ``None`` for no limit.
        maximum: The largest number that is taken; ``None`` for no limit. A model may
            take less.
        needs: What the option has no effect without: ``guidance``, for true guidance
            above 1, or ``frames``, for more than one; ``None`` for nothing.
    """
    said = {"help": help, "minimum": minimum, "maximum": maximum, "needs": needs}
    return field(default=None, metadata=said)


def declared_options(
    kind: type[RequestOptions], taken: frozenset[str] = frozenset()
) -> Mapping[str, DeclaredOption]:
    """Returns the options that a family declares, by name.

    Args:
        kind: The family's dataclass, which declares them.
        taken: Names that already mean something else.

    Raises:
        RequestError: A declaration is malformed, or a name is taken.
    """
    if not (isinstance(kind, type) and issubclass(kind, RequestOptions)):
        raise RequestError(
            f"options_class: expected a subclass of RequestOptions, got {kind!r}"
        )
    params = vars(kind).get("__dataclass_params__")  # not an inherited one
    if params is None or not params.frozen:
        raise RequestError(
            f"{kind.__qualname__}: expected a frozen dataclass; decorate it with "
            "@dataclass(frozen=True)"
        )
    try:
        hints = get_type_hints(kind)
    except NameError as err:
        raise RequestError(f"{kind.__qualname__}: its annotations: {err}") from err
    found: dict[str, DeclaredOption] = {}
    for item in fields(kind):
        where = f"{kind.__qualname__}.{item.name}"
        value = _KINDS.get(hints[item.name])
        if value is None or "help" not in item.metadata:
            raise RequestError(
                f"{where}: expected a field made by option(), of type int | None, "
                f"float | None, str | None or bool | None, got {hints[item.name]}"
            )
        is_name = _NAME.fullmatch(item.name) and not keyword.iskeyword(item.name)
        # --no-NAME turns an option off, and pydantic has methods that begin with model.
        is_free = item.name not in taken and not item.name.startswith(("no_", "model_"))
        if not is_name or not is_free:
            raise RequestError(
                f"{where}: expected lower-case words joined by underscores that no "
                "setting of all models has for its name; choose another"
            )
        declared = DeclaredOption(item.name, value, **item.metadata)
        _check_range(where, declared)
        found[item.name] = declared
    return found


def _check_range(where: str, declared: DeclaredOption) -> None:
    if not isinstance(declared.help, str) or not declared.help.strip():
        raise RequestError(f"{where}: expected help of a line, got {declared.help!r}")
    ends = [end for end in (declared.minimum, declared.maximum) if end is not None]
    are_numbers = all(type(end) in (int, float) for end in ends)
    is_number = declared.kind in (int, float)
    if (ends and not is_number) or not are_numbers or ends != sorted(ends):
        raise RequestError(
            f"{where}: expected a minimum and a maximum in this order, of a number, "
            f"got {declared.minimum!r} and {declared.maximum!r}"
        )


def read_options(
    kind: type[RequestOptions], given: Mapping[str, object], owner: str
) -> RequestOptions:
    """Checks what a request asks for and returns it as the family's dataclass.

    Args:
        kind: The family's dataclass.
        given: Values by name; ``None`` counts as not given.
        owner: Name of the model in messages.

    Raises:
        RequestError: The model has no such option, or a value is of another type or out
            of range.
    """
    known = declared_options(kind)
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise RequestError(
                f"request: {name} is no option of {owner}; {_meant(name, known)}it has "
                f"{', '.join(known) or 'none beyond those of every model'}"
            )
        if value is not None:
            values[name] = _checked(known[name], value)
    return kind(**values)


def _meant(name: str, known: Collection[str]) -> str:
    """A word on what may have been meant by a name that is none."""
    full = {short: long for long, short in SHORT_FORMS.items()}
    others = (*known, *SHORT_FORMS, "height", "negative_prompt", "seed", "width")
    near = [full[name]] if name in full else difflib.get_close_matches(name, others, 1)
    return f"did you mean {near[0]}? " if near else ""


def _checked(declared: DeclaredOption, value: Any) -> Any:
    where = f"request: {declared.name}"
    if declared.kind is str:
        return text(where, value)
    if declared.kind is bool:
        if not isinstance(value, bool):
            raise RequestError(f"{where} must be true or false, got {value!r}")
        return value
    check = whole if declared.kind is int else finite
    number = check(where, value)
    if declared.minimum is not None and number < declared.minimum:
        raise RequestError(
            f"{where} must be at least {declared.minimum:g}, got {number}"
        )
    if declared.maximum is not None and number > declared.maximum:
        raise RequestError(
            f"{where} must be at most {declared.maximum:g}, got {number}"
        )
    return number
