"""Every error that kvm2 raises on purpose.

    Kvm2Error                 what the command line turns into exit code 1
    ├── KvmError (OSError)    an ioctl was refused: errno, and the findings that say why
    ├── GuestError            a guest image that cannot be loaded
    └── UsageError            a wrong argument or input file: exit code 2
        └── HostError         a host that is not known, or a host file that is wrong
    EnvironmentFault          this machine lacks something (the emulated core, a device): exit code 3

Messages say what was asked, what is allowed and why, and what to do.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.abi.findings import Finding


def errno_name(number: int) -> str:
    """An errno's name as KVM's documentation has it.

    >>> errno_name(22), errno_name(_errno.EOPNOTSUPP), errno_name(9999)
    ('EINVAL', 'EOPNOTSUPP', '9999')
    """
    # Linux gives ENOTSUP the same number, and Python that name.
    return "EOPNOTSUPP" if number == _errno.EOPNOTSUPP else _errno.errorcode.get(number, str(number))


class Kvm2Error(Exception):
    """The root of every error that kvm2 raises on purpose."""


class KvmError(Kvm2Error, OSError):
    """An ioctl was refused. It is an `OSError`: `errno` and `strerror` work.

    `findings` has every reason, in the order in which the host checks; it is empty where the host (a mainline ioctl)
    gives only an errno. `reason` is the software KVM's own explanation of a bare errno: advisory, never compared.

    >>> KvmError(22, "no such type").errno
    22
    """

    def __init__(self, errno: int, reason: str = "", findings: Sequence[Finding] = ()) -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.reason = reason
        self.findings = tuple(findings)

    @property
    def name(self) -> str:
        """The errno's name, "EINVAL"."""
        return errno_name(self.errno or 0)

    def __str__(self) -> str:
        if self.findings:
            return f"{self.name}: " + "; ".join(str(finding) for finding in self.findings)
        return f"{self.name}: {self.reason or self.strerror}"


class GuestError(Kvm2Error):
    """A guest image that cannot be loaded: what it is, what is accepted."""


class UsageError(Kvm2Error):
    """An argument or an input file that is wrong: where, what, what is allowed."""


class HostError(UsageError):
    """A host name that is not known, or a host file that is wrong (file, key, reason)."""


class EnvironmentFault(Kvm2Error):
    """Something that this machine must provide is missing or not what was expected."""
