"""Caches and model families that others bring, for programs without code of their own.

A plugin is a Python module that registers what it has when it is imported, by
:func:`~max_diffusion.register_cache` and :func:`~max_diffusion.register_model`. It runs
with all rights of the process: it is loaded where the operator names it, and never from
a model's folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .errors import RequestError


def load_plugins(names: Iterable[str], where: str = "--plugin") -> None:
    """Imports plugins, each once.

    Args:
        names: Of modules that can be imported, or paths that end in ``.py``.
        where: Where they were given, for messages.

    Raises:
        RequestError: One is not there, or fails.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _load_file(Path(name), where)
            else:
                importlib.import_module(name)
        except RequestError:
            raise  # it says itself what it registers wrongly
        except Exception as err:
            raise RequestError(
                f"{where}: {name} cannot be loaded ({type(err).__name__}: {err}); give "
                "a module's name, or a path that ends in .py"
            ) from err


def _load_file(path: Path, where: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        loaded = getattr(known, "__file__", None)
        if loaded is not None and Path(loaded).resolve() == path.resolve():
            return
        raise RequestError(
            f"{where}: {path} has the name of a module that is loaded already "
            f"({name}); rename the file"
        )
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "any .py has both"
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
