"""The memory of this process, as the C library manages it."""

import ctypes

# Of mallopt, in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have the C library keep what tensors on the CPU free, for the next ones.

    By default it gives large blocks back at once, and the system hands out new ones page by page,
    each of which it must clear first. A training step frees and takes such blocks all the time: without this,
    up to a tenth of its time went there. A process then holds as much memory as it ever used at a time.

    Returns:
        Whether that was done. Only glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, or another system
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
