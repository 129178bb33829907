"""TaylorSeer as a decorator, for anything that is called once a step."""

from __future__ import annotations

import functools
import math
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import numpy as np

from .caches.controller import next_gap
from .caches.series import exact_degree, series_weights
from .core.validation import count, not_negative, one_of
from .errors import RequestError


class CacheInfo(NamedTuple):
    """Calls since the last ``reset_cache``; those that raised do not count."""

    computed: int
    """Calls that ran the wrapped code."""
    skipped: int
    """Calls that were forecast."""


@final
@dataclass(frozen=True, kw_only=True)
class taylor_seer:  # a decorator, and so in lower case
    """Forecasts the output of some calls from the outputs of the calls before.

    Decorates a function, or a class whose instances are called: its ``forward`` where
    it has one (as ``torch.nn.Module``), else its ``__call__``. A class becomes a
    subclass of itself, so its code needs ``super()`` without arguments. The result
    also has ``reset_cache`` and ``cache_info``, see :class:`Cached`.

    The call must return one real floating-point array: numpy, torch, a MAX ``Buffer``
    or any that follows the Python array API. A forecast is of the same kind, dtype
    and device, and carries no gradient.

    Step ``s`` counts the calls since ``reset_cache``. Whatever the rules say, a call
    computes if there is no earlier output or an argument's shape is not that of the
    last computed call; an output of another kind, shape, dtype or device begins a new
    history. A call that raises leaves the state as it was.

    State belongs to the function, or to each instance of the class: one for each
    sequence of steps, and never two threads at once. It is a copy of the last
    ``n_derivatives + 1`` computed outputs, in float32 or wider and on their device;
    those of a ``Buffer`` are on the host, where its forecasts are made.

    Maths: ``sum_j F_j x**j / j!``, with ``x`` steps since the last computed one and
    ``F_j`` the ``j``-th difference, see
    :func:`~max_diffusion.caches.series.series_weights`; rounded once, at the end.

    Attributes:
        warmup_steps: The first steps, all computed; 1 or more.
        skip_interval_steps: After the warm-up of ``W`` steps, those with
            ``(s - W + 1) % skip_interval_steps == 0`` compute; the default is all.
        n_derivatives: Highest difference used, fewer while fewer outputs are known; 0
            repeats the last output.
        compute_step_map: Whether each step computes, in place of the rules of either
            mode; steps beyond its end do.
        mode: ``interval``, or ``auto``: after the warm-up the error decides, not
            ``skip_interval_steps``. Every computed output is also forecast, and from
            ``mean|forecast - output| / mean|output|``
            :func:`~max_diffusion.caches.controller.next_gap` tells when to compute
            next; NaN and a zero output make that the next step. Waits for a GPU.
        tolerance: Relative error a forecast may have in mode ``auto``, above 0.
        max_interval: Mode ``auto`` computes one step in this many at least.

    Raises:
        RequestError: A value is out of range; the decorated object cannot be called or
            has a ``reset_cache``; a call's output is no array as above.

    References:
        Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with
        TaylorSeers", 2025, arXiv:2503.06923. Arguments and schedule are those of the
        decorator in github.com/alexarmbr/TaylorSeer. Differs: that one drops the slope
        at step 1, here all orders the history allows are used; it sums in the output's
        dtype; its ``auto`` is a plan.
    """

    warmup_steps: int = 1
    skip_interval_steps: int = 1
    n_derivatives: int = 2
    compute_step_map: Sequence[bool] | None = None
    mode: str = "interval"
    tolerance: float = 0.05
    max_interval: int = 8

    def __post_init__(self) -> None:
        """Checks the ranges."""
        count("taylor_seer: warmup_steps", self.warmup_steps, minimum=1)
        count("taylor_seer: skip_interval_steps", self.skip_interval_steps, minimum=1)
        count("taylor_seer: n_derivatives", self.n_derivatives, minimum=0)
        count("taylor_seer: max_interval", self.max_interval, minimum=1)
        one_of("taylor_seer: mode", self.mode, ("interval", "auto"))
        if not not_negative("taylor_seer: tolerance", self.tolerance):
            raise RequestError("taylor_seer: tolerance must be above 0, got 0")
        steps = () if self.compute_step_map is None else self.compute_step_map
        if not isinstance(steps, Sequence) or {*map(type, steps)} - {bool}:
            raise RequestError(
                "taylor_seer: compute_step_map must be a sequence of True and False, "
                f"got {steps!r}"
            )

    def __call__(self, target: Callable[..., Any]) -> Any:
        """``target`` with a cache: a subclass of a class, a function of a function."""
        if isinstance(target, type):
            return _cached_class(target, self)
        if not callable(target):
            raise RequestError(f"taylor_seer: {target!r} cannot be called")
        return CachedFunction(target, self)


class Cached:
    """What :class:`taylor_seer` adds to a function or a class."""

    _taylor_seer: taylor_seer

    @property
    def _sequence_of_calls(self) -> _Sequence:
        # Made on first use, so that the class's own __init__ stays as it is, and past
        # its __setattr__, which may refuse.
        fresh = _Sequence(self._taylor_seer)
        sequence: _Sequence = self.__dict__.setdefault(_SEQUENCE, fresh)
        return sequence

    def reset_cache(
        self,
        warmup_steps: int | None = None,
        skip_interval_steps: int | None = None,
        compute_step_map: Sequence[bool] | None = None,
    ) -> None:
        """Begins a new sequence: forgets all outputs, and the next call is step 0.

        Args:
            warmup_steps: See :class:`taylor_seer`; here and below ``None`` takes the
                decorator's value, not that of the last reset.
            skip_interval_steps: The same.
            compute_step_map: The same.

        Raises:
            RequestError: A value is out of range; the old sequence then goes on.
        """
        given = {
            "warmup_steps": warmup_steps,
            "skip_interval_steps": skip_interval_steps,
            "compute_step_map": compute_step_map,
        }
        changes: Any = {key: v for key, v in given.items() if v is not None}
        self.__dict__[_SEQUENCE] = _Sequence(replace(self._taylor_seer, **changes))

    def cache_info(self) -> CacheInfo:
        """Computed and skipped calls since the last reset."""
        return self._sequence_of_calls.info


_SEQUENCE = "_taylor_seer_sequence"


@final
class CachedFunction(Cached):
    """A function with its cache."""

    def __init__(self, function: Callable[..., Any], settings: taylor_seer) -> None:
        functools.update_wrapper(self, function, updated=())
        self._taylor_seer = settings
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's output, or a forecast of it."""
        return self._sequence_of_calls.call(self._function, *args, **kwargs)


def _cached_class(cls: Any, settings: taylor_seer) -> type:
    names = set(dir(cls))
    if not names & {"forward", "__call__"}:
        raise RequestError(f"taylor_seer: {cls.__name__} has no forward or __call__")
    if names & {"reset_cache", "cache_info"}:
        raise RequestError(f"taylor_seer: {cls.__name__} already has a cache")
    name = "forward" if "forward" in names else "__call__"
    function = getattr(cls, name)

    @functools.wraps(function)
    def call(self: Cached, /, *args: Any, **kwargs: Any) -> Any:
        bound = functools.partial(function, self)
        return self._sequence_of_calls.call(bound, *args, **kwargs)

    body: dict[str, Any] = {"_taylor_seer": settings, name: call}
    if "__call__" not in names:
        body["__call__"] = call
    cached = types.new_class(
        cls.__name__, (cls, Cached), {}, lambda ns: ns.update(body)
    )
    functools.update_wrapper(cached, cls, updated=())
    return cached


@final
class _Sequence:
    """What a function or an instance remembers of its calls."""

    def __init__(self, settings: taylor_seer) -> None:
        self.info = CacheInfo(0, 0)
        self._settings = settings
        steps = settings.compute_step_map
        self._map = None if steps is None else tuple(steps)
        self._steps = deque[int](maxlen=settings.n_derivatives + 1)
        self._values = deque[Any](maxlen=settings.n_derivatives + 1)
        self._form: object = None
        self._shapes: object = None  # of no call yet, unlike any call's
        self._narrow: Callable[[Any], Any] = operator.pos
        self._due = 0

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        computed, skipped = self.info
        step = computed + skipped
        shapes = [getattr(each, "shape", None) for each in (*args, *kwargs.values())]
        if shapes == self._shapes and not self._is_due(step):
            output = self._narrow(self._forecast(step))
            self.info = CacheInfo(computed, skipped + 1)
        else:
            output = function(*args, **kwargs)
            self._remember(output, step)
            self._shapes = shapes
            self.info = CacheInfo(computed + 1, skipped)
        return output

    def _is_due(self, step: int) -> bool:
        settings = self._settings
        if self._map is not None:
            return all(self._map[step : step + 1])
        if step < settings.warmup_steps:
            return True
        if settings.mode == "auto":
            return step >= self._due
        return (step - settings.warmup_steps + 1) % settings.skip_interval_steps == 0

    def _forecast(self, step: int) -> Any:
        weights = series_weights(self._steps, step)
        return sum(map(operator.mul, self._values, weights))

    def _remember(self, output: Any, step: int) -> None:
        value, narrow = _widen(output)
        form = (type(output), tuple(output.shape), output.dtype, output.device)
        if form != self._form:
            self._steps.clear()
            self._values.clear()
        is_measured = self._settings.mode == "auto" and len(self._values) > 0
        self._due = step + (self._gap(value, step) if is_measured else 1)
        self._steps.append(step)
        self._values.append(value)
        self._form, self._narrow = form, narrow

    def _gap(self, value: Any, step: int) -> int:
        """Steps to the next computed one."""
        error = _total(abs(self._forecast(step) - value))
        size = _total(abs(value))
        gaps = next_gap(
            np.array([step - self._steps[-1]]),
            np.array([error / size if size else math.nan]),
            self._settings.tolerance,
            exact_degree(len(self._values) - 1),
            self._settings.max_interval,
        )
        return int(gaps[0])


def _total(value: Any) -> float:
    # A method in numpy and torch, a function in the array API.
    if hasattr(value, "sum"):
        return float(value.sum())
    return float(value.__array_namespace__().sum(value))


def _widen(output: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A copy to calculate with, and what turns results into the output's kind."""
    # Whoever returns a tensor or a Buffer has loaded its library: nothing to import.
    torch, driver = map(sys.modules.get, ("torch", "max.driver"))
    if driver and isinstance(output, driver.Buffer):
        from .core.buffers import from_numpy, to_numpy

        value, _ = _widen(to_numpy(output))
        form = {"dtype": output.dtype, "device": output.device}
        return value, functools.partial(from_numpy, **form)
    if torch and isinstance(output, torch.Tensor):
        if output.dtype.is_floating_point:
            is_double = output.dtype == torch.float64
            dtype = torch.float64 if is_double else torch.float32
            value = output.detach().to(dtype, copy=True)
            return value, operator.methodcaller("to", output.dtype)
    elif "__array_namespace__" in dir(output):
        xp = output.__array_namespace__()
        if xp.isdtype(output.dtype, "real floating"):
            dtype = xp.result_type(output.dtype, xp.float32)
            value = xp.asarray(output, dtype=dtype, copy=True)
            if isinstance(output, np.generic):
                return value, output.dtype.type
            return value, functools.partial(xp.asarray, dtype=output.dtype)
    kind = getattr(output, "dtype", type(output).__name__)
    raise RequestError(
        f"taylor_seer: the output must be one floating-point array, got {kind}"
    )
