"""Reading `struct kvm_create_vm2_fixed`, the 128-byte argument of KVM_CREATE_VM2_FIXED.

Its findings have no position in a list: they name the byte of this structure, and the attribute that the field stands
for. A host whose architecture has no view of the union takes only zeros.

>>> from kvm2.abi.wire import Buffer
>>> fields = vm2.CreateVm2FixedArm64(capabilities=vm2.KVM_ARM_SELECT_IPA, ipa_size=36)
>>> data = vm2.CreateVm2Fixed(words=fields.pack().ljust(120, bytes(1))).pack()
>>> decode_fixed(Buffer(0x1000, data), 0x1000, "arm64").ipa_size
36
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi import vm2
from kvm2.abi.attrs import Found
from kvm2.abi.findings import NO_ATTR, Finding
from kvm2.errors import KvmError

if TYPE_CHECKING:
    from kvm2.abi.attrs import Readable

_VERSION = struct.Struct("=Q")
_ARM64 = struct.Struct("=QHB5s104s")
SIZE = vm2.CreateVm2Fixed.SIZE
CAPABILITIES, SVE_VLEN, IPA_SIZE, PAD, DUMMY = 8, 16, 18, 19, 24
KNOWN = vm2.KVM_ARM_SVE_CAPABLE | vm2.KVM_ARM_SELECT_IPA
_PATHS = {
    0: "version",
    CAPABILITIES: "arm64.capabilities",
    SVE_VLEN: "arm64.sve_vlen",
    IPA_SIZE: "arm64.ipa_size",
    PAD: "arm64.pad",
}


class Fixed(NamedTuple):
    """The fields of the arm64 view, and what was wrong; `complete` is False where they could not be read."""

    capabilities: int
    sve_vlen: int
    ipa_size: int
    found: list[Found]
    complete: bool = True


def fixed_finding(
    offset: int, kind: int, error: int, value: int, why: str, low: int = 0, high: int = 0, mask: int = 0
) -> Finding:
    """A finding about the byte at `offset` of the structure."""
    return Finding(NO_ATTR, kind, error, offset, value, low, high, mask, why, _PATHS[offset])


def decode_fixed(memory: Readable, address: int, arch: str) -> Fixed:
    """Reads the structure at `address`. Raises nothing: what is wrong is in `found`."""
    try:
        data = memory.read(address, SIZE)
    except KvmError:
        return _unreadable(memory, address)
    (version,) = _VERSION.unpack_from(data)
    if version:
        return _refused(_other_version(version))
    if arch != "arm64":
        return Fixed(0, 0, 0, _beyond(data, 8))
    capabilities, sve_vlen, ipa_size, pad, _ = _ARM64.unpack_from(data, CAPABILITIES)
    found = [Found(0, f.offset, f) for f in _field_findings(capabilities, sve_vlen, ipa_size)]
    if any(pad):
        at = PAD + next(i for i, byte in enumerate(pad) if byte)
        why = f"byte {at} (pad) is not zero: this host knows no field there"
        found.append(Found(0, PAD, fixed_finding(PAD, 0, errno.E2BIG, data[at], why)))
    return Fixed(capabilities, sve_vlen, ipa_size, found + _beyond(data, DUMMY))


def _field_findings(capabilities: int, sve_vlen: int, ipa_size: int) -> list[Finding]:
    out = []
    unknown = capabilities & ~KNOWN
    if unknown:
        why = f"capabilities = {capabilities:#x}: this host does not know bits {unknown:#x}"
        out.append(fixed_finding(CAPABILITIES, 1, errno.EOPNOTSUPP, capabilities, why, 0, KNOWN, KNOWN))
    if sve_vlen and not capabilities & vm2.KVM_ARM_SVE_CAPABLE:
        why = f"sve_vlen = {sve_vlen}: must be zero without KVM_ARM_SVE_CAPABLE"
        out.append(fixed_finding(SVE_VLEN, vm2.KVM_CREATE_VM_ATTR_ARM64_SVE_VLS, errno.EINVAL, sve_vlen, why))
    kind, rule = vm2.KVM_CREATE_VM_ATTR_ARM64_PHYSADDR_SIZE, vm2.IPA_BITS
    if ipa_size and not capabilities & vm2.KVM_ARM_SELECT_IPA:
        why = f"ipa_size = {ipa_size}: must be zero without KVM_ARM_SELECT_IPA"
        out.append(fixed_finding(IPA_SIZE, kind, errno.EINVAL, ipa_size, why))
    elif not rule.allows(ipa_size):
        why = f"ipa_size = {ipa_size}: must be {rule.text}"
        out.append(fixed_finding(IPA_SIZE, kind, errno.EINVAL, ipa_size, why, rule.min, rule.max))
    return out


def _beyond(data: bytes, start: int) -> list[Found]:
    """What this host does not know must be zero; the finding names the first 8 bytes that are not."""
    for at in range(start, SIZE, 8):
        (word,) = struct.unpack_from("=Q", data, at)
        if word:
            why = f"byte {at} is not zero: this host knows no field there"
            path = f"dummy[{(at - CAPABILITIES) // 8}]"
            return [Found(0, at, Finding(NO_ATTR, 0, errno.E2BIG, at, word, 0, 0, 0, why, path))]
    return []


def _other_version(version: int) -> Finding:
    return fixed_finding(0, 0, errno.EOPNOTSUPP, version, f"version = {version}: this host knows version 0")


def _unreadable(memory: Readable, address: int) -> Fixed:
    """Of another version the structure may be shorter: that is asked first."""
    try:
        (version,) = _VERSION.unpack(memory.read(address, _VERSION.size))
    except KvmError:
        version = 0
    if version:
        return _refused(_other_version(version))
    why = f"struct kvm_create_vm2_fixed at {address:#x} cannot be read"
    return _refused(fixed_finding(0, 0, errno.EFAULT, address, why))


def _refused(finding: Finding) -> Fixed:
    return Fixed(0, 0, 0, [Found(-1, finding.offset, finding)], False)
