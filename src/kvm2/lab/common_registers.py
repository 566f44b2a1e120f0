"""For migration: values of the ID registers that are true on every one of several hosts, tried on each of them.

What two hosts have in common of a field is the kernel's rule for it (`arm64_ftr_safe_value`): the lower of feature
fields, signed ones as signed numbers (FP, AdvSIMD, TGran4), the higher of CTR_EL0's and the like, a fixed value where
fields must be equal. Registers without such rules (MIDR_EL1) are a conflict where they differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvm2.abi import onereg, sysreg_fields, sysregs
from kvm2.errors import KvmError
from kvm2.softkvm.profile_rules import EL1_32BIT, POWER_OFF
from kvm2.softkvm.sysregs_fields import fields, known_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm2.softkvm.profile import Profile
    from kvm2.softkvm.sysregs_fields import Field
    from kvm2.vcpu import Vcpu


class Safe(NamedTuple):
    """One register: a `value` that is true on every host, and what the `hosts` have.

    `give`: host -> what to set there (KVM_SET_ONE_REG), where that is not what its vCPU has already. `stays`: host ->
    the bits that its kernel does not let anybody change, so that a guest sees more there than is true everywhere.
    `conflicts`: why no value is true everywhere.
    """

    name: str
    value: int
    hosts: tuple[int, ...]
    give: dict[str, int]
    stays: dict[str, int]
    conflicts: tuple[str, ...]

    def fields_that_stay(self, host: str) -> list[str]:
        """The names of the fields in `stays` of a host; bits of no field as a number."""
        bits, found = self.stays.get(host, 0), []
        if self.name in sysreg_fields.REGISTERS:
            for field in sysreg_fields.fields(self.name):
                if field.mask & bits:
                    found.append(f"{self.name}.{field.name}")
                    bits &= ~field.mask
        return [*found, f"{self.name} bits {bits:#x}"] if bits else found

    @property
    def changed(self) -> bool:
        """Whether some host has another value."""
        return len({*self.hosts, self.value}) > 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "changed": self.changed}


# Registers of the machine's identity and figures: nobody can set them, and guests may look.
_NOT_MIGRATED = frozenset((sysregs.CNTFRQ_EL0, sysregs.PMCR_EL0, sysregs.PMCEID0_EL0, sysregs.PMCEID1_EL0))


def safe_registers(hosts: Sequence[Profile]) -> list[Safe]:
    """Every register that a host states, by encoding."""
    if any(host.arch != "arm64" for host in hosts):
        return []
    encodings = sorted({enc for host in hosts for enc in host.registers if enc not in _NOT_MIGRATED})
    safe = {enc: _safe(enc, [_shown(host, enc) for host in hosts]) for enc in encodings}
    wanted = {enc: value for enc, (value, conflicts) in safe.items() if not conflicts and fields(enc) is not None}
    given = {host.name: _give(host, hosts, wanted) for host in hosts}
    return [
        Safe(
            sysregs.name_of(enc),
            value,
            tuple(_shown(host, enc) for host in hosts),
            {name: one[enc][0] for name, one in given.items() if enc in one and one[enc][0] != one[enc][1]},
            {name: one[enc][0] ^ value for name, one in given.items() if enc in one and one[enc][0] != value},
            conflicts,
        )
        for enc, (value, conflicts) in safe.items()
    ]


def _shown(host: Profile, enc: int) -> int:
    """A register as vCPUs see it: of an ID register no more than the kernel knows."""
    value = host.registers.get(enc, 0)
    return value & known_bits(enc) if enc in sysregs.ID_SPACE else value


def _safe(enc: int, values: Sequence[int]) -> tuple[int, tuple[str, ...]]:
    """The common value, and what cannot be common."""
    known = fields(enc)
    if known is None:
        return values[0], () if len(set(values)) == 1 else ("the hosts differ, and it can only be what the host has",)
    result = 0
    for field in known:
        result |= _common(field, values) << field.lsb
    conflicts = []
    for value in values:
        if (value ^ values[0]) & ~known_bits(enc):
            conflicts.append(f"bits {(value ^ values[0]) & ~known_bits(enc):#x} have no rule")
            break
    return result | values[0] & ~known_bits(enc), tuple(conflicts)


def _common(field: Field, values: Sequence[int]) -> int:
    common = field.value(values[0])
    for value in values[1:]:
        if field.value(value) != common:
            common = field.safe_value(field.value(value), common)
    return common & (1 << field.width) - 1


def _give(host: Profile, hosts: Sequence[Profile], wanted: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Register -> (what a vCPU with the common features has in the end, what it had), tried on the host as described:
    every field that the kernel lets userspace write gets the common value."""
    from kvm2.kvm import Kvm
    from kvm2.softkvm.door import SoftKvm
    from kvm2.softkvm.typeword import word_of

    common = frozenset.intersection(*(one.features for one in hosts)) - {POWER_OFF, EL1_32BIT}
    found: dict[int, tuple[int, int]] = {}
    word = 0 if host.ipa_limit >= 40 or host.mode == "protected" else word_of(host.type_word).encode(host.ipa_limit)
    with Kvm(SoftKvm(host), host.name) as kvm, kvm.create_vm(word) as vm, vm.create_vcpu() as vcpu:
        vcpu.init(sorted(common))
        for enc, value in wanted.items():
            reg_id, mask = onereg.sysreg(enc), host.writable_masks.get(enc, 0)
            has = vcpu.get_reg(reg_id)
            assert isinstance(has, int)
            writable = sum(field.mask for field in fields(enc) or () if not field.mask & ~mask)
            if not _set(vcpu, reg_id, has & ~writable | value & writable):
                _set_by_field(vcpu, enc, value, writable)
            now = vcpu.get_reg(reg_id)
            assert isinstance(now, int)
            found[enc] = now, has
    return found


def _set(vcpu: Vcpu, reg_id: int, value: int) -> bool:
    try:
        vcpu.set_reg(reg_id, value)
    except KvmError:
        return False
    return True


def _set_by_field(vcpu: Vcpu, enc: int, value: int, writable: int) -> None:
    """Where a kernel refuses the whole: as many fields as it takes."""
    for field in fields(enc) or ():
        has = vcpu.get_reg(onereg.sysreg(enc))
        assert isinstance(has, int)
        if field.mask & writable and (has ^ value) & field.mask:
            _set(vcpu, onereg.sysreg(enc), has & ~field.mask | value & field.mask)
