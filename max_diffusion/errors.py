"""Every error this package raises on purpose.

::

    MaxDiffusionError
    ├── RequestError       the caller's value is wrong            exit 2, HTTP 400/422
    │   └── CacheNotLoadedError  a cache the model was loaded without
    ├── ModelLoadError     files, names, shapes, dtypes           exit 3
    ├── CompileError       a graph did not build or compile       exit 4
    ├── DeviceError        no such device, or out of its memory   exit 5
    ├── CacheStateError    a denoising cache used out of order    exit 1
    └── RequestCancelled   the caller stopped the request         exit 130

A message is one line: where, what was expected, what came, how to fix it.
"""

from __future__ import annotations

from typing import ClassVar


class MaxDiffusionError(Exception):
    """Base class; catch it to catch everything this package raises."""

    exit_code: ClassVar[int] = 1


class RequestError(MaxDiffusionError, ValueError):
    """A value of the request is missing, malformed or out of range."""

    exit_code: ClassVar[int] = 2


class CacheNotLoadedError(RequestError):
    """A request names a cache that the model was loaded without.

    What mends that is another's to say on a server, which has its own option for it:
    there ``problem`` is told instead of the whole message.

    Args:
        problem: What is wrong, without how to mend it.
        cache: The cache as an option of the command line names it.
    """

    def __init__(self, problem: str, cache: str) -> None:
        super().__init__(problem, cache)  # as given: it is pickled between processes
        self.problem, self.cache = problem, cache

    def __str__(self) -> str:
        return f"{self.problem}; give it in caches at load"


class ModelLoadError(MaxDiffusionError):
    """A model's files are missing, damaged or do not match its configuration."""

    exit_code: ClassVar[int] = 3


class CompileError(MaxDiffusionError):
    """A graph did not build or compile."""

    exit_code: ClassVar[int] = 4


class DeviceError(MaxDiffusionError):
    """A device does not exist, failed, or has too little memory."""

    exit_code: ClassVar[int] = 5


class CacheStateError(MaxDiffusionError):
    """A denoising cache was used out of order or with another request's shapes."""


class RequestCancelled(MaxDiffusionError):
    """The caller stopped the request before its picture was done."""

    exit_code: ClassVar[int] = 130
