"""The memory of this process, as the C library manages it."""

import ctypes

# Of mallopt, in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Their values for keeping memory, and the library's own.
_KEEP, _DEFAULT = (-1, 0), (128 * 1024, 65536)


def keep_freed_memory(keep: bool = True) -> bool:
    """Have the C library keep what tensors on the CPU free, for the next ones.

    By default it gives large blocks back at once, and the system hands out new ones page by page,
    each of which it must clear first. A training step frees and takes such blocks all the time: without this,
    up to a tenth of its time went there. A process then holds as much memory as it ever used at a time.

    Args:
        keep: False gives back what is kept, and goes back to the default.

    Returns:
        Whether that was done. Only glibc can.
    """
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError):  # another C library, or another system
        return False
    threshold, blocks = _KEEP if keep else _DEFAULT
    if not keep:
        trim(0)
    return bool(mallopt(_M_MMAP_MAX, blocks) and mallopt(_M_TRIM_THRESHOLD, threshold))
