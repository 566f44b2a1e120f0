"""A vCPU's state by KVM_GET_REG_LIST, and what of it another host refuses."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from kvm2.abi import onereg, sysreg_fields
from kvm2.abi.findings import Finding
from kvm2.abi.structs_arm64 import VcpuEvents, VcpuEventsException
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.vcpu import Vcpu

# The counters are the VM's: one vCPU's value counts for all, and moves the offset of all.
COUNTERS: Final = (onereg.KVM_REG_ARM_TIMER_CNT, onereg.KVM_REG_ARM_PTIMER_CNT)
# Set before KVM_ARM_VCPU_FINALIZE, which the machine's making has done: only compared.
_COMPARED: Final = (onereg.KVM_REG_ARM64_SVE_VLS,)
NOBODY: Final = (1 << 32) - 1  # no attribute's index: the finding is about a vCPU


def _hex(value: int | bytes) -> str:
    return value.hex() if isinstance(value, bytes) else f"{value:#x}"


def _value(text: str) -> int | bytes:
    return int(text, 16) if text.startswith("0x") else bytes.fromhex(text)


def save(vcpu: Vcpu) -> dict[str, Any]:
    """Every register (by id, in the host's order), the power state, pending exceptions. The vCPU must not run."""
    pending = vcpu.get_events().exception
    return {
        "id": vcpu.id,
        "registers": {f"{number:#x}": _hex(vcpu.get_reg(number)) for number in vcpu.reg_list()},
        "mp_state": vcpu.get_mp_state(),
        "serror": [pending.serror_pending, pending.serror_has_esr, pending.serror_esr],
    }


def restore(vcpu: Vcpu, state: dict[str, Any], counters: bool) -> list[Finding]:
    """Sets all of it on a vCPU that was made alike; what this host refuses or does not have comes back as findings.

    `counters`: this vCPU's counters become the VM's.
    """
    saved = {int(number, 16): _value(text) for number, text in state["registers"].items()}
    here = set(vcpu.reg_list())
    found = []
    # The counters first: timers fire by them. The rest in the order of the list, as every VMM does it.
    order = [number for number in COUNTERS if number in saved and counters]
    order += [number for number in saved if number not in COUNTERS]
    for number in order:
        if number not in here:
            found.append(_finding(vcpu, number, saved[number], None, "this host has no such register"))
        elif (refused := _set(vcpu, number, saved[number])) is not None:
            found.append(refused)
    vcpu.set_mp_state(state["mp_state"])
    pending, has_esr, esr = state["serror"]
    if pending:
        exception = VcpuEventsException(serror_pending=1, serror_has_esr=has_esr, serror_esr=esr)
        vcpu.set_events(VcpuEvents(exception=exception))
    return found


def _set(vcpu: Vcpu, number: int, value: int | bytes) -> Finding | None:
    if number in _COMPARED:
        have = vcpu.get_reg(number)
        return None if have == value else _finding(vcpu, number, value, have, "the vCPU has other vector lengths here")
    try:
        vcpu.set_reg(number, value)
    except KvmError as error:
        have = vcpu.get_reg(number)
        return None if have == value else _finding(vcpu, number, value, have, str(error))
    return None


def _finding(vcpu: Vcpu, number: int, saved: int | bytes, here: int | bytes | None, why: str) -> Finding:
    name = onereg.parse(number).name
    differs = ""
    if isinstance(saved, int) and isinstance(here, int):
        differs = f"; {_fields(name, saved, here)}"
    have = "has none" if here is None else f"has {_hex(here)}"
    return Finding(
        attr_index=NOBODY,
        attr_type=0,
        error=errno.EINVAL,
        offset=0,
        value=saved if isinstance(saved, int) else int.from_bytes(saved[:8], "little"),
        message=f"the snapshot has {name} = {_hex(saved)}, this host {have}{differs} ({why})",
        known_path=f"vcpu[{vcpu.id}].{name}",
        known_hint="restore it on the host that it was made on, or on one that has the same there",
    )


def _fields(name: str, saved: int, here: int) -> str:
    """Which fields differ, by name where the register's fields are known."""
    if name not in sysreg_fields.REGISTERS:
        return f"bits {saved ^ here:#x} differ"
    words = [
        f"{field.name} {field.get(saved)}, here {field.get(here)}"
        for field in sysreg_fields.fields(name)
        if field.get(saved) != field.get(here)
    ]
    return ", ".join(words) or f"bits {saved ^ here:#x} differ"
