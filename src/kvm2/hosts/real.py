"""`/dev/kvm` of this machine as a host, and in words why it cannot be one."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from kvm2.errors import EnvironmentFault
from kvm2.hosts.kernel import DEVICE, Kernel, machine_arch
from kvm2.hosts.lowering import Lowered

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.hosts.backend import RawKvm

READ_WRITE = stat.S_IRGRP | stat.S_IWGRP
INSTEAD = "or give a described host (`kvm2 hosts` lists them)"


def open_real(path: str = DEVICE, between: Callable[[RawKvm], RawKvm] | None = None) -> Lowered:
    """The KVM of this machine, with KVM_CREATE_VM2 lowered to what it has. EnvironmentFault where there is none.

    `between` may put something between the lowering and the kernel (a trace).
    """
    why = refusal(path)
    if why:
        raise EnvironmentFault(why)
    kernel: RawKvm = Kernel(path)
    return Lowered(kernel if between is None else between(kernel))


def refusal(path: str = DEVICE) -> str:
    """Why `/dev/kvm` cannot be opened, and what to do; "" where it can."""
    if os.name != "posix" or not Path("/dev").is_dir() or os.uname().sysname != "Linux":
        return f"{path}: KVM is part of Linux, this is {os.uname().sysname}: {INSTEAD[3:]}"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{path} cannot be opened: {error.strerror}. {_what_to_do(path, error.errno or 0)}, {INSTEAD}"
    return ""


def _what_to_do(path: str, number: int) -> str:
    if number in (errno.EACCES, errno.EPERM):
        group = _group(path)
        if group:
            return f"Become a member of the group that owns it ({group}): usermod -aG {group} USER, log in again"
        return (
            f"Only root may use it here: as root chgrp kvm {path}, chmod 660 {path}, usermod -aG kvm USER, log in "
            "again; or run as root"
        )
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return _absent()
    return "See the kernel's log"


def _group(path: str) -> str:
    """The group whose members may open the device; "" where it is root's, or has no rights."""
    import grp

    try:
        status = Path(path).stat()
        allowed = status.st_gid and status.st_mode & READ_WRITE == READ_WRITE
        return grp.getgrgid(status.st_gid).gr_name if allowed else ""
    except KeyError:
        return str(status.st_gid)
    except OSError:
        return "kvm"


def _absent() -> str:
    """The device is not there: because of the CPU, of the machine around, or of a container."""
    if machine_arch() == "x86_64":
        flags = _cpu_flags()
        if not flags & {"vmx", "svm"}:
            virtual = "hypervisor" in flags
            return (
                "This is a virtual machine without nested virtualisation: its host must allow it"
                if virtual
                else "The CPU's virtualisation (vmx, svm) is off: switch it on in the firmware"
            )
        module = "kvm_intel" if "vmx" in flags else "kvm_amd"
        return f"Load the module (modprobe {module}); in a container pass the device (--device /dev/kvm)"
    return (
        "The kernel must be built with KVM and booted at EL2 (a virtual machine needs nested virtualisation for that); "
        "in a container pass the device (--device /dev/kvm)"
    )


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())
