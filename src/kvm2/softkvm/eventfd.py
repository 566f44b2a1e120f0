"""The client's eventfds, as KVM holds them (`eventfd_ctx_fdget`, fs/eventfd.c): real descriptors of this process.

The kernel keeps a reference to the eventfd itself, so the client may close its descriptor; here `dup` does that. One
difference follows: an eventfd that every other holder has closed stays an irqfd until it is deassigned or its VM goes.
"""

from __future__ import annotations

import errno
import os
import re
import select
import struct
import sys
import threading
from typing import Final

from kvm2.errors import KvmError

_ONE: Final = struct.pack("=Q", 1)
_VALUE: Final = struct.calcsize("=Q")
_INT_MAX: Final = (1 << 31) - 1
_ID: Final = re.compile(r"^eventfd-id:\s*(\d+)$", re.M)  # fs/eventfd.c: eventfd_show_fdinfo, since Linux 5.2

SUPPORTED: Final = sys.platform == "linux" and hasattr(os, "eventfd")


class EventFd:
    """One reference to the eventfd behind the client's descriptor `fd`; `id` is the same for all of one eventfd.

    KvmError: EBADF not open, EINVAL not an eventfd, ENOSYS where the operating system has none.

    >>> theirs = os.eventfd(0)
    >>> ours = EventFd(theirs)
    >>> ours.signal(), ours.signal(), os.eventfd_read(theirs)
    (None, None, 2)
    >>> ours.close(); os.close(theirs)
    """

    def __init__(self, fd: int) -> None:
        self.fd = -1
        # The collector may close it in the midst of anything that this thread does.
        self._lock = threading.RLock()
        if not SUPPORTED:
            raise KvmError(errno.ENOSYS, f"eventfds are Linux's; {sys.platform} has none: read the exits instead")
        if not 0 <= fd <= _INT_MAX:
            raise KvmError(errno.EBADF, f"descriptor {fd} is not open in this process")
        try:
            self.fd = os.dup(fd)
        except OSError as error:
            raise KvmError(error.errno or errno.EBADF, f"descriptor {fd} of this process: {error.strerror}") from None
        self.id = self._identify(fd)
        self._room = select.poll()
        self._room.register(self.fd, select.POLLOUT)
        self._readable = select.poll()
        self._readable.register(self.fd, select.POLLIN)

    def _identify(self, fd: int) -> int:
        try:
            with open(f"/proc/self/fdinfo/{self.fd}") as file:
                found = _ID.search(file.read())
        except OSError as error:
            raise KvmError(errno.ENOSYS, f"whether {fd} is an eventfd is asked of /proc: {error.strerror}") from None
        if found is None:
            what = os.readlink(f"/proc/self/fd/{self.fd}")
            raise KvmError(errno.EINVAL, f"descriptor {fd} is {what}: an eventfd is needed (os.eventfd)")
        return int(found[1])

    def signal(self) -> None:
        """Adds 1 (`eventfd_signal`): never waits; a counter that is full stays as it is, and wakes who waits anyway."""
        with self._lock:
            if self.fd >= 0 and self._room.poll(0):
                os.write(self.fd, _ONE)

    def readable(self) -> bool:
        """Whether it is signalled."""
        with self._lock:
            return self.fd >= 0 and bool(self._readable.poll(0))

    def take(self) -> bool:
        """Reads the counter away (`eventfd_ctx_do_read`), without waiting; whether there was something."""
        with self._lock:
            if self.fd < 0:
                return False
            try:
                # The descriptor's O_NONBLOCK is the client's: it must not be changed, and may not be set.
                return os.preadv(self.fd, [bytearray(_VALUE)], -1, os.RWF_NOWAIT) == _VALUE
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:  # Linux before 5.8
                    return False
            return self.readable() and os.read(self.fd, _VALUE) != b""

    def close(self) -> None:
        """Drops the reference; nothing is signalled any more."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def __del__(self) -> None:
        self.close()
