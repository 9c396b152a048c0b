"""Memory that a process has freed and its C library keeps."""

import ctypes
import sys


def give_back_memory() -> None:
    """Return freed memory to the system; does nothing where the C library is not glibc.

    glibc keeps what is freed for later. Lengths differ from batch to batch, so little of it is used again, and a client
    that has trained holds several times what it needs.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
