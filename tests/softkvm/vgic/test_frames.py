"""What a guest reads and writes in the frames of both vGICs, and what comes of it at the CPU interfaces."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from kvm2.abi import gic_registers as regs
from kvm2.softkvm.vgic.irq import SPURIOUS

from .gic import DIST_AT, OTHER_AT, Gic, machine

SPI = 40
RD = 0x20000
SGI = OTHER_AT + 0x10000  # the SGI frame of vCPU 0
ONES = 0xFFFFFFFF


@pytest.fixture
def v3() -> Iterator[Gic]:
    """Two vCPUs; everything open at the CPU interfaces, the distributor off."""
    with machine("v3", (0, 1)) as gic:
        gic.start()
        for cpu in gic.soft.vgic.cpus():
            cpu.interface.set_pmr(0xF8)
            cpu.interface.set_groups(True, True)
        yield gic


@pytest.fixture
def v2() -> Iterator[Gic]:
    with machine("v2", (0, 1)) as gic:
        gic.start()
        for number in (0, 1):
            gic.write(OTHER_AT, 1, vcpu=number)
            gic.write(OTHER_AT + 4, 0xF0, vcpu=number)
        gic.write(DIST_AT, 1)
        yield gic


def line(gic: Gic, vcpu: int = 0) -> bool:
    found: bool = gic.soft.vgic.cpus()[vcpu].irq_line
    return found


def test_a_gicv3_says_what_it_is(v3: Gic) -> None:
    assert v3.read(DIST_AT) == 0x50, "affinity routing, one security state"
    assert v3.read(DIST_AT + 4) == 9 << 19 | 7, "256 interrupts, numbers of 10 bits"
    assert v3.read(DIST_AT + 8) == 0x4B00343B
    assert v3.read(DIST_AT + 0x10) == ONES
    assert v3.read(DIST_AT + 0xFFE8) == v3.read(OTHER_AT + 0xFFE8) == 0x3B
    assert v3.read(OTHER_AT) == 6, "invalidation registers"
    assert v3.read(OTHER_AT + RD + 8, 8) == 1 << 32 | 1 << 8 | 1 << 4, "number, affinity, the last one"
    assert [v3.read(OTHER_AT + RD + at) for at in (8, 12)] == [0x110, 1]


def test_an_its_shows_in_the_typers() -> None:
    with machine("v3") as gic:
        gic.vm.create_device("vgic-its")
        gic.start()
        assert gic.read(DIST_AT + 4) == 15 << 19 | 1 << 17 | 7
        assert gic.read(OTHER_AT + 8) == 0x11


def test_an_spi_goes_where_irouter_says(v3: Gic) -> None:
    bit, word = 1 << SPI % 32, SPI // 32 * 4
    v3.write(DIST_AT, 2)
    v3.write(DIST_AT + 0x6000 + 8 * SPI, 1, 8)
    v3.write(DIST_AT + 0x400 + SPI, 0xA7, 1)
    assert (v3.read(DIST_AT + 0x400 + SPI, 1), v3.read(DIST_AT + 0x400 + SPI)) == (0xA0, 0xA0)
    v3.write(DIST_AT + 0x100 + word, bit)
    v3.write(DIST_AT + 0x200 + word, bit)
    assert (line(v3), line(v3, 1)) == (False, True)
    v3.write(DIST_AT + 0x6000 + 8 * SPI, 0x100, 8)
    assert not line(v3) and not line(v3, 1), "nobody has this affinity"
    assert v3.read(DIST_AT + 0x6000 + 8 * SPI, 8) == 0x100
    v3.write(DIST_AT + 0x6000 + 8 * SPI, 0, 4)
    assert line(v3)
    v3.write(DIST_AT + 0x6004 + 8 * SPI, ONES, 4)
    assert v3.read(DIST_AT + 0x6000 + 8 * SPI, 8) == 0, "there is no Aff3"
    v3.write(DIST_AT, 0)
    assert not line(v3)
    v3.write(DIST_AT, 2)
    assert line(v3), "what was pending is forwarded again"
    v3.write(DIST_AT + 0x280 + word, bit)
    assert not line(v3) and v3.read(DIST_AT + 0x200 + word) == 0


def test_enabling_groups_and_active_state(v3: Gic) -> None:
    v3.write(DIST_AT, 2)
    word = DIST_AT + SPI // 32 * 4
    for at, value, back in ((0x100, 0xF00, 0xF00), (0x180, 0x300, 0xC00), (0x300, 0xFF, 0xFF), (0x380, 0xF0, 0x0F)):
        v3.write(word + at, value)
        assert v3.read(word + at) == back, hex(at)
    assert v3.read(word + 0x80) == ONES, "group 1 at first"
    v3.write(word + 0x80, 0)
    assert v3.read(word + 0x80) == 0
    v3.write(DIST_AT + 0xC08, 0xAAAA_5555)
    assert v3.read(DIST_AT + 0xC08) == 0xAAAA_0000, "edge is the upper bit of two"


def test_sgis_and_ppis_are_in_the_redistributor_of_their_vcpu_only(v3: Gic) -> None:
    v3.write(DIST_AT, 2)
    assert v3.read(SGI + 0x100) == 0xFFFF and v3.read(DIST_AT + 0x100) == 0, "SGIs are on from the start"
    v3.write(DIST_AT + 0x100, ONES)
    assert v3.read(SGI + 0x100) == 0xFFFF
    v3.write(SGI + RD + 0x100, 1 << 27, vcpu=0)  # the one of vCPU 1, from vCPU 0
    assert v3.read(SGI + RD + 0x100) == 0xFFFF | 1 << 27 and v3.read(SGI + 0x100) == 0xFFFF
    v3.write(SGI + RD + 0x200, 1 << 27)
    assert (line(v3), line(v3, 1)) == (False, True)
    assert v3.read(SGI + 0xC00) == 0xAAAA_AAAA and v3.read(SGI + 0xC04) == 0
    v3.write(SGI + 0xC04, ONES)
    assert v3.read(SGI + 0xC04) == 0, "the configuration of PPIs is fixed"


def test_a_level_is_pending_while_it_is_high_or_latched(v3: Gic) -> None:
    bit, word = 1 << SPI % 32, DIST_AT + SPI // 32 * 4
    vgic = v3.soft.vgic
    assert v3.read(DIST_AT + 0xC08) == 0xAAAA_AAAA, "SPIs are edges at first"
    v3.write(DIST_AT + 0xC08, 0)
    vgic.inject(None, SPI, True)
    assert v3.read(word + 0x200) == bit
    v3.write(word + 0x280, bit)
    assert v3.read(word + 0x200) == bit, "the line is still high"
    vgic.inject(None, SPI, False)
    assert v3.read(word + 0x200) == 0


def test_the_bus_has_room_for_a_thousand_devices_and_a_region_that_finds_none_is_not_there(v3: Gic) -> None:
    with machine("v3", (0, 1)) as gic:
        bus = gic.soft.bus
        for number in range(999):
            bus.add(0x1000_0000 + number, 1, gic.soft.vgic)
        assert gic.set(0, 3, OTHER_AT) == "ENOSPC", "room for one redistributor, and there are two vCPUs"
        assert gic.get(0, 3) == (1 << 64) - 1 and bus.at(OTHER_AT, 4) == []
        bus.remove(gic.soft.vgic)
        assert gic.set(0, 3, OTHER_AT) == "" and len(bus.at(OTHER_AT + RD, 4)) == 1


def test_a_gicv2_says_what_it_is(v2: Gic) -> None:
    assert v2.read(DIST_AT) == 1 and v2.read(DIST_AT + 4) == 1 << 5 | 7 and v2.read(DIST_AT + 8) == 0x4B00343B
    assert v2.read(OTHER_AT + 0xFC) == 0x2043B
    assert v2.read(DIST_AT + 0x800) == 0x01010101 and v2.read(DIST_AT + 0x800, vcpu=1) == 0x02020202


def test_an_spi_goes_to_the_first_target_of_a_gicv2(v2: Gic) -> None:
    bit, word = 1 << SPI % 32, SPI // 32 * 4
    v2.write(DIST_AT + 0x800 + SPI, 0xFE, 1)
    assert v2.read(DIST_AT + 0x800 + SPI, 1) == 2, "there are two vCPUs"
    v2.write(DIST_AT + 0x100 + word, bit)
    v2.write(DIST_AT + 0x200 + word, bit)
    assert (line(v2), line(v2, 1)) == (False, True)
    assert v2.read(OTHER_AT + 0x18, vcpu=1) == SPI and v2.read(OTHER_AT + 0x14, vcpu=1) == 0xFF
    assert v2.read(OTHER_AT + 0x0C, vcpu=1) == SPI and v2.read(OTHER_AT + 0x14, vcpu=1) == 0
    assert v2.read(OTHER_AT + 0x0C, vcpu=1) == SPURIOUS
    v2.write(OTHER_AT + 0x10, SPI, vcpu=1)
    assert v2.read(DIST_AT + 0x300 + word) == 0


@pytest.mark.parametrize(
    ("how", "reached"), [(0 << 24 | 2 << 16, (False, True)), (1 << 24, (False, True)), (2 << 24, (True, False))]
)
def test_sgis_of_a_gicv2_name_their_sender(v2: Gic, how: int, reached: tuple[bool, bool]) -> None:
    v2.write(DIST_AT + 0xF00, how | 5)
    assert (line(v2), line(v2, 1)) == reached
    to = reached.index(True)
    assert v2.read(DIST_AT + 0xF20 + 5, 1, vcpu=to) == 1, "vCPU 0 sent it"
    assert v2.read(OTHER_AT + 0x0C, vcpu=to) == 5
    v2.write(OTHER_AT + 0x10, 5, vcpu=to)
    v2.write(DIST_AT + 0xF00, how | 5, vcpu=0)
    v2.write(DIST_AT + 0xF20 + 5, 2, 1, vcpu=to)
    assert v2.read(OTHER_AT + 0x0C, vcpu=to) == 5
    v2.write(OTHER_AT + 0x10, 5, vcpu=to)
    assert v2.read(OTHER_AT + 0x0C, vcpu=to) == 1 << 10 | 5, "then the one of vCPU 1"
    v2.write(OTHER_AT + 0x10, 1 << 10 | 5, vcpu=to)
    assert not line(v2, to)


def test_pending_sgis_of_a_gicv2_are_changed_by_their_own_registers_only(v2: Gic) -> None:
    v2.write(DIST_AT + 0x200, 1 << 5)
    assert not line(v2)
    v2.write(DIST_AT + 0xF24, 1 << 8 | 2 << 24)
    assert v2.read(DIST_AT + 0xF14) == 1 << 8 | 2 << 24 and line(v2)
    v2.write(DIST_AT + 0x280, ONES)
    assert line(v2)
    v2.write(DIST_AT + 0xF14, ONES)
    assert not line(v2)


def test_group_1_of_a_gicv2_needs_ackctl_or_its_own_registers(v2: Gic) -> None:
    bit, word = 1 << SPI % 32, DIST_AT + SPI // 32 * 4
    v2.write(OTHER_AT, 3)
    v2.write(word + 0x80, bit)
    v2.write(word + 0x100, bit)
    v2.write(word + 0x200, bit)
    assert line(v2)
    assert v2.read(OTHER_AT + 0x0C) == v2.read(OTHER_AT + 0x18) == 1022
    assert v2.read(OTHER_AT + 0x28) == SPI and v2.read(OTHER_AT + 0x20) == SPI
    v2.write(OTHER_AT + 0x24, SPI)
    assert v2.read(word + 0x300) == 0
    v2.write(word + 0x200, bit)
    v2.write(OTHER_AT, 7)
    assert v2.read(OTHER_AT + 0x0C) == SPI
    v2.write(OTHER_AT + 0x10, SPI)
    assert v2.read(word + 0x300) == 0


def test_accesses_that_no_register_takes_read_as_zero(v3: Gic) -> None:
    for at, size in ((4, 8), (4, 2), (0x402, 2), (0x100, 1), (0x101, 4), (0x6102, 4), (0x40, 4), (0xF000, 4)):
        assert v3.read(DIST_AT + at, size) == 0
        v3.write(DIST_AT + at, ONES, size)
    assert v3.read(DIST_AT + 0x100 + 8 * 4) == 0, "interrupts 256 and up are not there"
    assert v3.read(DIST_AT + 0x400 + 300, 1) == 0


@pytest.mark.parametrize("model", ["v2", "v3"])
@pytest.mark.parametrize("seed", range(4))
def test_random_accesses_have_a_defined_end(model: str, seed: int) -> None:
    rng = random.Random(seed)
    with machine(model, (0, 1, 2)) as gic:
        if model == "v3":
            gic.vm.create_device("vgic-its")
        gic.start()
        frames = [(DIST_AT, regs.GICD_V3 if model == "v3" else regs.GICD_V2)]
        frames += [(OTHER_AT + RD * n, regs.GICR) for n in range(3)] if model == "v3" else [(OTHER_AT, regs.GICC)]
        for _ in range(4000):
            base, frame = rng.choice(frames)
            size = rng.choice((1, 2, 4, 4, 4, 8))
            register = rng.choice(frame.registers)
            at = register.offset + rng.randrange(register.length) if rng.random() < 0.9 else rng.randrange(frame.size)
            at = min(at if rng.random() < 0.2 else at // size * size, frame.size - size)
            vcpu, value = rng.randrange(3), rng.choice((0, ONES, rng.getrandbits(64))) & (1 << 8 * size) - 1
            if rng.random() < 0.4:
                assert 0 <= gic.read(base + at, size, vcpu) < 1 << 8 * size
            else:
                gic.write(base + at, value, size, vcpu)
        for cpu in gic.soft.vgic.cpus():
            assert cpu.interface.lines() == (cpu.irq_line, cpu.fiq_line), "no vCPU was left uninformed"
            assert all(irq.cpu is cpu for irq in cpu.listed.values())
