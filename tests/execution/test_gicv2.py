"""A guest that uses its GICv2: SGIs that name their sender, priorities, both groups; on a single vCPU and on three."""

from __future__ import annotations

import pytest

import kvm2
from kvm2.board.linux import LinuxMachine
from kvm2.board.loader import read_image
from kvm2.spec import MemoryRange, VmSpec

from .rig import RAM, RAM_SIZE, Ran, build
from .test_gic import journals

IIDR, FIQ = 0x4B00343B, 0x10000
ROUNDS = 500


def play(host: str, cpus: int) -> Ran:
    image = build("gicv2", RAM, f"-DCPUS={cpus}", f"-DROUNDS={ROUNDS}")
    spec = VmSpec(memory=(MemoryRange(RAM, RAM_SIZE),))
    with kvm2.open(host) as kvm, LinuxMachine(kvm, spec, cpus=cpus, gic=2) as machine:
        machine.load(read_image(image, machine.memory), params=False)
        result = machine.run(timeout=60)
        ran = Ran(machine, result, RAM)
        assert result.ended == "shutdown", (result, [hex(v.regs.pc) for v in machine.vcpus], ran.out(), ran.log())
    return ran


@pytest.mark.parametrize(("host", "cpus"), [("max-4k-gicv2", 1), ("raspberry-pi-4", 3)])
def test_what_a_guest_sees_of_its_gicv2(host: str, cpus: int) -> None:
    ran = play(host, cpus)
    assert not ran.log()
    words = iter(ran.out())
    assert [next(words) for _ in range(4)] == [cpus - 1, IIDR, 0x01010101, 0xA080A0A0]
    assert next(words) == 0xF8 << 16 | 2 << 8 | 3, "five bits of priority, the smallest binary points"
    assert next(words) == 2, "HPPIR: the higher priority"
    (both,) = journals(words, 1)
    assert both == [2, 1]
    assert next(words) == 0xA0, "RPR in the handler"
    (preempted,) = journals(words, 1)
    assert preempted == [1, 2, 3]
    assert [next(words), next(words)] == [1 << 1, 0], "ISACTIVER before DIR and after"
    assert [next(words), next(words), next(words)] == [1022, 1022, 4], "IAR and HPPIR without AckCtl, IAR with it"
    groups, devices = journals(words, 2)
    assert groups == [2 + FIQ, 4] and devices == [27, 41]
    if cpus == 1:
        assert not list(words)
        return
    assert [next(words) for _ in range(cpus - 1)] == [0] * (cpus - 1), "CPU_ON"
    assert next(words) == ROUNDS
    assert next(words) == 0b110, "an answer of each of the others"
    assert [next(words), next(words)] == [2, 0], "ITARGETSR; the SPI came to vCPU 1 only"
    assert not list(words)
    for cpu in range(1, cpus):
        assert ran.out(cpu) == [0xA080A0A0] and not ran.log(cpu)
