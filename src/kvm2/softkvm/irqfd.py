"""KVM_IRQFD: eventfds that raise interrupts, and with a resampler those told of their end (virt/kvm/eventfd.c).

A VM's irqfds are in an epoll set of its own, edge-triggered, so that each write counts once. One thread of the process
waits for all these sets. Whoever makes an ioctl on the VM looks into its set first (`Eventfds.catch_up`).
"""

from __future__ import annotations

import errno
import os
import select
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from kvm2.abi import structs_irq as abi
from kvm2.errors import KvmError
from kvm2.softkvm import process
from kvm2.softkvm.eventfd import EventFd
from kvm2.softkvm.irq_routing import set_irq
from kvm2.softkvm.vgic.irq import NR_PRIVATE_IRQS

if TYPE_CHECKING:
    from kvm2.softkvm.vgic.irq import Irq
    from kvm2.softkvm.vm import Vm


class Irqfd:
    """One assignment (`struct kvm_kernel_irqfd`). `first`: it was signalled when it was assigned."""

    def __init__(self, gsi: int, eventfd: EventFd, resample: EventFd | None) -> None:
        self.gsi, self.eventfd, self.resample = gsi, eventfd, resample
        self.first = eventfd.readable()

    def close(self) -> None:
        """Drops both eventfds."""
        self.eventfd.close()
        if self.resample is not None:
            self.resample.close()


class Irqfds:
    """Of one VM. `lock` is held while one is injected, so that a deassigned one no longer is."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._birth = process.birth
        self._lock = threading.RLock()
        self._set = select.epoll()
        self._by_fd: dict[int, Irqfd] = {}
        # By GSI. Read without the lock, at the end of an interrupt: changed by replacing.
        self._resamplers: dict[int, tuple[EventFd, ...]] = {}
        watcher = _watcher
        watcher.add(self._set.fileno(), self)
        self._unwatch = weakref.finalize(self, watcher.remove, self._set.fileno())
        self._unwatch.atexit = False

    # ---- assigning

    def assign(self, irqfd: Irqfd) -> None:
        """EBUSY where the eventfd is an irqfd already, of whatever GSI."""
        with self._lock:
            if any(other.eventfd.id == irqfd.eventfd.id for other in self._by_fd.values()):
                self._lower(irqfd)
                raise KvmError(errno.EBUSY, "this eventfd is an irqfd of this VM already: one is for one GSI")
            self._by_fd[irqfd.eventfd.fd] = irqfd
            self._resample()
            self._set.register(irqfd.eventfd.fd, select.EPOLLIN | select.EPOLLET)
            self.drain()

    def deassign(self, eventfd: EventFd, gsi: int) -> None:
        """irqfd_shutdown of those that match, if any; when it returns, nothing of them comes any more."""
        with self._lock:
            for fd, irqfd in list(self._by_fd.items()):
                if irqfd.eventfd.id == eventfd.id and irqfd.gsi == gsi:
                    self._set.unregister(fd)
                    del self._by_fd[fd]
                    self._resample()
                    irqfd.close()
                    self._lower(irqfd)

    def _lower(self, irqfd: Irqfd) -> None:
        """irqfd_resampler_shutdown: without a resampler the line would stay up for ever."""
        if irqfd.resample is not None and irqfd.gsi not in self._resamplers:
            set_irq(self._vm, irqfd.gsi, False)

    def _resample(self) -> None:
        found: dict[int, tuple[EventFd, ...]] = {}
        for irqfd in self._by_fd.values():
            if irqfd.resample is not None:
                found[irqfd.gsi] = (*found.get(irqfd.gsi, ()), irqfd.resample)
        self._resamplers = found
        if self._vm.vgic is not None:
            self._vm.vgic.eoi_notifier = self.ended if found else None

    def close(self) -> None:
        """kvm_irqfd_release. In a forked child only the descriptors go: the sets are its parent's too."""
        if self._birth is process.birth:
            with self._lock:
                self._unwatch()
                for irqfd in list(self._by_fd.values()):
                    self.deassign(irqfd.eventfd, irqfd.gsi)
        for irqfd in self._by_fd.values():
            irqfd.close()
        self._set.close()

    # ---- injecting

    def drain(self) -> None:
        """Injects what was signalled since the last time."""
        with self._lock:
            if self._set.closed:
                return
            for fd, _ in self._set.poll(0):
                irqfd = self._by_fd.get(fd)
                if irqfd is not None:
                    self._wakeup(irqfd)

    def _wakeup(self, irqfd: Irqfd) -> None:
        vm = self._vm
        if irqfd.first:
            # What was there before is a pulse (irqfd_inject), and is not read.
            irqfd.first = False
            set_irq(vm, irqfd.gsi, True)
            if irqfd.resample is None:
                set_irq(vm, irqfd.gsi, False)
            return
        irqfd.eventfd.take()
        # kvm_arch_set_irq_inatomic: a level-sensitive interrupt stays asserted. For MSIs there is no difference.
        set_irq(vm, irqfd.gsi, True)

    def ended(self, irq: Irq) -> None:
        """kvm_notify_acked_irq: a level-sensitive SPI was deactivated. Under the vGIC's lock, so without this one's."""
        gsi = self._vm.eventfds.routing.gsi_of_pin.get(irq.intid - NR_PRIVATE_IRQS)
        told = self._resamplers.get(gsi) if gsi is not None else None
        if told and gsi is not None:
            # All of a GSI share one line: it goes down once, and who still has a reason asserts it again.
            set_irq(self._vm, gsi, False)
            for eventfd in told:
                eventfd.signal()


def irqfd(vm: Vm, arg: int) -> int:
    """KVM_IRQFD. EINVAL: unknown flags, no eventfd; EAGAIN: the vGIC is not initialised; EBADF; EBUSY."""
    asked = abi.Irqfd.unpack(vm.memory.read(arg, abi.Irqfd.SIZE))
    known = abi.KVM_IRQFD_FLAG_DEASSIGN | abi.KVM_IRQFD_FLAG_RESAMPLE
    if asked.flags & ~known:
        raise KvmError(errno.EINVAL, f"flags = {asked.flags:#x}: known are DEASSIGN (1) and RESAMPLE (2)")
    if asked.flags & abi.KVM_IRQFD_FLAG_DEASSIGN:
        eventfd = EventFd(asked.fd)
        try:
            if vm.eventfds.irqfds is not None:
                vm.eventfds.irqfds.deassign(eventfd, asked.gsi)
        finally:
            eventfd.close()
        return 0
    if vm.vgic is None or not vm.vgic.initialized:
        raise KvmError(errno.EAGAIN, "irqfds come after the vGIC is initialised: KVM_DEV_ARM_VGIC_CTRL_INIT")
    eventfd = EventFd(asked.fd)
    try:
        resample = EventFd(asked.resamplefd) if asked.flags & abi.KVM_IRQFD_FLAG_RESAMPLE else None
        made = Irqfd(asked.gsi, eventfd, resample)
        try:
            of_vm(vm).assign(made)
        except BaseException:
            made.close()
            raise
    except BaseException:
        eventfd.close()
        raise
    return 0


def of_vm(vm: Vm) -> Irqfds:
    """The VM's irqfds, made when they are first needed."""
    with vm.lock:
        if vm.eventfds.irqfds is None:
            vm.eventfds.irqfds = Irqfds(vm)
        return vm.eventfds.irqfds


class _Watcher:
    """The thread that waits for every VM's set. It ends when there is none left."""

    def __init__(self) -> None:
        self._birth = process.birth
        self._lock = threading.RLock()
        self._watched: dict[int, weakref.ref[Irqfds]] = {}
        self._all: select.epoll | None = None
        self._wake = -1

    def add(self, fd: int, irqfds: Irqfds) -> None:
        """Watches the set with this descriptor."""
        with self._lock:
            if self._all is None:
                self._all, self._wake = select.epoll(), os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._all.register(self._wake, select.EPOLLIN)
                threading.Thread(target=self._run, args=(self._all,), name="kvm2-irqfd", daemon=True).start()
            self._watched[fd] = weakref.ref(irqfds)
            self._all.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """No longer; called while the set is still open. In a forked child the sets are its parent's: nothing."""
        if self._birth is not process.birth:
            return
        with self._lock:
            if self._all is not None and self._watched.pop(fd, None) is not None:
                self._all.unregister(fd)
                if not self._watched:
                    os.eventfd_write(self._wake, 1)

    def _run(self, everything: select.epoll) -> None:
        while True:
            for fd, _ in everything.poll():
                if fd == self._wake:
                    if self._ended():
                        return
                    continue
                one = self._watched.get(fd)
                irqfds = one() if one is not None else None
                if irqfds is not None:
                    try:
                        irqfds.drain()
                    except Exception:
                        # The other VMs' interrupts go on.
                        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
                del irqfds  # while it waits, it keeps no VM

    def _ended(self) -> bool:
        with self._lock:
            os.eventfd_read(self._wake)
            if self._watched or self._all is None:
                return False
            self._all.close()
            os.close(self._wake)
            self._all, self._wake = None, -1
            return True


_watcher = _Watcher()


def _forked() -> None:
    """A child has no thread: it makes its own."""
    global _watcher
    _watcher = _Watcher()


os.register_at_fork(after_in_child=_forked)
