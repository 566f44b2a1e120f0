"""A virtual machine: what creation decided, its memory slots, its stage-2 tables, its vCPUs.

State that outlives an ioctl lives here, in `MemSlots` and in `Vcpu`, and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import threading
from typing import TYPE_CHECKING

from kvm2.abi import caps
from kvm2.abi.sysregs import CTR_EL0, ID_AA64ISAR0_EL1, MIDR_EL1, MPIDR_EL1
from kvm2.errors import KvmError
from kvm2.softkvm import guest_ids, process
from kvm2.softkvm.bus import Bus
from kvm2.softkvm.cpu.walk import FETCH, READ, TRANSLATION, WRITE
from kvm2.softkvm.eventfds import Eventfds
from kvm2.softkvm.features import PTRAUTH, VmArm
from kvm2.softkvm.memslots import MemSlots
from kvm2.softkvm.runlock import RunLock
from kvm2.softkvm.stage2 import Stage2
from kvm2.softkvm.stage2_format import CORE_IPA_BITS, stage2_format
from kvm2.softkvm.vcpu import Vcpu
from kvm2.softkvm.vmconfig import Configuring, VmConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvm2.abi.structs import ClearDirtyLog, UserspaceMemoryRegion, UserspaceMemoryRegion2
    from kvm2.softkvm.cpu.core import Core
    from kvm2.softkvm.memory import Memory
    from kvm2.softkvm.profile import Profile
    from kvm2.softkvm.run import Execution
    from kvm2.softkvm.vgic.its import Its
    from kvm2.softkvm.vgic.state import Vgic

# Every VM of the process gets the next VMID; it shows in VTTBR_EL2, where userspace's dumps look for it.
_vmids = itertools.count(1)

VGIC_V2_MAX_CPUS = 8
TRANSLATION_FAULT_LEVEL_3 = TRANSLATION | 3
ATOMIC_SHIFT = 20  # ID_AA64ISAR0_EL1.Atomic


class Vm:
    """One VM of the software KVM. Made whole by its constructor, or configuring until the negotiation commits."""

    def __init__(self, profile: Profile, memory: Memory, config: VmConfig | Configuring) -> None:
        self.profile, self.memory, self.page_shift = profile, memory, profile.page_shift
        self.birth, self.pid = process.birth, os.getpid()
        self.lock = threading.RLock()  # taken after the run lock by whoever needs both: a guest's call may take it
        self.run_lock = RunLock()
        self.vcpus: dict[int, Vcpu] = {}
        self.executions: list[Execution] = []
        self.doomed = False
        self.dead = ""  # why every ioctl answers EIO
        self.ran = False
        self.vgic: Vgic | None = None
        self.itses: list[Its] = []  # without a vGICv3 they do nothing, as in the kernel
        self.has_vfio = False
        self.bus = Bus()  # what answers inside the VM before userspace is asked
        self.eventfds = Eventfds()
        self.observer: Callable[[str, dict[str, int]], None] | None = None  # is told of each interrupt
        self.return_nisv_to_user = False
        self.guest_ids = guest_ids.PROFILE  # what guests are shown of the ID registers
        self.last_core: Core | None = None
        self.code_generation = 0
        self.code_pages: set[int] = set()  # granules of the client's memory from which the guest has executed
        self.soft_mmu = False
        self._arm: VmArm | None = None
        self._stage2: Stage2 | None = None
        self._slots: MemSlots | None = None
        self.configuring: Configuring | None = None
        if isinstance(config, Configuring):
            self.configuring = config
        else:
            self.configure(config)

    def configure(self, config: VmConfig) -> None:
        """Fixes what creation decided; the stage-2 format never changes once the VM is ready."""
        self._config = config
        self.ipa_limit = self.profile.ipa_limit if config.ipa_bits else 0
        if config.ipa_bits:
            self.format = stage2_format(self.profile, config.ipa_bits, config.page_shift)
        self.configuring = None

    @property
    def config(self) -> VmConfig:
        """What the VM got; while it is configuring, what it would get now."""
        return self.configuring.config if self.configuring is not None else self._config

    @property
    def arm(self) -> VmArm:
        """What the vCPUs share: features, ID registers, firmware."""
        if self._arm is None:
            self._arm = VmArm(self.profile)
        return self._arm

    @property
    def slots(self) -> MemSlots:
        if self._slots is None:
            self._slots = MemSlots(self.profile, self.config.ipa_bits, self.format.page_shift)
        return self._slots

    @property
    def stage2(self) -> Stage2:
        if self._stage2 is None:
            self._stage2 = Stage2(self.format, self.profile, next(_vmids))
        return self._stage2

    # ---- life

    def check_alive(self) -> None:
        """EIO in a process that did not make the VM (as `kvm->mm != current->mm`), and on a VM that is dead."""
        if self.birth is not process.birth:
            raise KvmError(errno.EIO, f"this VM belongs to process {self.pid}: a child makes its own")
        if self.dead:
            raise KvmError(errno.EIO, self.dead)

    def destroy(self) -> None:
        """The last descriptor is closed: cores and tables go, as soon as no vCPU runs any more."""
        self.doomed = True
        self.eventfds.close()
        # A vCPU that runs reaches into the cores of the others (IC IVAU): none may go away under it.
        with self.run_lock, self.lock:
            if not all(execution.close() for execution in list(self.executions)):
                return  # the thread in KVM_RUN comes here again when it is out
            self.executions.clear()
            for vcpu in self.vcpus.values():
                vcpu.timers.stop()
            if self._stage2 is not None:
                self._stage2.close()
                self._stage2 = None

    def observe(self, what: str, **facts: int) -> None:
        """An interrupt was injected, acknowledged or ended; for whoever has set `observer`."""
        if self.observer is not None:
            self.observer(what, facts)

    # ---- capabilities

    def check_extension(self, cap: int) -> int:
        """`KVM_CHECK_EXTENSION` on the VM: what differs from the system's answer follows from creation and the vGIC."""
        if cap == caps.KVM_CAP_MAX_VCPUS:
            return min(self.config.max_vcpus, self._vgic_limit())
        if cap == caps.KVM_CAP_MAX_VCPU_ID:
            return min(self.config.max_vcpu_id, self._vgic_limit())
        if cap == caps.KVM_CAP_ARM_SVE and not self.config.sve_allowed:
            return 0
        if cap == caps.KVM_CAP_MSI_DEVID and self.itses:
            return 1
        if cap == caps.KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE and self._arm is not None:
            return self._arm.split_page_chunk_size
        answers = self.profile.vm_caps if cap in self.profile.vm_caps else self.profile.caps
        value = answers.get(cap, 0)
        if value < 0:
            raise KvmError(-value, f"this host's kernel answers capability {cap} with an error")
        return value

    @property
    def irqchip(self) -> str:
        """The model of the VM's vGIC, "v2" or "v3"; empty where it has none."""
        return self.vgic.model if self.vgic is not None else ""

    def _vgic_limit(self) -> int:
        return VGIC_V2_MAX_CPUS if self.irqchip == "v2" else sys.maxsize

    # ---- time

    def set_counter_offsets(self, voffset: int | None = None, poffset: int | None = None) -> None:
        """The guests' counters are the host's minus these, in ticks; of all vCPUs, whose timers look again."""
        if voffset is not None:
            self.arm.voffset = voffset
        if poffset is not None:
            self.arm.poffset = poffset
        for vcpu in list(self.vcpus.values()):
            vcpu.timers.update()

    # ---- vCPUs

    def add_vcpu(self, number: int) -> Vcpu:
        """`kvm_vm_ioctl_create_vcpu`: EINVAL at or above the limit, EEXIST for an id that is taken."""
        with self.lock:
            self.check_vcpu_id(number)
            if number in self.vcpus:
                raise KvmError(errno.EEXIST, f"vCPU {number} exists already in this VM")
            vcpu = Vcpu(self, number)
            if self.vgic is not None:
                self.vgic.add_cpu(vcpu.gic)  # where the frames do not fit there is no vCPU
            self.vcpus[number] = vcpu
        return vcpu

    @contextlib.contextmanager
    def vcpus_held(self) -> Iterator[None]:
        """lock_all_vcpus: no vCPU is in an ioctl meanwhile; EBUSY where one is (KVM_RUN, most often)."""
        with contextlib.ExitStack() as held:
            for vcpu in list(self.vcpus.values()):
                if not vcpu.lock.acquire(blocking=False):
                    raise KvmError(errno.EBUSY, f"vCPU {vcpu.vcpu_id} is in KVM_RUN or another ioctl: stop it first")
                held.callback(vcpu.lock.release)
            yield

    def check_vcpu_id(self, number: int) -> None:
        """EINVAL at or above the VM's limit of ids, and where it has all its vCPUs; EBUSY once the vGIC is set up."""
        limit = min(self.config.max_vcpu_id, self._vgic_limit())
        full = len(self.vcpus) >= min(self.config.max_vcpus, self._vgic_limit())
        if self.vgic is not None and self.vgic.initialized and number < self.config.max_vcpu_id and not full:
            raise KvmError(errno.EBUSY, "the vGIC is initialised: make all vCPUs before KVM_DEV_ARM_VGIC_CTRL_INIT")
        if number >= limit or full:
            raise KvmError(errno.EINVAL, f"vCPU id {number}: this VM takes 0..{limit - 1}")

    def first_run(self, vcpu: Vcpu) -> None:
        """`kvm_arch_vcpu_run_pid_change`: a vGIC that was not configured kills the VM at its first run."""
        with self.lock:
            if self.vgic is not None:
                self._map_vgic(self.vgic)
            vcpu.on_first_run()
            vcpu.has_run = self.ran = True

    def _map_vgic(self, vgic: Vgic) -> None:
        from kvm2.softkvm.vgic.resources import map_resources

        try:
            map_resources(vgic)
        except KvmError as error:
            self.dead = f"{error.reason}; at KVM_RUN that ends the VM (as in the kernel): make a new one"
            raise KvmError(error.errno or errno.EINVAL, self.dead) from None

    def has_pauth(self, vcpu: Vcpu) -> bool:
        """Protected KVM keeps pointer authentication from every guest, whatever it says of the feature."""
        return bool(vcpu.features & PTRAUTH) and self.profile.mode != "protected"

    def core_model(self, vcpu: Vcpu) -> str:
        """The A72 model knows Armv8.0 only, and is faster; whatever the guest is shown beyond needs the other one."""
        atomics = self.profile.registers.get(ID_AA64ISAR0_EL1, 0) >> ATOMIC_SHIFT & 0xF
        return "max" if vcpu.has_sve() or self.has_pauth(vcpu) or atomics else "a72"

    def make_core(self, vcpu: Vcpu, on_trap: Callable[[], bool], soft: bool) -> Core:
        """An emulated core that shows what this vCPU may see: model, identity, vector lengths, stage 2. With `soft`
        Python does all its translation."""
        from kvm2.softkvm.cpu.core import Core
        from kvm2.softkvm.vgic import icc

        sve, pauth, model = vcpu.has_sve(), self.has_pauth(vcpu), self.core_model(vcpu)
        # The core walks tables up to 48 bits. Beyond, Python says what an access is, or does all the walking.
        walk = self.soft_walk if soft or self.profile.pa_bits > CORE_IPA_BITS else None
        core = Core(
            model,
            on_trap,
            pauth=pauth,
            soft_mmu=walk,
            soft_pa_bits=self.profile.pa_bits,
            above_48_only=not soft,
        )
        core.set_id(vcpu.guest_read(MIDR_EL1) or 0, vcpu.state.sys.get(MPIDR_EL1, 0))
        if model == "max":
            vqs = tuple(vq for vq in self.profile.sve_vqs if vq <= vcpu.sve_max_vq)
            core.set_sve(vqs if sve else None)
        core.set_cache_type(vcpu.guest_read(CTR_EL0) or 0)
        vcpu.timers.attach(core)
        icc.define(core, vcpu)
        core.set_stage2(self.stage2.core_vtcr, self.stage2.core_vttbr)
        return core

    def soft_walk(self, ipa: int, access: int) -> tuple[int, int] | int:
        """Stage 2 for the core's translation in Python: (host address, permissions), or the fault's status."""
        leaf = self.stage2.translate(ipa) if not ipa >> self.config.ipa_bits else None
        if leaf is None:
            return TRANSLATION_FAULT_LEVEL_3
        return leaf.hva, READ | WRITE * leaf.writable | FETCH * leaf.executable

    # ---- memory

    def set_memory(self, region: UserspaceMemoryRegion | UserspaceMemoryRegion2) -> int:
        """Adds, moves, changes or deletes a slot; no vCPU is in the guest while slots and tables change."""
        with self.run_lock, self.lock:
            change = self.slots.set(region)
            for ipa, size in change.unmap:
                self.stage2.unmap(ipa, size)
            self._protect(change.protect)
            # Whether a slot lies where the core's own walker does not reach.
            self.soft_mmu = self.slots.end > 1 << CORE_IPA_BITS
            # Memory of the client that was not the guest's before may hold new instructions.
            self.code_generation += 1
        return 0

    def _protect(self, ranges: Iterable[tuple[int, int]]) -> None:
        for ipa, size in ranges:
            self.stage2.write_protect(ipa, size)

    def get_dirty_log(self, slot: int, bitmap: int) -> int:
        """Writes the slot's dirty bitmap to the client's memory; its pages are protected again (and the bits clear)
        unless KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is on."""
        with self.run_lock, self.lock:
            dirty = self.slots.get_dirty(slot)
            self._protect(dirty.protect)
        self.memory.write(bitmap, dirty.bitmap)
        return 0

    def clear_dirty_log(self, log: ClearDirtyLog) -> int:
        """Clears the bits of the client's mask and protects their pages again."""
        with self.run_lock, self.lock:
            self._protect(
                self.slots.clear_dirty(
                    log.slot, log.first_page, log.num_pages, lambda size: self.memory.read(log.dirty_bitmap, size)
                )
            )
        return 0

    def forget_memory(self, address: int, size: int) -> None:
        """The client's memory in [address, address + size) goes away: no stage-2 entry leads there any more, and the
        next access to it is a fault (what an MMU notifier does: `kvm_unmap_gfn_range`)."""
        with self.run_lock, self.lock:
            for slot in self._slots or ():
                first = max(address, slot.userspace_addr)
                last = min(address + size, slot.userspace_addr + slot.memory_size)
                if first < last:
                    self.stage2.unmap(first - slot.userspace_addr + slot.guest_phys_addr, last - first)
            self.forget_code()  # other memory may come to the same place

    def forget_code(self) -> None:
        """Every core drops its translated instructions before it runs again."""
        self.code_generation += 1

    def code_written(self, address: int, size: int) -> None:
        """The client changed its memory [address, address + size): what was translated from it is dropped."""
        if not self.code_pages or size <= 0:
            return
        shift = self.format.page_shift
        if self.code_pages.isdisjoint(range(address >> shift, (address + size - 1 >> shift) + 1)):
            return
        with self.run_lock:
            for execution in self.executions:
                if execution.core is not None:
                    execution.core.drop_code(address, size)
