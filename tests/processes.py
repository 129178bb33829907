"""Other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, Final

# A child that hangs is a test that fails, not a run that never ends. A cold compile of
# every graph takes five minutes.
_TIMEOUT: Final = 1200.0


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, with this process's first environment.

    MAX 26.7 sets PYTHONPATH and PYTHONEXECUTABLE in C while it builds graphs; Python
    does not see that, but children would, and would not find the virtual environment.
    """
    options.setdefault("env", dict(os.environ))
    options.setdefault("timeout", _TIMEOUT)
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code."""
    return run(sys.executable, "-c", code)
