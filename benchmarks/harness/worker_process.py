"""One process at a time, watched to its end."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from .runtimes import PeerError, environment


def output_of(
    line: Sequence[str],
    *,
    variables: Mapping[str, str],
    limit_seconds: float,
    on_wait: Callable[[], None],
) -> str:
    """Runs a process to its end.

    Args:
        line: Program and arguments.
        variables: Environment variables beside those of this process.
        limit_seconds: Seconds after which it is ended.
        on_wait: Called twice a second; what it raises ends the process.

    Returns:
        What it wrote to standard output.

    Raises:
        PeerError: It took too long, or ended with another code than 0.
    """
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
    ):
        process = subprocess.Popen(
            line, stdout=output, stderr=errors, env={**environment(), **variables}
        )
        end = time.monotonic() + limit_seconds
        try:
            while process.poll() is None:
                on_wait()
                if time.monotonic() > end:
                    raise PeerError(f"it took more than {limit_seconds:.0f} s")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            said = errors.read().strip().splitlines() or ["it said nothing"]
            raise PeerError(f"it ended with {process.returncode}: {said[-1][:300]}")
        return output.read()
