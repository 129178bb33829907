"""Images and videos over HTTP, as OpenAI's clients speak it."""

from __future__ import annotations

from .app import create_app
from .backend import Backend, LocalBackend, ModelDescription
from .settings import ServerSettings

__all__ = [
    "Backend",
    "LocalBackend",
    "ModelDescription",
    "ServerSettings",
    "create_app",
]
