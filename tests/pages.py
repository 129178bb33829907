"""What a report's page holds."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image


class Page(HTMLParser):
    """A page's tags, text and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset")
        ]

    def handle_data(self, data: str) -> None:
        self.words = " ".join([*self.words.split(), *data.split()])

    @property
    def pictures(self) -> list[np.ndarray]:
        found = []
        for link in self.links:
            kind, _, data = link.partition(",")
            assert kind == "data:image/png;base64"
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                found.append(np.asarray(image))
        return found


def check_alone(text: str) -> None:
    """Nothing that a page could need from elsewhere."""
    page = Page(text)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    rest = re.sub(r"data:[^\"]*", "", text)
    assert not re.search(r"https?:|//|url\(|@import", rest)
