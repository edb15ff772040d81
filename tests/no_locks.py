"""A process for which the kernel cannot lock files, as on some file systems of a network."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_FLOCK = {"x86_64": 73, "aarch64": 32}
"""Number of flock(2): asm/unistd.h."""
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def can_forbid() -> bool:
    """Whether `forbid_locks` knows this machine."""
    return os.uname().machine in _FLOCK


def forbid_locks(error: int = errno.ENOLCK) -> None:
    """Let flock fail in this process and in all that it starts; cannot be undone.

    By a filter of the kernel: seccomp(2). The number of a call is the first word that it sees.
    """
    program = b"".join(
        struct.pack("HBBI", *step)
        for step in (
            (_LOAD, 0, 0, 0),
            (_JUMP_IF_EQUAL, 0, 1, _FLOCK[os.uname().machine]),
            (_RETURN, 0, 0, _ERRNO | error),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(code)))
    library = ctypes.CDLL(None, use_errno=True)
    for call in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filters),
    ):
        if library.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), "cannot filter system calls")
