"""Intel's AMX, a processor's unit for products of small matrices of bfloat16.

Linux lets only processes use it that asked to, as it has to keep 8 KiB more of each of
their threads. Operations for CPUs (``graphs/kernels/matrix_unit.mojo``) look whether
this one may; whether the processor's unit multiplies bfloat16 is found out here.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Final

from .processor_flags import system_flags

_NEEDED: Final = frozenset(["amx_tile", "amx_bf16"])
# Of arch_prctl, and the number of the unit's registers among what processors keep.
_ARCH_PRCTL: Final = 158
_REQUEST_PERMISSION: Final = 0x1023
_REGISTERS: Final = 18


def permitted_matrix_unit() -> bool:
    """Asks for the processor's unit, for all threads of this process.

    Returns:
        Whether it may be used: there is one that multiplies bfloat16, and the operating
        system permits it. Asked again, it does nothing.
    """
    # Machine, too: calls have other numbers elsewhere.
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if not system_flags() >= _NEEDED:
        return False
    call = ctypes.CDLL(None).syscall
    return call(_ARCH_PRCTL, _REQUEST_PERMISSION, _REGISTERS) == 0
