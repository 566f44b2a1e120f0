"""A guest that uses its GICv3, its timers and the other CPUs' interrupts; on a single vCPU and on four."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import kvm2
from kvm2.board.linux import LinuxMachine
from kvm2.board.loader import read_image
from kvm2.spec import MemoryRange, VmSpec

from .rig import RAM, RAM_SIZE, Ran, build

DEVICE, SPI = 0x0B00_0000, 8
IIDR, CTLR, SRE = 0x4B00343B, 0x8C00, 7
FIQ, OUT = 0x1000, 0x100
ROUNDS = 2000


class Machine(LinuxMachine):
    """With a device whose interrupt is raised by a write and lowered by a read."""

    def mmio(self, exit):
        if exit.address == DEVICE:
            self.line(SPI)(exit.is_write)
            if not exit.is_write:
                exit.reply(0)
            return
        super().mmio(exit)


def play(host: str, cpus: int, name: str = "gic") -> Ran:
    image = build(name, RAM, f"-DCPUS={cpus}", f"-DROUNDS={ROUNDS}")
    spec = VmSpec(memory=(MemoryRange(RAM, RAM_SIZE),))
    with kvm2.open(host) as kvm, Machine(kvm, spec, cpus=cpus, its=False) as machine:
        machine.load(read_image(image, machine.memory), params=False)
        result = machine.run(timeout=60)
        ran = Ran(machine, result, RAM)
        assert result.ended == "shutdown", (result, [hex(v.regs.pc) for v in machine.vcpus], ran.out(), ran.log())
    return ran


PRIORITIES, SPURIOUS, PIDR2, ROUTE = 0xF8F8F8F8, 1023, 0x3B, 0xFFFFFF
NOT_SUPPORTED, INVALID_PARAMETERS, PSCI_1_1 = 2**64 - 1, 2**64 - 2, 0x10001
RACES = 20


@pytest.mark.parametrize("host", ["max-4k-6.12", "cortex-a57-4k"])
def test_frames_states_timers_and_races(host: str) -> None:
    """After what kvm-unit-tests ask of gic, timer and psci."""
    ran = play(host, 4, "timergic")
    assert not any(ran.log(cpu) or (cpu and ran.out(cpu)) for cpu in range(4))
    words = iter(ran.out())

    def following(count: int) -> list[int]:
        return [next(words) for _ in range(count)]

    assert following(2) == [1, PIDR2], "TYPER and IIDR cannot be written"
    assert following(3) == [PRIORITIES, 0x40302010, 0x30], "priorities, by words and bytes"
    assert following(2) == [0, 0], "a byte of IIDR, an interrupt that there is not"
    assert following(4) == [1, 1 << 32 | 1 << 8, PIDR2, 0], "the redistributor's TYPER by halves, ITARGETSR"
    assert next(words) == ROUTE, "no Aff3"
    for kind in ("level", "edge"):
        assert following(6) == [1, 0, 0, 0, 1, 0], f"{kind}: pending, taken back, active, deactivated"
    assert following(2) == [0, 1], "EOImode 1"
    assert following(3) == [1, 2, SPURIOUS], "distributor off and on"
    for timer in ("virtual", "physical"):
        assert following(7) == [0, 1, 5, 0, 0, 1, 0], f"{timer}: future, past, CTL, masked, off, CVAL 0, CVAL -1"
        assert following(3) == [1, 1, 2], f"{timer}: WFI until TVAL, its sign, TVAL 0"
    assert next(words) == 1, "WFI sleeps though a timer fired whose interrupt is off"
    assert following(4) == [PSCI_1_1, INVALID_PARAMETERS, INVALID_PARAMETERS, 0], "affinities"
    assert following(3) == [INVALID_PARAMETERS, NOT_SUPPORTED, NOT_SUPPORTED], "SYSTEM_RESET2, _SUSPEND, unknown"
    assert following(3) == [0, 0, 0], "CPU_SUSPEND with an interrupt that waits; CPU_ON"
    assert following(4) == [RACES, 2 * RACES, 0, RACES], "of three that turn a CPU on, one does"
    assert not list(words)


def journals(words: Iterator[int], count: int) -> list[list[int]]:
    return [[next(words) for _ in range(next(words))] for _ in range(count)]


@pytest.mark.parametrize(("host", "cpus"), [("cortex-a57-4k", 1), ("max-4k-6.12", 4)])
def test_what_a_guest_sees_of_its_gic(host: str, cpus: int) -> None:
    ran = play(host, cpus)
    assert not ran.log()
    words = iter(ran.out())
    assert next(words) == 0xA080A0A0, "priorities by byte"
    assert [next(words) for _ in range(4)] == [IIDR, CTLR, SRE, 1]
    assert [next(words), next(words)] == [1, 1 << 1], "HPPIR1, ISPENDR0 of a masked SGI"
    plain, ordered = journals(words, 2)
    assert plain == [1, 1 + OUT]
    assert ordered == [2, 2 + OUT, 1, 1 + OUT]
    assert next(words) == 0xA0, "ICC_RPR_EL1 in the handler"
    nested, groups = journals(words, 2)
    assert nested == [1, 2, 2 + OUT, 1 + OUT, 3, 3 + OUT]
    assert groups == [5 + FIQ, 5 + OUT], "SGI 6 is group 1, which ICC_SGI0R_EL1 does not reach"
    assert next(words) == 1 << 1, "ISACTIVER0 with EOImode 1"
    split, again = journals(words, 2)
    assert split == [1, 1 + OUT] and again == [1, 1 + OUT]
    masked, disabled, timers, device = journals(words, 4)
    assert masked == [2, 2 + OUT] and disabled == [4, 4 + OUT]
    assert timers == [27, 30]
    assert device == [40, 40, 40]
    if cpus == 1:
        return
    assert [next(words) for _ in range(cpus - 1)] == [0] * (cpus - 1), "CPU_ON"
    assert next(words) == ROUNDS
    assert sum(next(words) for _ in range(cpus - 1)) == ROUNDS
    assert [next(words), next(words)] == [0, 0], "neither its own broadcast nor another CPU's SPI"
    assert not list(words)
    for cpu in range(1, cpus):
        assert ran.out(cpu) == [0xA080A0A0] and not ran.log(cpu)
