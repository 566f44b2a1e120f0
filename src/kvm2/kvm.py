"""/dev/kvm: what the host can do, and VMs on it, by the new call and by the old one."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Literal

from kvm2.abi import ioctls
from kvm2.abi.vm2 import (
    ARM64_DEFAULT_IPA_BITS,
    KVM_CAP_CREATE_VM2,
    KVM_CREATE_VM2_DESCRIBE,
    DescribeVm2,
    Vm2AttrInfo,
)
from kvm2.errors import KvmError, UsageError
from kvm2.handle import Buffer, checked_word
from kvm2.hosts import backend_of
from kvm2.names import ATTRIBUTES, capability, listed
from kvm2.negotiation import send
from kvm2.spec import MIN_IPA_BITS, VmSpec
from kvm2.vm import Vm
from kvm2.x86_kvm import X86Kvm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kvm2.abi.findings import Finding
    from kvm2.abi.layout import Structure
    from kvm2.hosts.backend import Backend

NO_CREATE_VM2 = (
    "this host has no KVM_CREATE_VM2 (KVM_CHECK_EXTENSION(KVM_CAP_CREATE_VM2) = 0), like every mainline kernel: "
    "use create_vm(type), on the command line --type {bits}, or a host that has it"
)


def open(host: str | Path, *, working_caps: bool = False, guest_ids: Literal["profile", "core"] = "profile") -> Kvm:
    """A `Kvm` on a described host: its name ("apple-m1"), or the path of a TOML file of yours.

    With `working_caps` it announces only the capabilities and features that the software KVM executes.
    `guest_ids` "core" shows guests no feature that the software KVM's core does not execute, whatever userspace reads;
    operating systems need it. A real KVM shows what it has.
    HostError where there is no such host (with the nearest names), or its file says something wrong.

    >>> with open("apple-m1") as kvm:
    ...     kvm.check_extension("ARM_VM_IPA_SIZE")
    36
    """
    return Kvm(backend_of(host, working_caps, guest_ids), str(host))


class Kvm(X86Kvm):
    """A descriptor of /dev/kvm; `kvm2.open` makes it. `name` is the host's."""

    def __init__(self, backend: Backend, name: str) -> None:
        super().__init__(backend, backend.open())
        self.name = name

    def api_version(self) -> int:
        """KVM_GET_API_VERSION: 12, for ever."""
        return self.ioctl(ioctls.KVM_GET_API_VERSION)

    def check_extension(self, cap: str | int) -> int:
        """KVM_CHECK_EXTENSION, by name ("ARM_VM_IPA_SIZE") or number: 0 where the host has it not."""
        return self.ioctl(ioctls.KVM_CHECK_EXTENSION, checked_word("capability", capability(cap), 64))

    def vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of a vCPU's shared area."""
        return self.ioctl(ioctls.KVM_GET_VCPU_MMAP_SIZE)

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM with its `type` word; on arm64 that is the IPA size in bits, 0 for 40."""
        return Vm(self._backend, self.ioctl(ioctls.KVM_CREATE_VM, checked_word("type", type, 64)))

    def describe(self) -> Mapping[int, Vm2AttrInfo]:
        """KVM_DESCRIBE_VM2: which attributes of KVM_CREATE_VM2 this host takes, by type number, ascending."""
        room = 0
        while True:
            entries = Buffer(max(room, 1) * Vm2AttrInfo.SIZE)
            asked = Buffer(DescribeVm2(count=room, entries=entries.address).pack())
            try:
                self.ioctl(ioctls.KVM_DESCRIBE_VM2, asked)
            except KvmError as error:
                count = DescribeVm2.unpack(asked.bytes()).count
                if error.errno == errno.E2BIG and count > room:
                    room = count
                    continue
                raise self._explained(error) from None
            data = entries.bytes()
            found = [
                Vm2AttrInfo.unpack(data, Vm2AttrInfo.SIZE * i) for i in range(DescribeVm2.unpack(asked.bytes()).count)
            ]
            return {info.type: info for info in found}

    def create_vm2(self, spec: VmSpec | Sequence[Structure] | None = None, **wanted: Any) -> Vm:
        """KVM_CREATE_VM2: a VM of a `VmSpec`, of the same words as arguments, or of a list of attributes.

        KvmError with every finding where the host refuses:

        >>> import kvm2
        >>> with kvm2.open("apple-m1") as kvm:
        ...     kvm.create_vm2(physaddr_bits=36).get_attr(2).physaddr_bits
        36
        """
        fd, notes = send(self, ioctls.KVM_CREATE_VM2, self._attributes(spec, wanted))
        return Vm(self._backend, fd, notes)

    def dry_run(self, spec: VmSpec | Sequence[Structure] | None = None, **wanted: Any) -> tuple[Finding, ...]:
        """KVM_CREATE_VM2 with DRY_RUN: the notes of a creation that would succeed, else KvmError with every finding."""
        return send(self, ioctls.KVM_CREATE_VM2, self._attributes(spec, wanted), dry_run=True)[1]

    def create_vm2_fixed(self, spec: VmSpec | None = None, **wanted: Any) -> Vm:
        """KVM_CREATE_VM2_FIXED: the same with the structure of fixed size, which carries the IPA size and SVE."""
        spec = self._spec(spec, wanted)
        argument = spec.fixed(self.known_of(spec))
        try:
            return Vm(self._backend, self.ioctl(ioctls.KVM_CREATE_VM2_FIXED, argument))
        except KvmError as error:
            raise self._explained(error) from None

    def resolve_ipa_bits(self, spec: VmSpec) -> int:
        """The IPA size in bits that creation asks this host for."""
        return spec.resolve_ipa_bits(self.known_of(spec))

    def known_of(self, spec: VmSpec) -> Mapping[int, Vm2AttrInfo]:
        """What `spec` must know of this host: its description, or only the IPA limit without KVM_DESCRIBE_VM2."""
        if not spec.needs_description:
            return {}
        if self.check_extension(KVM_CAP_CREATE_VM2) & KVM_CREATE_VM2_DESCRIBE:
            return self.describe()
        limit = self.check_extension("ARM_VM_IPA_SIZE")
        return {2: Vm2AttrInfo(type=2, default=ARM64_DEFAULT_IPA_BITS, min=MIN_IPA_BITS, max=limit)} if limit else {}

    def _attributes(self, spec: VmSpec | Sequence[Structure] | None, wanted: dict[str, Any]) -> list[Structure]:
        if spec is None and not wanted:
            return []
        if spec is not None and not isinstance(spec, VmSpec):
            if wanted:
                raise UsageError(f"a list of attributes and {', '.join(wanted)}: give one of them")
            return listed(spec, ATTRIBUTES)
        spec = self._spec(spec, wanted)
        return spec.attributes(self.known_of(spec))

    def _spec(self, spec: VmSpec | None, wanted: dict[str, Any]) -> VmSpec:
        if spec is not None:
            if not isinstance(spec, VmSpec):
                raise UsageError(f"{spec!r} is not a VmSpec")
            if wanted:
                raise UsageError(f"a VmSpec and {', '.join(wanted)}: give one of them")
            return spec
        known = VmSpec.__dataclass_fields__
        for name in wanted:
            if name not in known:
                raise UsageError(f"{name!r} is not something a VM can be asked for; known: {', '.join(known)}")
        return VmSpec(**wanted)

    def _explained(self, error: KvmError) -> KvmError:
        """A bare EINVAL of a host without KVM_CREATE_VM2 says nothing: ask the host, and say it."""
        if error.errno == errno.EINVAL and not error.findings and not self.check_extension(KVM_CAP_CREATE_VM2):
            return KvmError(errno.EINVAL, NO_CREATE_VM2.format(bits=self._usual_bits()))
        return error

    def _usual_bits(self) -> int:
        """A type word that this host takes: KVM's default size, or all that the host has where that is less."""
        most = self.check_extension("ARM_VM_IPA_SIZE") if self.arch == "arm64" else 0
        return min(most or ARM64_DEFAULT_IPA_BITS, ARM64_DEFAULT_IPA_BITS)

    def __repr__(self) -> str:
        return f"<Kvm {self.name}{' closed' if self.closed else ''}>"
