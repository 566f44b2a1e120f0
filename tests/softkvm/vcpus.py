"""A client of vCPUs without a door: its memory is a page of bytes at an address that is no pointer."""

from __future__ import annotations

import errno
from collections.abc import Iterable

from kvm2.abi import onereg
from kvm2.abi.structs import DeviceAttr, EnableCap, MpState, OneReg, RegList
from kvm2.abi.structs_arm64 import VcpuInit
from kvm2.errors import KvmError
from kvm2.softkvm import profile
from kvm2.softkvm.vcpu import Vcpu
from kvm2.softkvm.vgic.state import Vgic
from kvm2.softkvm.vm import Vm
from kvm2.softkvm.vmconfig import VmConfig

BASE, SIZE = 0x10000, 0x10000
VALUE = BASE + 0x8000
PSCI, PMU, SVE, PTRAUTH, AARCH32, POWER_OFF = 1 << 2, 1 << 3, 1 << 4, 3 << 5, 1 << 1, 1 << 0


class Page:
    """Client memory: SIZE bytes at BASE, the rest is EFAULT. Counts reads per address."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def _at(self, address: int, size: int) -> int:
        if not BASE <= address <= BASE + SIZE - size:
            raise KvmError(errno.EFAULT, f"{size} bytes at {address:#x}")
        return address - BASE

    def read(self, address: int, size: int) -> bytes:
        at = self._at(address, size)
        return bytes(self.data[at : at + size])

    def write(self, address: int, data: bytes) -> None:
        at = self._at(address, len(data))
        self.data[at : at + len(data)] = data

    def accessible(self, address: int, size: int, write: bool) -> bool:
        return BASE <= address <= BASE + SIZE - size


def make_vm(host: str, **config: object) -> Vm:
    """A VM of a described host, made by the old call unless `config` says otherwise."""
    described = profile.load(host)
    settings: dict[str, object] = {
        "ipa_bits": min(40, described.ipa_limit),
        "page_shift": described.page_shift,
        "max_vcpus": described.max_vcpus,
        "max_vcpu_id": described.max_vcpu_id,
        "sve_allowed": True,
    }
    return Vm(described, Page(), VmConfig(**(settings | config)))  # type: ignore[arg-type]


def give_vgic(vm: Vm, model: str) -> None:
    """A vGIC as KVM_CREATE_DEVICE makes it; none for ""."""
    if model:
        vm.vgic = Vgic(vm, model)
        for vcpu in vm.vcpus.values():
            vm.vgic.add_cpu(vcpu.gic)


class Client:
    """One vCPU and the calls on it, as a VMM writes them."""

    def __init__(self, vm: Vm, vcpu_id: int = 0) -> None:
        self.vm, self.memory = vm, vm.memory
        self.vcpu: Vcpu = vm.add_vcpu(vcpu_id)

    def init(self, features: int = PSCI, target: int | None = None, more: Iterable[int] = ()) -> None:
        target = self.vm.profile.preferred_target if target is None else target
        words = (features, *more, *(0,) * 7)[:7]
        self.memory.write(BASE, VcpuInit(target=target, features=words).pack())
        self.vcpu.vcpu_init(BASE)

    def finalize(self, feature: int = 4) -> None:
        self.memory.write(BASE, (feature & 0xFFFFFFFF).to_bytes(4, "little"))
        self.vcpu.finalize(BASE)

    def get_bytes(self, id_: int, address: int = VALUE) -> bytes:
        self.memory.write(BASE, OneReg(id=id_, addr=address).pack())
        self.vcpu.get_one_reg(BASE)
        return self.memory.read(address, 1 << (id_ >> 52 & 0xF))

    def get(self, id_: int) -> int:
        return int.from_bytes(self.get_bytes(id_), "little")

    def set(self, id_: int, value: int | bytes, address: int = VALUE) -> None:
        data = value if isinstance(value, bytes) else value.to_bytes(1 << (id_ >> 52 & 0xF), "little")
        if address == VALUE:
            self.memory.write(address, data)
        self.memory.write(BASE, OneReg(id=id_, addr=address).pack())
        self.vcpu.set_one_reg(BASE)

    def sys(self, enc: int) -> int:
        return self.get(onereg.sysreg(enc))

    def set_sys(self, enc: int, value: int) -> None:
        self.set(onereg.sysreg(enc), value)

    def reg_list(self, room: int = 1000) -> list[int]:
        self.memory.write(BASE, RegList(n=room).pack())
        self.vcpu.get_reg_list(BASE)
        count = RegList.unpack(self.memory.read(BASE, 8)).n
        data = self.memory.read(BASE + 8, 8 * count)
        return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]

    def mp_state(self) -> int:
        self.vcpu.get_mp_state(BASE)
        return MpState.unpack(self.memory.read(BASE, 4)).mp_state

    def set_mp_state(self, value: int) -> None:
        self.memory.write(BASE, MpState(mp_state=value).pack())
        self.vcpu.set_mp_state(BASE)

    def attr(self, verb: str, group: int, attr: int, data: bytes = b"") -> bytes:
        self.memory.write(VALUE, data.ljust(32, b"\0"))
        self.memory.write(BASE, DeviceAttr(group=group, attr=attr, addr=VALUE).pack())
        getattr(self.vcpu, f"{verb}_device_attr")(BASE)
        return self.memory.read(VALUE, 8)

    def run_once(self) -> None:
        """What the first KVM_RUN does to registers, without running."""
        self.vcpu.check_runnable()
        self.vcpu.on_first_run()
        self.vcpu.has_run = self.vm.ran = True


def enable_cap(vm: Vm, cap: int, value: int = 0, flags: int = 0) -> None:
    from kvm2.softkvm import enable_cap as calls

    vm.memory.write(BASE, EnableCap(cap=cap, flags=flags, args=(value, 0, 0, 0)).pack())
    calls.enable(vm, BASE)


def name_of(call: object, *args: object, **kwargs: object) -> str:
    """The errno's name that a call is refused with; "" where it works."""
    try:
        call(*args, **kwargs)  # type: ignore[operator]
    except KvmError as refusal:
        return refusal.name
    return ""
