"""Memory that is freed and soon needed again stays with the process: records come and go by the megabyte."""

import ctypes
import logging

log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 << 20
"""Free memory at the top of the heap that is kept. Without it glibc gives back what a batch has freed, and the kernel
clears the same pages anew for the next one, which costs more than encoding a group of 600 KB twelve times over."""


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory; does nothing on another C library. Call it once, at the start of a process."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        log.info("this C library has no mallopt: freed memory goes back to the system")
        return
    mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes: larger blocks are mapped, and unmapped when freed
