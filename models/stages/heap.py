"""Freed memory stays the process's own, where the system would take it back and give it again page by page.

A step on a CPU frees at its end what the next one asks for at once. glibc hands large pieces back each time,
and every page of them comes again as an interruption that fills it with zeros: some hundredths of a step.
"""

import ctypes
import platform

#: Of glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_heap() -> bool:
    """Tells the allocator to keep what is freed from now on; False where it is none of glibc.

    The peak rises by about a hundredth. Memory that one part of a run freed is there for the next, but not
    for other processes until the run ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER) and mallopt(_MMAP_MAX, 0))
