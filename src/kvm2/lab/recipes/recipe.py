"""A scenario in the making: the steps that many scenarios share, as methods."""

from __future__ import annotations

from typing import Any

from kvm2.abi import onereg
from kvm2.abi.structs_arm64 import KVM_ARM_VCPU_SVE
from kvm2.lab.scenarios import Scenario, Step
from kvm2.names import FEATURES
from kvm2.registers import register_id

# What the published scenarios took for granted of their hosts and clients.
TARGET = 5  # KVM_ARM_TARGET_GENERIC_V8
MEMORY, SLOT = 16 << 20, 64 << 10
RAM = 1 << 30  # where guests are loaded
SECOND_RAM, HOLE = 0x5000_0000, 0x1000_0000  # where a second slot is, and an address without one
SECOND_HVA = 1 << 20  # of the second slot, in client memory
RESULTS, FAULT = 0x2000, 0x2800  # where guests leave what they found, and the exception that stopped them
FAULT_BYTES = 32
VLS_BYTES = 64

PSCI = ("PSCI_0_2",)
SVE = ("SVE",)
PSCI_SVE = ("PSCI_0_2", "SVE")
PTRAUTH = ("PTRAUTH_ADDRESS", "PTRAUTH_GENERIC")


def word(names: tuple[str, ...]) -> int:
    """The first word of `features` for vCPU features by name.

    >>> word(("PSCI_0_2", "SVE"))
    20
    """
    return sum(1 << FEATURES[name.lower()] for name in names)


class Recipe:
    """Collects the steps of the scenario `name`. Every method adds steps and returns the recipe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps: list[Step] = []

    def scenario(self) -> Scenario:
        """What was collected."""
        return Scenario(self.name, tuple(self.steps))

    def add(self, op: str, *, note: str | None = None, **fields: Any) -> Recipe:
        """One step; `note` is left out where it is None."""
        self.steps.append({"op": op, **fields, **({} if note is None else {"note": note})})
        return self

    # ---- VMs and memory

    def vm(self, type: int = 0, id: str = "vm") -> Recipe:
        """KVM_CREATE_VM."""
        return self.add("create_vm", id=id, type=type)

    def memory(self, id: str = "m", size: int = MEMORY) -> Recipe:
        """Client memory."""
        return self.add("mem", id=id, size=size)

    def slot(
        self, slot: int, gpa: int, size: int, note: str = "", *, hva: int = 0, flags: int = 0, mem: str | None = "m"
    ) -> Recipe:
        """KVM_SET_USER_MEMORY_REGION on `vm`."""
        return self.add("memslot", vm="vm", slot=slot, flags=flags, gpa=gpa, size=size, mem=mem, hva=hva, note=note)

    def ram(self) -> Recipe:
        """16 MiB of client memory, the first 64 KiB of it in slot 0."""
        return self.memory().slot(0, RAM, SLOT)

    def peek(self, offset: int, length: int, mem: str = "m") -> Recipe:
        """Client memory."""
        return self.add("peek", mem=mem, off=offset, len=length)

    def results(self, length: int = 8, mem: str = "m") -> Recipe:
        """What a guest left, and the exception that stopped it."""
        return self.peek(RESULTS, length, mem).peek(FAULT, FAULT_BYTES, mem)

    # ---- vCPUs

    def vcpu(self, number: int = 0, id: str = "", vm: str = "vm") -> Recipe:
        """KVM_CREATE_VCPU; named v0, v1, ... by its number."""
        return self.add("create_vcpu", vm=vm, id=id or f"v{number}", vcpu_id=number)

    def init(self, names: tuple[str, ...] = (), note: str | None = None, vcpu: str = "v0") -> Recipe:
        """KVM_ARM_VCPU_INIT with features by name; the note is their names."""
        said = "+".join(names) if note is None else note
        return self.init_words([word(names), 0, 0, 0, 0, 0, 0], said, vcpu)

    def init_words(self, words: list[int], note: str, vcpu: str = "v0", target: int = TARGET) -> Recipe:
        """KVM_ARM_VCPU_INIT with exactly these words."""
        return self.add("vcpu_init", vcpu=vcpu, target=target, features=words, note=note)

    def finalize(self, feature: int = KVM_ARM_VCPU_SVE, note: str | None = None) -> Recipe:
        """KVM_ARM_VCPU_FINALIZE."""
        return self.add("finalize", vcpu="v0", feature=feature, note=note)

    def machine(self, names: tuple[str, ...] = PSCI, type: int = 0) -> Recipe:
        """A VM with RAM and one initialised vCPU."""
        return self.vm(type).ram().vcpu().init(names)

    def state(self, vcpu: str = "v0", value: int | None = None) -> Recipe:
        """KVM_GET_MP_STATE, or KVM_SET_MP_STATE where a value is given."""
        more = {"verb": "get"} if value is None else {"verb": "set", "value": value}
        return self.add("mp_state", vcpu=vcpu, **more)

    # ---- registers

    def get(self, register: str | int, note: str = "", vcpu: str = "v0") -> Recipe:
        """KVM_GET_ONE_REG, by name or id."""
        return self.add("get_reg", vcpu=vcpu, id=register_id(register), note=note)

    def set(self, register: str | int, value: int, note: str = "", vcpu: str = "v0") -> Recipe:
        """KVM_SET_ONE_REG of a number, in as many bytes as the register has."""
        number = register_id(register)
        return self.set_bytes(number, value.to_bytes(onereg.size_of(number), "little"), note, vcpu)

    def set_bytes(self, number: int, data: bytes, note: str = "", vcpu: str = "v0") -> Recipe:
        """KVM_SET_ONE_REG of bytes."""
        return self.add("set_reg", vcpu=vcpu, id=number, data=data.hex(), note=note)

    def vls(self, mask: int, note: str = "") -> Recipe:
        """Writes the set of SVE vector lengths."""
        return self.set_bytes(onereg.KVM_REG_ARM64_SVE_VLS, mask.to_bytes(VLS_BYTES, "little"), note)

    def get_vls(self, note: str = "") -> Recipe:
        """Reads it."""
        return self.get(onereg.KVM_REG_ARM64_SVE_VLS, note)

    # ---- guests

    def load(self, guest: str, vcpu: str = "v0", mem: str = "m") -> Recipe:
        """A guest program at the start of RAM, and the vCPU ready to run it."""
        return self.add("guest", mem=mem, off=0, name=guest).set("pc", RAM, vcpu=vcpu).state(vcpu, 0)

    def arguments(self, *values: int, vcpu: str = "v0") -> Recipe:
        """x0, x1, ... of the vCPU."""
        for index, value in enumerate(values):
            self.set(f"x{index}", value, vcpu=vcpu)
        return self

    def run(self, note: str = "", timeout_ms: int | None = None, vcpu: str = "v0") -> Recipe:
        """KVM_RUN."""
        more = {} if timeout_ms is None else {"timeout_ms": timeout_ms}
        return self.add("run", vcpu=vcpu, note=note, **more)

    # ---- capabilities and devices

    def check(self, cap: int, fd: str = "vm") -> Recipe:
        """KVM_CHECK_EXTENSION."""
        return self.add("check_ext", fd=fd, cap=cap)

    def enable(self, cap: int, arg: int = 0, note: str | None = None, *, flags: int = 0, fd: str = "vm") -> Recipe:
        """KVM_ENABLE_CAP with one word."""
        return self.add("enable_cap", fd=fd, cap=cap, flags=flags, args=[arg], note=note)

    def raw(self, fd: str, request: int, note: str, arg: int = 0) -> Recipe:
        """Any ioctl with a number as its argument."""
        return self.add("raw", fd=fd, nr=request, arg=arg, note=note)

    def device(self, type: int, id: str = "gic", flags: int = 0, note: str | None = None) -> Recipe:
        """KVM_CREATE_DEVICE."""
        return self.add("create_device", vm="vm", id=id, type=type, flags=flags, note=note)

    def attribute(self, verb: str, group: int, attr: int, data: bytes = b"", note: str = "") -> Recipe:
        """KVM_HAS_, GET_ or SET_DEVICE_ATTR of the device `gic`."""
        return self.add("dev_attr", verb=verb, dev="gic", group=group, attr=attr, data=data.hex(), note=note)
