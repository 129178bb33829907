"""What the command lines of benchmarks share: errors in one line, and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from max_diffusion.errors import MaxDiffusionError, RequestCancelled, RequestError


class Parser(argparse.ArgumentParser):
    """Errors in one line, as those of ``max-diffusion``."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with an argument."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(RequestError.exit_code)


@contextmanager
def errors_told(*, is_debugging: bool) -> Iterator[None]:
    """Ends with one line and the error's code.

    Args:
        is_debugging: Lets errors through instead.
    """
    try:
        yield
        sys.stdout.flush()
    except RequestCancelled as err:
        print(f"cancelled: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    except MaxDiffusionError as err:
        if is_debugging:
            raise
        print("error:", " ".join(str(err).splitlines()), file=sys.stderr)
        sys.exit(err.exit_code)
    except BrokenPipeError:
        # The reader of our output has left; give Python's last flush a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
