"""KVM_CREATE_VM2 on a kernel that does not have it: the same calls, lowered to what the kernel has.

`Lowered` stands between the handles and a kernel and answers the new requests itself; everything else goes through.
The checks are those of the software KVM (`softkvm.creation`), against what the kernel offers (`kernel_profile`); the
kernel has the last word, before the report is written. Each finding says who refused: `kernel` or `library`.
"""

from __future__ import annotations

import errno
import threading
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from kvm2.abi import ioctls as io
from kvm2.abi import vm2
from kvm2.abi.findings import KERNEL, LIBRARY, Finding
from kvm2.errors import KvmError
from kvm2.hosts.backend import Runner
from kvm2.hosts.kernel_profile import read_kernel
from kvm2.hosts.lowered_vm import LoweredVcpu, LoweredVm, OldVm
from kvm2.hosts.reasons import WATCHED, Reasons
from kvm2.hosts.why import of_machine_type
from kvm2.softkvm import creation, negotiation
from kvm2.softkvm.checks import Refusal, finding
from kvm2.softkvm.limits import limits_of, unknown_on_vm
from kvm2.softkvm.memory import ProcessMemory, Within
from kvm2.softkvm.typeword import PROTECTED, PROTECTED_MACHINE, word_of
from kvm2.softkvm.vmconfig import CAPABILITIES, MACHINE, PHYSADDR, Configuring, VmConfig

if TYPE_CHECKING:
    from kvm2.hosts.backend import RawKvm
    from kvm2.hosts.kernel_profile import KernelProfile

# What says nothing of the list.
OF_THE_MACHINE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR)
MOST_DECIDED = 256


class Lowered:
    """A kernel with the calls of KVM_CREATE_VM2: a `hosts.backend.Backend`. Any thread may call any method."""

    def __init__(self, raw: RawKvm) -> None:
        self.raw = raw
        self.memory = ProcessMemory()
        self.reasons = Reasons(self)
        self._vms: dict[int, LoweredVm] = {}
        self._vcpus: dict[int, LoweredVcpu] = {}
        self._configuring: dict[int, Configuring] = {}
        self._decided: dict[bytes, tuple[int, VmConfig]] = {}
        self._lock = threading.RLock()
        self._requests = {
            io.KVM_CREATE_VM: self._create_vm,
            io.KVM_CREATE_VM2: self._create_vm2,
            io.KVM_CREATE_VM2_FIXED: self._create_vm2_fixed,
            io.KVM_DESCRIBE_VM2: self._describe,
            io.KVM_CHECK_EXTENSION: self._check_extension,
            io.KVM_VM2_SET_ATTRS: self._set_attrs,
            io.KVM_VM2_GET_ATTR: self._get_attr,
            io.KVM_VM2_COMMIT: self._commit,
            io.KVM_CREATE_VCPU: self._create_vcpu,
            io.KVM_ARM_VCPU_INIT: self._init_vcpu,
            io.KVM_ARM_VCPU_FINALIZE: self._finalize,
            io.KVM_SET_ONE_REG: self._set_one_reg,
        }
        self.kvm_run, self.kick = raw.kvm_run, raw.kick
        self.memory_gone, self.memory_written = raw.memory_gone, raw.memory_written

    @property
    def arch(self) -> str:
        """The architecture of the kernel, and so of its guests."""
        return self.raw.arch

    @cached_property
    def kernel(self) -> KernelProfile:
        """What the kernel offers; asked once."""
        with self._lock:
            return read_kernel(self.raw)

    def open(self) -> int:
        """A new descriptor of the kernel's device."""
        fd = self.raw.open()
        self.reasons.opened(fd)
        return fd

    def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
        """The answer; KvmError with the kernel's errno and the reason, or with findings."""
        call = self._requests.get(request)
        try:
            if fd in self._configuring and request not in negotiation.WHILE_CONFIGURING:
                raise self._not_yet(request)
            result = self.raw.ioctl(fd, request, arg) if call is None else call(fd, arg)
        except KvmError as error:
            raise self.reasons.explained(error, fd, request, arg) from None
        if request in WATCHED:
            self.reasons.done(fd, request, arg, result)
        return result

    def runner(self, fd: int) -> Runner:
        """The kernel's own short way into KVM_RUN of a vCPU, its errors explained."""
        make = getattr(self.raw, "runner", None)
        if make is None:
            return Runner(self.ioctl)
        runner: Runner = make(fd, lambda error: self.reasons.explained(error, fd, io.KVM_RUN, 0))
        return runner

    def _not_yet(self, request: int) -> KvmError:
        if io.by_number(request, "vm", self.arch) is None:
            return KvmError(unknown_on_vm(self.arch), f"{request:#x} is no ioctl of a VM")
        return KvmError(errno.ENOEXEC, "this VM is in the negotiation phase: KVM_VM2_COMMIT makes it ready")

    def close(self, fd: int) -> None:
        """Closes a descriptor."""
        if self._vms.pop(fd, None) is None:
            self._vcpus.pop(fd, None)
        elif self._configuring:
            self._configuring.pop(fd, None)
        self.reasons.closed(fd)
        self.raw.close(fd)

    # ---- making VMs

    def _install(self, fd: int, config: VmConfig | None) -> int:
        self._vms[fd] = LoweredVm(self.raw, self.memory, config)
        self.reasons.opened(fd, "vm")
        return fd

    def _create_vm(self, fd: int, type_word: int) -> int:
        made = self.raw.ioctl(fd, io.KVM_CREATE_VM, type_word)
        self._vms[made] = OldVm(self.raw, self.memory, partial(self._config_of_word, type_word))
        self.reasons.opened(made, "vm")
        return made

    def _config_of_word(self, type_word: int) -> VmConfig | None:
        """What a VM of the old call got; None where the kernel took a word that is not known here."""
        with suppress(KvmError):
            found = creation.create_vm(self.kernel, self.memory, type_word)
            return found if isinstance(found, VmConfig) else None
        return None

    def _create_vm2(self, fd: int, arg: int) -> int:
        own = self.memory.own(arg)
        known = self._decided.get(own) if own is not None else None
        if known is not None:
            try:
                return self._install(self.raw.ioctl(fd, io.KVM_CREATE_VM, known[0]), known[1])
            except KvmError:
                pass  # the long way says why
        if self._is_no_system(fd):
            return self.raw.ioctl(fd, io.KVM_CREATE_VM2, arg)
        making, memory = _Making(self, fd), Within(self.memory, arg, len(own or b""))
        try:
            config = creation.create_vm2(self.kernel, memory, arg, making)
        except BaseException:
            making.undo()
            raise
        if isinstance(config, int):
            return config
        if isinstance(config, Configuring):
            reserved = self.raw.reserve()
            self._configuring[reserved] = config
            return self._install(reserved, None)
        if own is not None and not (memory.left or making.found) and own == self.memory.own(arg):
            self._remember(own, making, config)
        return self._install(making.made, config)

    def _remember(self, own: bytes, making: _Making, config: VmConfig) -> None:
        # The answer to a list follows from its bytes, where none of its pointers leads out of them: the same bytes, at
        # the same place, are decided already. Nothing was found, so nothing is to be reported either.
        if len(self._decided) >= MOST_DECIDED:
            self._decided.clear()
        self._decided[own] = (making.type_word(config), config)

    def _is_no_system(self, fd: int) -> bool:
        # A VM and a vCPU have no such calls: the kernel says so itself.
        return fd in self._vms or fd in self._vcpus

    def _create_vm2_fixed(self, fd: int, arg: int) -> int:
        if self._is_no_system(fd):
            return self.raw.ioctl(fd, io.KVM_CREATE_VM2_FIXED, arg)
        making = _Making(self, fd, fixed=True)
        try:
            config = creation.create_vm2_fixed(self.kernel, self.memory, arg, making)
        except BaseException:
            making.undo()
            raise
        return self._install(making.made, config)

    def _marked(
        self, settled: creation.Settled, config: VmConfig | None = None, dry: bool = False
    ) -> tuple[Finding, ...]:
        """What the checks found is the library's word: the kernel was not asked."""
        return tuple(replace(finding, message=LIBRARY + self._worded(finding)) for finding in settled.findings)

    def _worded(self, finding: Finding) -> str:
        row = vm2.ATTRIBUTES.get(finding.attr_type)
        if finding.error == errno.ENOENT and row is not None and self.arch not in row.arches:
            where = ", ".join(sorted(row.arches))
            return f"type = {row.type}: {row.macro} is an attribute of {where}, this kernel is {self.arch}"
        if finding.attr_type == MACHINE and finding.error == errno.EOPNOTSUPP and self.arch != "arm64":
            why = of_machine_type(self.arch, finding.value, self.kernel.vm_types)
            return f"machine_type = {finding.value}: {why}"
        if finding.attr_type == CAPABILITIES and finding.error == errno.EOPNOTSUPP and self.arch != "arm64":
            return f"capabilities[0] = {finding.value:#x}: bits 0 and 1 are arm64's, {self.arch} has none yet"
        return finding.message

    def _describe(self, fd: int, arg: int) -> int:
        if self._is_no_system(fd):
            return self.raw.ioctl(fd, io.KVM_DESCRIBE_VM2, arg)
        return creation.describe_vm2(self.kernel, self.memory, arg)

    # ---- the negotiation phase

    def _state(self, fd: int) -> Configuring | None:
        if fd not in self._vms:
            raise KvmError(errno.EINVAL, f"descriptor {fd} is not a VM")
        return self._configuring.get(fd)

    def _set_attrs(self, fd: int, arg: int) -> int:
        with self._lock:
            return negotiation.set_attrs(self.kernel, self._state(fd), self.memory, arg, self._marked)

    def _commit(self, fd: int, arg: int) -> int:
        with self._lock:
            state = self._state(fd)
            system = self.raw.open() if state is not None else -1
            making = _Making(self, system)
            try:
                config = negotiation.commit(self.kernel, state, self.memory, arg, making)
            except BaseException:
                making.undo()
                raise
            finally:
                if system >= 0:
                    self.raw.close(system)
            if not isinstance(config, int):
                self.raw.fill(fd, making.made)
                del self._configuring[fd]
                self._install(fd, config)
        return 0

    # ---- what a VM and a vCPU answer

    def _config_of(self, fd: int) -> VmConfig:
        state = self._state(fd)
        config = state.config if state is not None else self._vms[fd].config
        if config is None:
            raise KvmError(errno.EOPNOTSUPP, "the kernel took a `type` word that kvm2 does not know")
        return config

    def ipa_bits_of(self, fd: int) -> int:
        """The IPA size in bits of the VM behind a descriptor; 0 where it has none, or none that is known."""
        vm = self._vms.get(fd)
        return vm.config.ipa_bits if vm is not None and vm.config is not None else 0

    def _get_attr(self, fd: int, arg: int) -> int:
        return negotiation.get_attr(self.kernel, self._config_of(fd), self.memory, arg)

    def _check_extension(self, fd: int, cap: int) -> int:
        if fd in self._configuring:
            value = self._system_extension(cap)
            vm: LoweredVm | None = LoweredVm(self.raw, self.memory, self._config_of(fd))
        else:
            value, vm = self.raw.ioctl(fd, io.KVM_CHECK_EXTENSION, cap), self._vms.get(fd)
        if cap == vm2.KVM_CAP_CREATE_VM2:
            return self.kernel.create_vm2
        return value if vm is None else vm.check_extension(value, cap)

    def _system_extension(self, cap: int) -> int:
        system = self.raw.open()
        try:
            return self.raw.ioctl(system, io.KVM_CHECK_EXTENSION, cap)
        finally:
            self.raw.close(system)

    def _create_vcpu(self, fd: int, number: int) -> int:
        vm = self._vms.get(fd)
        if vm is None:
            return self.raw.ioctl(fd, io.KVM_CREATE_VCPU, number)
        vcpu, state = vm.create_vcpu(fd, number)
        self._vcpus[vcpu] = state
        return vcpu

    def _init_vcpu(self, fd: int, arg: int) -> int:
        vcpu = self._vcpus.get(fd)
        return self.raw.ioctl(fd, io.KVM_ARM_VCPU_INIT, arg) if vcpu is None else vcpu.init(fd, arg)

    def _finalize(self, fd: int, arg: int) -> int:
        vcpu = self._vcpus.get(fd)
        return self.raw.ioctl(fd, io.KVM_ARM_VCPU_FINALIZE, arg) if vcpu is None else vcpu.finalize(fd, arg)

    def _set_one_reg(self, fd: int, arg: int) -> int:
        vcpu = self._vcpus.get(fd)
        return self.raw.ioctl(fd, io.KVM_SET_ONE_REG, arg) if vcpu is None else vcpu.set_one_reg(fd, arg)


class _Making:
    """The kernel's part in one creation: KVM_CREATE_VM between the checks and the report. `made` is the descriptor."""

    def __init__(self, host: Lowered, system: int, fixed: bool = False) -> None:
        self.host, self.system, self.fixed = host, system, fixed
        self.made = -1
        self.found: tuple[Finding, ...] = ()

    def __call__(self, settled: creation.Settled, config: VmConfig | None, dry: bool) -> tuple[Finding, ...]:
        found = self.found = self._marked(settled)
        if config is None or (dry and self._is_known(config)):
            return found
        try:
            self.made = self.host.raw.ioctl(self.system, io.KVM_CREATE_VM, self.type_word(config))
        except KvmError as error:
            return (*found, self._refused(error, config, settled))
        if dry:
            self.undo()
        return found

    def _marked(self, settled: creation.Settled) -> tuple[Finding, ...]:
        found = self.host._marked(settled)
        if not self.fixed or self.host.arch == "arm64":
            return found
        foreign = f"{LIBRARY}the fields of the fixed structure are arm64's, this kernel is {self.host.arch}"
        return tuple(
            replace(one, message=foreign, known_hint="leave every byte zero") if one.error == errno.E2BIG else one
            for one in found
        )

    def undo(self) -> None:
        """The VM that nobody will get."""
        if self.made >= 0:
            self.host.raw.close(self.made)
            self.made = -1

    def _is_known(self, config: VmConfig) -> bool:
        """Whether the kernel's capabilities say that it takes this: then a dry run needs no VM."""
        return self.host.arch in ("arm64", "x86_64") or not config.machine_type

    def type_word(self, config: VmConfig) -> int:
        """The word that asks the kernel for it."""
        if not config.ipa_bits:
            return config.machine_type
        flags = PROTECTED if config.machine_type == PROTECTED_MACHINE else 0
        return word_of(self.host.kernel.type_word).encode(config.ipa_bits) | flags

    def _refused(self, error: KvmError, config: VmConfig, settled: creation.Settled) -> Finding:
        kernel, type_word = self.host.kernel, self.type_word(config)
        why = self.host.reasons.of_type(type_word, error.errno or 0)
        kind, value = (PHYSADDR, config.ipa_bits) if kernel.arch == "arm64" else (MACHINE, config.machine_type)
        # A bare EINVAL for a list that is well-formed: the host cannot give it.
        number = errno.EOPNOTSUPP if error.errno == errno.EINVAL else error.errno or errno.EIO
        limits = limits_of(kernel)
        low, high, mask = 0, 0, limits.machine_types
        if kind == PHYSADDR:
            low, high, mask = limits.ipa_least(None), limits.ipa_limit(None), 0
        if error.errno in OF_THE_MACHINE:
            low = high = mask = 0  # another value would not do either
        what = f"{KERNEL}KVM_CREATE_VM({type_word:#x}) gave {error.name}: {why or error.strerror}"
        refusal = Refusal(8 if kind == MACHINE else 4, value, low, high, mask, what)
        return finding(kind, settled.wishes.get(kind), self.fixed, refusal, number)
