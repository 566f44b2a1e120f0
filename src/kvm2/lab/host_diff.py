"""What differs between described hosts: limits, attributes, features, ID register fields, capabilities, habits.

>>> from kvm2.softkvm.profile import load
>>> rows = compare([load("apple-m1"), load("neoverse-n1-4k")])
>>> [row.values for row in rows if row.name == "IPA limit"]
[('36 bits', '48 bits')]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi import sysreg_fields, sysregs
from kvm2.abi.caps import name_of
from kvm2.abi.vm2 import ATTRIBUTES, KVM_CREATE_VM2_DESCRIBE
from kvm2.names import FEATURES
from kvm2.softkvm.profile_keys import QUIRKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvm2.abi.vm2 import Vm2AttrInfo
    from kvm2.softkvm.profile import Profile

ABSENT = "-"


class Row(NamedTuple):
    """One property of every host, as text, in the order of the hosts."""

    subject: str
    name: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether the hosts are not alike in it."""
        return len(set(self.values)) > 1


def compare(hosts: Sequence[Profile]) -> list[Row]:
    """Every property of the hosts, also those in which they are alike."""
    return [row for part in _PARTS for row in part(hosts)]


def differences(hosts: Sequence[Profile]) -> list[Row]:
    """The properties that differ."""
    return [row for row in compare(hosts) if row.differs]


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _bits(value: int) -> str:
    return f"{value} bits" if value else ABSENT


def _granules(host: Profile) -> str:
    return ", ".join(f"{(1 << shift) >> 10}K" for shift in host.granules) or ABSENT


_LIMITS: dict[str, Callable[[Profile], object]] = {
    "architecture": lambda host: host.arch,
    "IPA limit": lambda host: _bits(host.ipa_limit),
    "PARange": lambda host: _bits(host.pa_bits),
    "page size": lambda host: f"{(1 << host.page_shift) >> 10}K",
    "granules": _granules,
    "LPA2": lambda host: _yes(host.lpa2),
    "VMIDs": lambda host: _bits(host.vmid_bits if host.arch == "arm64" else 0),
    "mode": lambda host: host.mode or ABSENT,
    "type word": lambda host: host.type_word,
    "KVM_CREATE_VM2": lambda host: f"{host.create_vm2:#x}" if host.create_vm2 else "none",
    "VM types": lambda host: f"{host.vm_types:#x}" if host.vm_types else ABSENT,
    "CPUs": lambda host: host.cpus,
    "vCPUs": lambda host: host.max_vcpus,
    "vCPU ids": lambda host: host.max_vcpu_id,
    "memory slots": lambda host: host.nr_memslots,
}


def _limits(hosts: Sequence[Profile]) -> Iterator[Row]:
    for name, value in _LIMITS.items():
        yield Row("limits", name, tuple(str(value(host)) for host in hosts))


def _attributes(hosts: Sequence[Profile]) -> Iterator[Row]:
    """What KVM_DESCRIBE_VM2 says of each attribute that has a value."""
    described = [_described(host) for host in hosts]
    for number, row in ATTRIBUTES.items():
        if row.has_value and any(number in one for one in described):
            yield Row("attributes", row.macro, tuple(_attribute(one.get(number)) for one in described))


def _described(host: Profile) -> dict[int, Vm2AttrInfo]:
    from kvm2.kvm import Kvm
    from kvm2.softkvm.door import SoftKvm

    if not host.create_vm2 & KVM_CREATE_VM2_DESCRIBE:
        return {}
    with Kvm(SoftKvm(host), host.name) as kvm:
        return dict(kvm.describe())


def _attribute(info: Vm2AttrInfo | None) -> str:
    if info is None:
        return ABSENT
    # The mask has a bit for each allowed value below 64; where that is every value between, it says nothing new.
    every = sum(1 << value for value in range(info.min, min(info.max, 63) + 1))
    mask = f", mask {info.mask:#x}" if info.mask not in (0, every) else ""
    return f"{info.min}-{info.max}, default {info.default}{mask}"


def _features(hosts: Sequence[Profile]) -> Iterator[Row]:
    for name, bit in FEATURES.items():
        yield Row("vCPU features", name, tuple(_yes(bit in host.features) for host in hosts))
    targets = (f"{host.preferred_target} of {', '.join(map(str, host.targets)) or 'none'}" for host in hosts)
    yield Row("vCPU features", "preferred target", tuple(targets))


def _sve(hosts: Sequence[Profile]) -> Iterator[Row]:
    values = (", ".join(str(128 * vq) for vq in host.sve_vqs) or "none" for host in hosts)
    yield Row("SVE", "lengths in bits", tuple(values))


def _gic(hosts: Sequence[Profile]) -> Iterator[Row]:
    yield Row("GIC", "for guests", tuple(", ".join(sorted(host.gic)) or "none" for host in hosts))


def _registers(hosts: Sequence[Profile]) -> Iterator[Row]:
    for enc in sorted({enc for host in hosts for enc in host.registers}):
        register, values = sysregs.name_of(enc), [host.registers.get(enc, 0) for host in hosts]
        known = 0
        if register in sysreg_fields.REGISTERS:
            for field in sysreg_fields.fields(register):
                known |= field.mask
                yield Row("ID registers", f"{register}.{field.name}", tuple(str(field.get(value)) for value in values))
        others = tuple(f"{value & ~known:#x}" for value in values)
        if not known or len(set(others)) > 1:
            yield Row("ID registers", register + (" (other bits)" if known else ""), others)


def _tables(hosts: Sequence[Profile]) -> Iterator[Row]:
    yield from _numbers("firmware", hosts, [host.firmware for host in hosts], lambda n: f"WORKAROUND_{n}")
    yield from _numbers("caches", hosts, [host.ccsidr for host in hosts], lambda n: f"CCSIDR[{n}]", hex)
    yield from _numbers("capabilities", hosts, [host.caps for host in hosts], name_of)
    # A VM's answers where that of some host is not that of its /dev/kvm.
    other = {n for host in hosts for n, answer in host.vm_caps.items() if answer != host.caps.get(n, 0)}
    on_vm = [{n: {**host.caps, **host.vm_caps}.get(n, 0) for n in other} for host in hosts]
    yield from _numbers("capabilities of a VM", hosts, on_vm, name_of)
    enabled = [dict.fromkeys(host.enable_caps, 1) for host in hosts]
    yield from _numbers("KVM_ENABLE_CAP", hosts, enabled, name_of, _yes)
    masks = [host.writable_masks for host in hosts]
    yield from _numbers("writable masks", hosts, masks, sysregs.name_of, hex)


def _numbers(
    subject: str,
    hosts: Sequence[Profile],
    tables: Sequence[object],
    name: Callable[[int], str],
    text: Callable[[int], str] = str,
) -> Iterator[Row]:
    found: list[dict[int, int]] = [dict(table) for table in tables]  # type: ignore[call-overload]
    for number in sorted(_union(found)):
        yield Row(subject, name(number), tuple(text(table.get(number, 0)) for table in found))


def _union(tables: Iterable[dict[int, int]]) -> set[int]:
    return {number for table in tables for number in table}


def _habits(hosts: Sequence[Profile]) -> Iterator[Row]:
    yield Row("habits", "kernel described as", tuple(host.kernel if host.arch == "arm64" else ABSENT for host in hosts))
    for quirk in QUIRKS:
        yield Row("habits", quirk, tuple(_yes(quirk in host.quirks) for host in hosts))


_PARTS = (_limits, _attributes, _features, _sve, _gic, _registers, _tables, _habits)
