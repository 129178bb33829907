"""A cache as one request uses it: checked once, when the request is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from .config import AbstractCacheConfig
from .kinds import AbstractCache


@final
@dataclass(frozen=True)
class BoundCache:
    """A cache that the model can run and whose rules fit the request.

    Made by :meth:`CacheSupport.bind`; shared by all guidance branches of the request,
    each of which has a state of its own.
    """

    config: AbstractCacheConfig
    """The cache's complete options."""
    policy: AbstractCache
    """The policy that decides what each step computes, and runs the steps."""
    required_steps: frozenset[int]
    """0-based steps that are computed whatever the policy says."""
