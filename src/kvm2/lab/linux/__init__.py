"""Linux as a guest: Debian's kernels, an initramfs, and a conversation with the shell in it."""

from kvm2.lab.linux.files import DEFAULT_FLAVOUR, LinuxFiles, linux_files
from kvm2.lab.linux.initramfs import PROMPT
from kvm2.lab.linux.session import Session

__all__ = ["DEFAULT_FLAVOUR", "PROMPT", "LinuxFiles", "Session", "linux_files"]
