"""Tests of file permissions, also where they run as root, whom permissions do not stop."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# linux/capability.h: version 3 of the interface; the bits of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
_VERSION = 0x20080522
_IGNORES_PERMISSIONS = 1 << 1 | 1 << 2


@contextmanager
def permissions_hold() -> Iterator[None]:
    """A block in which permissions hold for root too, as the owner of its files: it stays the owner of the checkout."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)  # of this thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable bits, twice
    _require(libc.capget(header, before))
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~_IGNORES_PERMISSIONS
    _require(libc.capset(header, without))
    try:
        yield
    finally:
        _require(libc.capset(header, before))


def _require(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
