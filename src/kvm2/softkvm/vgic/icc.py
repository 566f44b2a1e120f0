"""The system registers of a GICv3's CPU interface (ICC_*_EL1), as a guest uses them.

Hardware gives the guest the virtual interface ICV_* under these names (Arm IHI 0069, chapter 12.3), and traps the
SGI registers to the kernel (`access_gic_sgi`, `vgic_v3_dispatch_sgi`). A VM without a vGICv3 has none of them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from kvm2.abi import sysregs as sr
from kvm2.softkvm.vgic.state import MPIDR_AFFINITY

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm2.softkvm.cpu.core import Core
    from kvm2.softkvm.vcpu import Vcpu
    from kvm2.softkvm.vgic.state import VgicCpu

SRE: Final = 7  # SRE, DFB, DIB: system registers only, no bypass
CTLR_CBPR, CTLR_EOIMODE, CTLR_A3V = 1 << 0, 1 << 1, 1 << 15
CTLR_PRIBITS_SHIFT, CTLR_IDBITS_SHIFT = 8, 11
INTID_MASK: Final = 0xFFFFFF
# Fields of ICC_SGI1R_EL1.
SGI_TARGETS, SGI_ALL_BUT_SELF, SGI_INTID_SHIFT = 0xFFFF, 1 << 40, 24
_AFFINITIES: Final = ((16, 8), (32, 16), (48, 32))  # (where Aff1, Aff2, Aff3 are, where MPIDR_EL1 has them)


def control(cpu: VgicCpu) -> int:
    """ICC_CTLR_EL1: what the host's interface has, EOImode and CBPR."""
    face = cpu.interface
    value = CTLR_A3V | (face.priority_bits - 1) << CTLR_PRIBITS_SHIFT | face.id_bits << CTLR_IDBITS_SHIFT
    return value | (CTLR_CBPR if face.cbpr else 0) | (CTLR_EOIMODE if face.eoimode else 0)


def send_sgi(cpu: VgicCpu, group1: bool, value: int) -> None:
    """vgic_v3_dispatch_sgi: an SGI to all others, or to the vCPUs of an affinity that the target list names."""
    vgic, intid = cpu.vgic, value >> SGI_INTID_SHIFT & 0xF
    if cpu.vcpu.vm.observer is not None:
        cpu.vcpu.vm.observe("sgi", intid=intid, vcpu=cpu.vcpu.vcpu_id, value=value)
    if value & SGI_ALL_BUT_SELF:
        for other in vgic.cpus():
            if other is not cpu:
                vgic.send_sgi(other, intid, group1)
        return
    cluster = sum((value >> at & 0xFF) << to for at, to in _AFFINITIES)
    targets = value & SGI_TARGETS
    for other in vgic.cpus():
        affinity = other.affinity
        if affinity & ~0xFF == cluster & MPIDR_AFFINITY and affinity & 0xFF < 16 and targets >> (affinity & 0xFF) & 1:
            vgic.send_sgi(other, intid, group1)


def _read_ap(cpu: VgicCpu, group: int) -> int:
    return cpu.interface.ap1r if group else cpu.interface.ap0r


def _write_ap(cpu: VgicCpu, group: int, value: int) -> None:
    if group:
        cpu.interface.ap1r = value & 0xFFFFFFFF
    else:
        cpu.interface.ap0r = value & 0xFFFFFFFF
    cpu.refresh()


def _write_control(cpu: VgicCpu, value: int) -> None:
    cpu.interface.set_control(bool(value & CTLR_EOIMODE), bool(value & CTLR_CBPR))


# What reading and writing does. AP<g>R1 to R3 do not exist with 5 bits of preemption.
READS: Final[dict[int, Callable[[VgicCpu], int]]] = {
    sr.ICC_PMR_EL1: lambda cpu: cpu.interface.pmr,
    sr.ICC_IAR0_EL1: lambda cpu: cpu.interface.acknowledge(0)[0],
    sr.ICC_IAR1_EL1: lambda cpu: cpu.interface.acknowledge(1)[0],
    sr.ICC_HPPIR0_EL1: lambda cpu: cpu.interface.highest_pending(0),
    sr.ICC_HPPIR1_EL1: lambda cpu: cpu.interface.highest_pending(1),
    sr.ICC_RPR_EL1: lambda cpu: cpu.interface.running(),
    sr.ICC_BPR0_EL1: lambda cpu: cpu.interface.bpr0,
    sr.ICC_BPR1_EL1: lambda cpu: cpu.interface.read_bpr1(),
    sr.ICC_AP0R0_EL1: lambda cpu: _read_ap(cpu, 0),
    sr.ICC_AP1R0_EL1: lambda cpu: _read_ap(cpu, 1),
    sr.ICC_CTLR_EL1: control,
    sr.ICC_SRE_EL1: lambda cpu: SRE,
    sr.ICC_IGRPEN0_EL1: lambda cpu: int(cpu.interface.grpen0),
    sr.ICC_IGRPEN1_EL1: lambda cpu: int(cpu.interface.grpen1),
}
WRITES: Final[dict[int, Callable[[VgicCpu, int], None]]] = {
    sr.ICC_PMR_EL1: lambda cpu, value: cpu.interface.set_pmr(value),
    sr.ICC_EOIR0_EL1: lambda cpu, value: cpu.interface.end(0, value & INTID_MASK),
    sr.ICC_EOIR1_EL1: lambda cpu, value: cpu.interface.end(1, value & INTID_MASK),
    sr.ICC_DIR_EL1: lambda cpu, value: cpu.interface.deactivate(value & INTID_MASK),
    sr.ICC_BPR0_EL1: lambda cpu, value: cpu.interface.set_bpr0(value),
    sr.ICC_BPR1_EL1: lambda cpu, value: cpu.interface.set_bpr1(value),
    sr.ICC_AP0R0_EL1: lambda cpu, value: _write_ap(cpu, 0, value),
    sr.ICC_AP1R0_EL1: lambda cpu, value: _write_ap(cpu, 1, value),
    sr.ICC_CTLR_EL1: _write_control,
    sr.ICC_SRE_EL1: lambda cpu, value: None,
    sr.ICC_IGRPEN0_EL1: lambda cpu, value: cpu.interface.set_groups(group0=bool(value & 1)),
    sr.ICC_IGRPEN1_EL1: lambda cpu, value: cpu.interface.set_groups(group1=bool(value & 1)),
    sr.ICC_SGI1R_EL1: lambda cpu, value: send_sgi(cpu, True, value),
    sr.ICC_ASGI1R_EL1: lambda cpu, value: send_sgi(cpu, False, value),
    sr.ICC_SGI0R_EL1: lambda cpu, value: send_sgi(cpu, False, value),
}


def read(cpu: VgicCpu, enc: int) -> int:
    """What an MRS of a register in `READS` gives."""
    with cpu.vgic.lock:
        return READS[enc](cpu)


def write(cpu: VgicCpu, enc: int, value: int) -> None:
    """An MSR of a register in `WRITES`."""
    with cpu.vgic.lock:
        WRITES[enc](cpu, value)


def _acknowledge(cpu: VgicCpu, group: int) -> int:
    with cpu.vgic.lock:
        return cpu.interface.acknowledge(group, keep=True)[0]


def _end(cpu: VgicCpu, group: int, value: int) -> None:
    with cpu.vgic.lock:
        cpu.interface.end(group, value & INTID_MASK, keep=True)


# Those that cannot simply be done again where a signal's exception ended the access: (IAR, EOIR) of each group.
ONCE: Final = ((sr.ICC_IAR0_EL1, sr.ICC_EOIR0_EL1), (sr.ICC_IAR1_EL1, sr.ICC_EOIR1_EL1))


def define(core: Core, vcpu: Vcpu) -> None:
    """Gives a core the registers, where its VM has a vGICv3. Without any vGIC the host's own ICC_SRE_EL1 shows: nothing
    traps it."""
    vm = vcpu.vm
    if vm.vgic is None and "v3" in vm.profile.gic:
        core.define(sr.ICC_SRE_EL1, lambda: SRE, lambda value: None)
    if vm.irqchip != "v3":
        return
    cpu, face = vcpu.gic, vcpu.gic.interface
    for group, (iar, eoir) in enumerate(ONCE):
        core.define(iar, partial(_acknowledge, cpu, group), None, done=face.done)
        core.define(eoir, None, partial(_end, cpu, group), done=face.done)
    for enc in (READS.keys() | WRITES.keys()).difference(*ONCE):
        core.define(
            enc,
            partial(read, cpu, enc) if enc in READS else None,
            partial(write, cpu, enc) if enc in WRITES else None,
        )
