"""Runs a guest of ten instructions in a Linux machine on HOST: `guest_inside.py HOST`; what became of it as JSON."""

import json
import struct
import sys

import kvm2
from kvm2.board.linux import LinuxMachine
from kvm2.board.loader import Image, Segment
from kvm2.board.virtio.rng import Rng
from kvm2.spec import MemoryRange, VmSpec

BASE = 1 << 40
WORDS = (
    0xD2A12002,  # mov x2, #UART_BASE
    *(0x38401401, 0x39000041) * 4,  # ldrb w1, [x0], #1; strb w1, [x2]
    0xD2A14003,  # mov x3, #VIRTIO_BASE
    0xB9400861,  # ldr w1, [x3, #8]: DeviceID
    0x39000041,  # strb w1, [x2]
    0xD2B08000,  # mov x0, #0x84000000
    0xF2800100,  # movk x0, #8: PSCI SYSTEM_OFF
    0xD4000002,  # hvc #0
)
CODE = struct.pack(f"<{len(WORDS)}I", *WORDS)


def main(host: str) -> None:
    spec = VmSpec(physaddr_bits="auto", memory=(MemoryRange(BASE, 1 << 20),))
    with kvm2.open(host) as kvm, LinuxMachine(kvm, spec, cpus=2, virtio=[Rng()]) as machine:
        machine.load(Image("guest", BASE, (Segment(BASE, CODE, len(CODE)),)))
        result = machine.run(60)
        gic = machine.gic
        told = [result.ended, result.console.hex(), result.exits, gic.version, gic.its is not None, machine.ipa_bits]
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
