"""The CPU interface: priorities, preemption, both EOI modes, groups, SGIs by sender; random walks keep its rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.softkvm.vcpus import Client, make_vm

from kvm2.softkvm.vgic.irq import SPURIOUS, Irq
from kvm2.softkvm.vgic.state import Vgic, VgicCpu

FIRST, SECOND, THIRD = 40, 41, 42


def machine(model: str = "v3", vcpus: int = 1) -> Vgic:
    """A vGIC that forwards everything to interfaces whose priority mask is open."""
    vm = make_vm("max-4k-6.12")
    for number in range(vcpus):
        Client(vm, number).init()
    vm.vgic = Vgic(vm, model)
    vm.vgic.init()
    vm.vgic.enabled = True
    for cpu in vm.vgic.cpus():
        cpu.interface.set_pmr(0xF8)
        cpu.interface.set_groups(True, True)
    return vm.vgic


def spi(vgic: Vgic, intid: int, priority: int, *, edge: bool = True, group: int = 1) -> Irq:
    """An enabled SPI that goes to vCPU 0."""
    irq = vgic.irq(None, intid)
    assert irq is not None
    irq.enabled, irq.priority, irq.edge, irq.group = True, priority, edge, group
    vgic.update(irq)
    return irq


def only(vgic: Vgic) -> VgicCpu:
    return vgic.cpus()[0]


def test_an_interrupt_goes_from_pending_to_active_to_idle() -> None:
    vgic = machine()
    cpu, irq = only(vgic), spi(vgic, FIRST, 0xA0)
    vgic.inject(None, FIRST, True)
    assert cpu.irq_line and irq.pending and cpu.interface.running() == 0xFF
    assert cpu.interface.acknowledge(1) == (FIRST, 0)
    assert not cpu.irq_line and irq.active and not irq.pending and cpu.interface.running() == 0xA0
    assert cpu.interface.acknowledge(1) == (SPURIOUS, 0)
    cpu.interface.end(1, FIRST)
    assert not irq.active and cpu.interface.running() == 0xFF and not cpu.listed


def test_a_level_that_stays_comes_again_and_one_that_drops_does_not() -> None:
    vgic = machine()
    cpu, irq = only(vgic), spi(vgic, FIRST, 0xA0, edge=False)
    vgic.inject(None, FIRST, True)
    cpu.interface.acknowledge(1)
    assert irq.pending and irq.active and not cpu.irq_line
    cpu.interface.end(1, FIRST)
    assert cpu.irq_line
    vgic.inject(None, FIRST, False)
    assert not cpu.irq_line and not cpu.listed


def test_a_higher_priority_preempts_and_an_equal_one_does_not() -> None:
    vgic = machine()
    cpu = only(vgic)
    for intid, priority in ((FIRST, 0xA0), (SECOND, 0xA0), (THIRD, 0x80)):
        spi(vgic, intid, priority)
        vgic.inject(None, intid, True)
    assert cpu.interface.acknowledge(1)[0] == THIRD
    assert not cpu.irq_line
    cpu.interface.end(1, THIRD)
    assert cpu.interface.acknowledge(1)[0] == FIRST
    assert not cpu.irq_line, "an equal priority does not preempt"
    vgic.inject(None, THIRD, True)
    assert cpu.irq_line and cpu.interface.acknowledge(1)[0] == THIRD and cpu.interface.running() == 0x80
    cpu.interface.end(1, THIRD)
    assert cpu.interface.running() == 0xA0


@pytest.mark.parametrize(("bpr1", "preempts"), [(3, True), (5, True), (6, False), (7, False)])
def test_the_binary_point_says_which_priorities_preempt(bpr1: int, preempts: bool) -> None:
    vgic = machine()
    cpu = only(vgic)
    cpu.interface.set_bpr1(bpr1)
    spi(vgic, FIRST, 0xA0)
    spi(vgic, SECOND, 0x80)
    vgic.inject(None, FIRST, True)
    cpu.interface.acknowledge(1)
    vgic.inject(None, SECOND, True)
    assert cpu.irq_line is preempts


def test_binary_points_have_a_smallest_value() -> None:
    face = only(machine()).interface
    face.set_bpr0(0)
    face.set_bpr1(0)
    assert (face.bpr0, face.bpr1) == (2, 3)
    face.set_control(eoimode=False, cbpr=True)
    face.set_bpr1(7)
    assert face.read_bpr1() == 3 and face.bpr1 == 3


def test_the_priority_mask_holds_back_what_is_not_higher() -> None:
    vgic = machine()
    cpu = only(vgic)
    spi(vgic, FIRST, 0x80)
    vgic.inject(None, FIRST, True)
    cpu.interface.set_pmr(0x80)
    assert not cpu.irq_line and cpu.interface.acknowledge(1)[0] == SPURIOUS
    assert cpu.interface.highest_pending(1) == FIRST
    cpu.interface.set_pmr(0x8F)
    assert cpu.interface.pmr == 0x88 and cpu.irq_line


def test_with_eoimode_1_the_priority_drops_first_and_dir_deactivates() -> None:
    vgic = machine()
    cpu, irq = only(vgic), spi(vgic, FIRST, 0xA0)
    cpu.interface.deactivate(FIRST)
    cpu.interface.set_control(eoimode=True, cbpr=False)
    vgic.inject(None, FIRST, True)
    cpu.interface.acknowledge(1)
    vgic.inject(None, FIRST, True)
    cpu.interface.end(1, FIRST)
    assert irq.active and cpu.interface.running() == 0xFF and not cpu.irq_line
    cpu.interface.deactivate(FIRST)
    assert not irq.active and cpu.irq_line


def test_group_0_is_a_fiq_with_registers_of_its_own() -> None:
    vgic = machine()
    cpu = only(vgic)
    spi(vgic, FIRST, 0xA0, group=0)
    vgic.inject(None, FIRST, True)
    assert (cpu.irq_line, cpu.fiq_line) == (False, True)
    assert cpu.interface.acknowledge(1)[0] == SPURIOUS
    assert cpu.interface.acknowledge(0)[0] == FIRST and cpu.interface.ap0r and not cpu.interface.ap1r
    cpu.interface.end(1, FIRST)  # drops the priority, but the group is not this register's
    assert cpu.interface.running() == 0xFF and vgic.irq(None, FIRST).active  # type: ignore[union-attr]


def test_a_disabled_distributor_group_or_interrupt_signals_nothing() -> None:
    vgic = machine()
    cpu, irq = only(vgic), spi(vgic, FIRST, 0xA0)
    vgic.inject(None, FIRST, True)
    cpu.interface.set_groups(group1=False)
    assert not cpu.irq_line
    cpu.interface.set_groups(group1=True)
    irq.enabled = False
    vgic.update(irq)
    assert not cpu.irq_line and irq.pending
    irq.enabled, vgic.enabled = True, False
    vgic.update_all()
    assert not cpu.irq_line
    vgic.enabled = True
    vgic.update_all()
    assert cpu.irq_line


def test_a_gicv2_takes_an_sgi_of_each_sender_by_itself() -> None:
    vgic = machine("v2", vcpus=3)
    cpu = only(vgic)
    irq = cpu.irqs[5]
    irq.priority, irq.source, irq.pending_latch = 0x80, 0b110, True
    vgic.update(irq)
    assert cpu.irq_line and not cpu.fiq_line, "group 0 is an IRQ unless GICC_CTLR.FIQEn is set"
    assert cpu.interface.acknowledge(0) == (5, 1)
    assert irq.pending, "the other sender's request waits"
    cpu.interface.end(0, 5, source=2)
    assert irq.active, "ended for a sender whose request is not active"
    cpu.interface.ap0r = 0
    irq.active = False
    vgic.update(irq)
    assert cpu.interface.acknowledge(0) == (5, 2) and not irq.pending


def test_an_lpi_has_no_active_state() -> None:
    vgic = machine()
    cpu = only(vgic)
    irq = vgic.lpis[8192] = Irq(8192, cpu)
    irq.enabled, irq.priority, irq.group = True, 0x80, 1
    vgic.inject(None, 8192, True)
    assert cpu.interface.acknowledge(1)[0] == 8192 and not irq.active and cpu.interface.running() == 0x80
    cpu.interface.end(1, 8192)
    assert cpu.interface.running() == 0xFF and not cpu.listed


def test_active_interrupts_stay_where_they_are_when_their_target_changes() -> None:
    vgic = machine(vcpus=2)
    zero, one = vgic.cpus()
    irq = spi(vgic, FIRST, 0xA0)
    vgic.inject(None, FIRST, True)
    zero.interface.acknowledge(1)
    irq.target = one
    vgic.inject(None, FIRST, True)
    assert irq.cpu is zero and not one.irq_line
    zero.interface.end(1, FIRST)
    assert irq.cpu is one and one.irq_line and not zero.irq_line


ACTIONS = st.tuples(
    st.sampled_from(("up", "down", "ack", "eoi", "pmr", "enable")), st.integers(0, 3), st.integers(0, 255)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_whatever_happens_the_rules_hold(actions: list[tuple[str, int, int]]) -> None:
    vgic = machine()
    cpu = only(vgic)
    irqs = [spi(vgic, FIRST + n, (0x80, 0xA0, 0xA0, 0xC0)[n], edge=bool(n & 1)) for n in range(4)]
    stack: list[int] = []
    for what, number, value in actions:
        if what in ("up", "down"):
            vgic.inject(None, FIRST + number, what == "up")
        elif what == "ack":
            running, line = cpu.interface.running(), cpu.irq_line
            intid, _ = cpu.interface.acknowledge(1)
            assert (intid != SPURIOUS) == line
            if intid != SPURIOUS:
                assert irqs[intid - FIRST].active and cpu.interface.running() < running
                stack.append(intid)
        elif what == "eoi" and stack:
            cpu.interface.end(1, stack.pop())
        elif what == "pmr":
            cpu.interface.set_pmr(value)
        elif what == "enable":
            irqs[number].enabled = bool(value & 1)
            vgic.update(irqs[number])
        assert sorted(stack) == sorted(irq.intid for irq in irqs if irq.active)
        for irq in irqs:
            listed = irq.active or (irq.enabled and irq.pending)
            assert (irq.intid in cpu.listed) == listed == (irq.cpu is cpu)
    while stack:
        cpu.interface.end(1, stack.pop())
    assert cpu.interface.running() == 0xFF
