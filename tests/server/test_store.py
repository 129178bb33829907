"""Pictures that wait to be fetched."""

from __future__ import annotations

import time

from max_diffusion.serving.http.store import ImageStore


def test_the_oldest_go_when_there_are_too_many_bytes() -> None:
    store = ImageStore(max_bytes=10, max_seconds=60)
    names = [store.put(bytes(4), "png") for _ in range(3)]
    assert [store.get(name) is not None for name in names] == [False, True, True]
    assert store.get(names[2]) == ("image/png", bytes(4))
    large = store.put(bytes(100), "webp")
    assert store.get(names[2]) is None
    assert store.get(large) == ("image/webp", bytes(100))  # someone was told of it


def test_they_go_after_a_while() -> None:
    store = ImageStore(max_bytes=10, max_seconds=0.01)
    name = store.put(b"x", "png")
    time.sleep(0.02)
    assert store.get(name) is None
