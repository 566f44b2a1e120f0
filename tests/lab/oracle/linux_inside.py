"""Boots a Linux on this machine's /dev/kvm: `linux_inside.py KERNEL INITRD`; what became of it as JSON."""

import json
import sys
from pathlib import Path

import kvm2
from kvm2.board.kernel_image import read_kernel
from kvm2.board.linux import LinuxMachine
from kvm2.board.virtio.blk import Blk
from kvm2.board.virtio.rng import Rng
from kvm2.spec import MemoryRange, VmSpec

WORDS = "made by the guest"
DISK = Path("/tmp/disk")  # on the file system of the live kernel's machine


def main(kernel_file: str, initrd_file: str) -> None:
    DISK.write_bytes(bytes(1 << 20))
    kernel, initrd = read_kernel(Path(kernel_file)), Path(initrd_file).read_bytes()
    spec = VmSpec(physaddr_bits="auto", memory=(MemoryRange(1 << 40, 192 << 20),))
    with (
        kvm2.open("/dev/kvm") as kvm,
        LinuxMachine(kvm, spec, cpus=2, virtio=[Blk(str(DISK)), Rng()]) as machine,
    ):
        machine.load_linux(kernel, initrd, "console=ttyAMA0 quiet")
        machine.feed(f"nproc; cat /proc/interrupts; echo {WORDS} > /dev/vda; sync; poweroff\n".encode())
        result = machine.run(1000)
        told = {
            "ended": result.ended,
            "reason": result.reason,
            "console": result.console.decode(errors="replace"),
            "ipa_bits": machine.ipa_bits,
            "disk": DISK.read_bytes()[: len(WORDS)].decode(errors="replace"),
        }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
