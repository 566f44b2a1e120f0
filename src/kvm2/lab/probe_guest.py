"""What only a guest can show: two runs of a few instructions on a scratch VM.

The guest's exception vectors lead out by an MMIO write too, so it comes back whatever happens to it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvm2.abi import onereg, sysregs
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_PMU_V3
from kvm2.errors import EnvironmentFault, KvmError
from kvm2.exits import Mmio

if TYPE_CHECKING:
    from kvm2.lab.probe_seen import Scratch, Seen
    from kvm2.vcpu import Vcpu
    from kvm2.vm import Vm

RAM, SIZE = 0x10000, 0x10000
CODE, VECTORS = 0x2000, 0x800  # offsets in the RAM; VBAR_EL1 is a multiple of 2K
MMIO, NOWHERE = 0x200000, 0x300000
VECTOR_COUNT, VECTOR_BYTES = 16, 0x80
SECONDS = 30.0  # an emulated machine may be slow, but not that slow

# A64 words; x9 holds the MMIO address, because a hypercall's results are in x0 to x3.
STR_W0_X9 = 0xB9000120  # str w0, [x9]: the guest is done
STR_W0_X9_8 = 0xB9000920  # str w0, [x9, #8]: an exception was taken
SMC_0, BR_X6 = 0xD4000003, 0xD61F00C0
SMCCC_VERSION, NOT_HANDLED = 0x80000000, (1 << 64) - 1
CHAIN = 1 << 0x1E  # PMCEID0_EL0: the event that KVM adds itself
_SEEN_BY = {10: "CNTFRQ_EL0", 11: "DCZID_EL0", 12: "PMCEID0_EL0", 13: "PMCEID1_EL0"}
_PMU_GROUP, _PMU_INIT = 0, 1  # KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT


def mrs(register: str, target: int) -> int:
    """The instruction MRS X<target>, register.

    >>> hex(mrs("CNTFRQ_EL0", 2)), hex(mrs("DCZID_EL0", 3))
    ('0xd53be002', '0xd53b00e3')
    """
    return 0xD5200000 | sysregs.by_name(register) << 5 | target


def look(seen: Seen, scratch: Scratch, features: tuple[int, ...]) -> None:
    """Fills in CNTFRQ_EL0, DCZID_EL0, the PMU's events, and the habits that a guest shows."""
    seen.habits |= {"smc-not-handled": None, "esr-high-word": None}
    wanted = tuple(bit for bit in features if bit == KVM_ARM_VCPU_PMU_V3)
    try:
        _registers_and_smc(seen, scratch, wanted)
        _abort(seen, scratch)
    except (EnvironmentFault, KvmError) as error:
        unknown = ", ".join(name for name in ("smc-not-handled", "esr-high-word") if seen.habits[name] is None)
        seen.notes.append(
            f"no guest could be run ({error}): not found out are {unknown}, and CNTFRQ_EL0, DCZID_EL0 and the PMU's "
            "events where they are not listed"
        )


def skip(seen: Seen, scratch: Scratch, features: tuple[int, ...]) -> None:
    """Nothing is run: what only a guest shows stays open."""
    seen.habits |= {"smc-not-handled": None, "esr-high-word": None}
    seen.notes.append("no guest was run: CNTFRQ_EL0, DCZID_EL0 and the PMU's events are not known")


def _registers_and_smc(seen: Seen, scratch: Scratch, features: tuple[int, ...]) -> None:
    wanted = {number: name for number, name in _SEEN_BY.items() if features or not name.startswith("PMCEID")}
    code = [*(mrs(name, number) for number, name in wanted.items()), SMC_0, STR_W0_X9]
    with scratch.vm() as vm:
        _load(vm, code)
        with vm.create_vcpu() as vcpu:
            vcpu.init(("psci_0_2", *features))
            if features:
                vcpu.set_device_attr(_PMU_GROUP, _PMU_INIT)  # without it a kernel refuses to run a vCPU with a PMU
            vcpu.set_reg("x0", SMCCC_VERSION)
            if _run(vcpu) != MMIO:
                seen.notes.append("a guest that reads CNTFRQ_EL0, DCZID_EL0 and the PMU's events took an exception")
                return
            for number, name in wanted.items():
                value = vcpu.regs.x[number]
                if name == "PMCEID0_EL0":
                    value &= ~CHAIN
                if value:
                    seen.registers[sysregs.by_name(name)] = value
            seen.habits["smc-not-handled"] = vcpu.regs.x0 == NOT_HANDLED


def _abort(seen: Seen, scratch: Scratch) -> None:
    """A jump to where no memory is: KVM injects an external abort, and ESR_EL1 is looked at."""
    with scratch.vm() as vm:
        _load(vm, [BR_X6])
        with vm.create_vcpu() as vcpu:
            vcpu.init()
            vcpu.set_reg("x6", NOWHERE)
            if _run(vcpu) != MMIO + 8:
                seen.notes.append("a jump to where no memory is was no exception to the guest")
                return
            syndrome = vcpu.get_reg(onereg.sysreg(sysregs.ESR_EL1))
            seen.habits["esr-high-word"] = isinstance(syndrome, int) and syndrome >> 32 == 0xFFFFFFFF


def _load(vm: Vm, code: list[int]) -> None:
    ram = vm.map(RAM, SIZE)
    for number in range(VECTOR_COUNT):
        ram.write(VECTORS + number * VECTOR_BYTES, STR_W0_X9_8.to_bytes(4, "little"))
    ram.write(CODE, b"".join(word.to_bytes(4, "little") for word in code))


def _run(vcpu: Vcpu) -> int:
    """Runs the guest to its MMIO write; its address. EnvironmentFault where it does not come to one."""
    vcpu.set_reg("x9", MMIO)
    vcpu.set_reg("pc", RAM + CODE)
    vcpu.set_reg(onereg.sysreg(sysregs.VBAR_EL1), RAM + VECTORS)
    watchdog = threading.Timer(SECONDS, vcpu.kick)
    watchdog.daemon = True
    watchdog.start()
    try:
        left = vcpu.run_once()
    finally:
        watchdog.cancel()
    if not isinstance(left, Mmio):
        raise EnvironmentFault(f"the guest came back with {left!r}")
    return left.address
