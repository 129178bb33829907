"""The operations in Mojo that graphs on a CPU call, as MAX takes them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import graphs

from ..errors import CompileError
from .artefacts import compiler_versions
from .compile_cache import prepared_compile_cache

_REGISTERED: Final = re.compile(r'^@extensibility\.register\("(\w+)"\)', re.MULTILINE)
_IMPORTED: Final = re.compile(r"^from \.(\w+) import", re.MULTILINE)


def kernel_sources() -> Sequence[Path]:
    """Returns all sources of the operations."""
    return sorted((Path(graphs.__file__).parent / "kernels").glob("*.mojo"))


@cache
def kernel_hash() -> str:
    """Returns a hash of the sources, and of what compiles them."""
    return _hash_of(kernel_sources())


@cache
def operations_hash(operations: frozenset[str]) -> str:
    """Returns a hash of the sources that operations are made of, and of the compiler.

    Args:
        operations: Their names, as graphs call them. Of one that no source registers
            all sources count.
    """
    texts = {path.stem: path.read_text() for path in kernel_sources()}
    names = {stem: set(_REGISTERED.findall(text)) for stem, text in texts.items()}
    if not operations <= set().union(*names.values()):
        return kernel_hash()
    pending = {stem for stem, own in names.items() if own & operations}
    wanted: set[str] = set()
    while pending:
        stem = pending.pop()
        wanted.add(stem)
        pending |= set(_IMPORTED.findall(texts[stem])) - wanted
    return _hash_of(path for path in kernel_sources() if path.stem in wanted)


def _hash_of(sources: Iterable[Path]) -> str:
    digest = hashlib.sha256(repr(compiler_versions()).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def kernel_library() -> Path:
    """Returns the operations precompiled, which takes seconds once a release.

    Kept beside MAX's own compiled graphs. It is no machine code: MAX makes that when it
    compiles a graph, for the processor that the graph is for.

    Raises:
        CompileError: The Mojo compiler is missing, or refuses them.
    """
    # MAX imports it by its name, which has to be one of Mojo's.
    library = prepared_compile_cache() / f"diffusion_{kernel_hash()[:32]}.mojoc"
    if library.is_file():
        # MAX 26.7 knows compiled graphs by its place, too: a link is where it leads.
        return library.resolve()
    try:
        # Of several processes each writes a whole file, under its name, which is in it.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            own = Path(folder) / library.name
            _precompile(kernel_sources()[0].parent, own)
            own.replace(library)
    except OSError as err:
        raise CompileError(
            f"compile: the operations for CPUs cannot be precompiled: {err}"
        ) from err
    return library.resolve()


@cache
def compiler_features() -> frozenset[str]:
    """Returns the instructions that MAX compiles for on this machine, as LLVM has them.

    They may be fewer than the processor's: a virtual one may claim to be an older one.
    None where the Mojo compiler does not tell.
    """
    try:
        done = _run_mojo(["build", "--print-effective-target"])
    except CompileError:
        return frozenset()
    found = re.search(r"--target-features (\S+)", done.stdout)
    return frozenset(found[1].split(",") if found else ())


def _precompile(sources: Path, library: Path) -> None:
    done = _run_mojo(["precompile", str(sources), "-o", str(library)])
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error:" in line]
        said = lines[0] if lines else f"mojo ended with {done.returncode}"
        raise CompileError(
            f"compile: the operations for CPUs cannot be precompiled: {said}"
        )


def _run_mojo(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        from mojo.run import subprocess_run_mojo  # type: ignore[import-untyped]

        done: subprocess.CompletedProcess[str] = subprocess_run_mojo(
            arguments, capture_output=True, text=True
        )
    except (ImportError, RuntimeError) as err:
        raise CompileError(f"compile: no Mojo compiler: {err}") from err
    return done
