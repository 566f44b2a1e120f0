"""gdb's `monitor` commands: what the debugger cannot see, about the host, the vCPUs and addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from kvm2.abi.structs import KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_STOPPED, KVM_MP_STATE_SUSPENDED
from kvm2.board.gdb_memory import Unmapped
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.board.gdb_target import Target
    from kvm2.vcpu import Vcpu

_STATES = {
    KVM_MP_STATE_RUNNABLE: "on",
    KVM_MP_STATE_STOPPED: "powered off",
    KVM_MP_STATE_SUSPENDED: "suspended",
}
HELP = """\
monitor help               this text
monitor host               the host, the VM's address size and memory
monitor vcpus              every vCPU: power state, EL, PC
monitor translate ADDRESS  the guest physical address of a virtual one, by the tables of the selected vCPU
monitor exits              how often the guest was left so far, by reason
"""


def state_of(target: Target, number: int) -> str:
    """One vCPU in a few words.

    A vCPU that is powered off has registers like any other.
    """
    vcpu = target.vcpus[number]
    try:
        power = _STATES.get(vcpu.get_mp_state(), "?")
        pstate = cast("int", vcpu.get_reg("pstate"))
    except KvmError as error:
        return f"vCPU {number}: {error.name}"
    return f"vCPU {number}: {power}, EL{pstate >> 2 & 3}"


def answer(target: Target, vcpu: Vcpu, command: str) -> str:
    """What is printed for a command."""
    name, _, rest = command.strip().partition(" ")
    if name == "host":
        board = target.board
        memory = ", ".join(f"{size:#x} bytes at {address:#x}" for address, size in board.ranges)
        return f"host {board.kvm.name}, {board.ipa_bits} IPA bits, {len(target.vcpus)} vCPU; memory: {memory}\n"
    if name == "vcpus":
        lines = []
        for number, one in sorted(target.vcpus.items()):
            lines.append(f"{state_of(target, number)}, PC {cast('int', one.get_reg('pc')):#x}\n")
        return "".join(lines)
    if name == "translate":
        return _translate(target, vcpu, rest)
    if name == "exits":
        return "".join(f"{count:10} {kind}\n" for kind, count in target.board.exit_counts().items()) or "none\n"
    if name in ("help", ""):
        return HELP
    return f"there is no command {name!r}\n{HELP}"


def _translate(target: Target, vcpu: Vcpu, text: str) -> str:
    try:
        address = int(text, 0)
    except ValueError:
        return f"{text!r} is not an address: give a number, as in translate 0xffff800080000000\n"
    try:
        return f"{address:#x} is at guest physical address {target.memory.ipa(vcpu, address):#x}\n"
    except Unmapped as error:
        return f"{error}\n"
