"""What a kernel does tens of thousands of times and no trap is needed for: CTR_EL0, IC IVAU, DC CVAU.

HCR_EL2.TID2 traps CTR_EL0 together with the registers that describe caches, and TPU traps IC IVAU, IC IALLU and DC CVAU
alike. Here the trap's condition is exchanged in the core's own table of registers, one by one: CTR_EL0 reads a value
that was set, DC CVAU does nothing, IC IVAU tells where it points before it is executed, and what is left traps as the
ID registers do, by TID3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Final

from kvm2.softkvm.cpu import instance as inst
from kvm2.softkvm.cpu import registers as reg
from kvm2.softkvm.cpu.defined import ACCESS_CALLBACK

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.instance import Instance

CTR_EL0: Final = reg.enc(3, 3, 0, 0, 1)
_ID_AA64PFR0: Final = reg.enc(3, 0, 0, 4, 0)
_CACHES: Final = (reg.enc(3, 1, 0, 0, 0), reg.enc(3, 1, 0, 0, 1), reg.enc(3, 2, 0, 0, 0))  # CCSIDR, CLIDR, CSSELR
_IC_IALLUIS, _IC_IALLU, _IC_IVAU = reg.enc(1, 0, 7, 1, 0), reg.enc(1, 0, 7, 5, 0), reg.enc(1, 3, 7, 5, 1)
_OK, _UNDEFINED = 0, 2
_LOAD, _FETCH = 0, 2
_CORE_INDEX: Final = 0xF  # the part of an ARMMMUIdx that numbers the TLBs
_XZR: Final = 31
_CHECK: Final = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)


class Untrapped:
    """The exchanged conditions of one instance. `failed` takes what a callback raised, and makes the core leave."""

    def __init__(self, instance: Instance, failed: Callable[[BaseException], None]) -> None:
        self._instance, self._failed = instance, failed
        self._fast = instance.engine.FAST
        # Its cached translations serve, where the emulator makes them itself: four times as fast as a walk.
        self.by_tlb = True
        self._handler: Generator[int, int, None] | None = None
        self._kept: object = None
        self._by_tid3 = inst.register_info(instance, _ID_AA64PFR0).accessfn

    def cache_type(self, value: int) -> None:
        """CTR_EL0 is `value`; HCR_EL2.TID2 must be off from now on. Before the first run."""
        inst.register_info(self._instance, CTR_EL0).resetvalue = value
        for enc in _CACHES:
            inst.register_info(self._instance, enc).accessfn = self._by_tid3

    def code(self, changed: Callable[[int | None], None]) -> None:
        """`changed(host address)` is called at each IC IVAU, None where the guest's address would fault; IC IALLU and
        IC IALLUIS trap, HCR_EL2.TPU off. Before the first run."""
        instance = self._instance
        for enc in (_IC_IALLU, _IC_IALLUIS):
            inst.register_info(instance, enc).accessfn = self._by_tid3
        info = inst.register_info(instance, _IC_IVAU)
        native = _CHECK(info.accessfn)  # at EL0: SCTLR_EL1.UCI
        self._handler = self._accesses(native, ctypes.addressof(info), changed)
        next(self._handler)
        callback = ACCESS_CALLBACK(self._handler.send)
        info.accessfn = ctypes.cast(callback, ctypes.c_void_p).value
        # Not "no operation" but a write of something that nobody reads: a write ends the block, so that the code behind
        # it is looked up again.
        info.type = 0
        info.fieldoffset = instance.layout.spare_in_env + 8 * (len(reg.STORED) + 1)
        self._kept = callback, native

    def _line(self) -> int | None:
        """Where in this process the line of the IC IVAU at PC lies."""
        instance, fast, where = self._instance, self._fast, None
        if self.by_tlb:
            index = fast.arm_mmu_idx_aarch64(instance.env) & _CORE_INDEX
            where = fast.tlb_vaddr_to_host_aarch64(instance.env, instance.pc_cell.value, _FETCH, index)
        word = ctypes.c_uint8.from_address(where).value if where else instance.read_code(instance.pc_cell.value)
        if word is None:
            return None
        target = word & _XZR
        address = instance.x[target] if target != _XZR else 0
        host: int | None = None
        if where:
            host = fast.tlb_vaddr_to_host_aarch64(instance.env, address, _LOAD, index)
        return host or instance.host_address(address)

    def close(self) -> None:
        """The core is about to be freed."""
        if self._handler is not None:
            self._handler.close()

    def _accesses(
        self, native: Callable[[int, int, int], int], info: int, changed: Callable[[int | None], None]
    ) -> Generator[int, int, None]:
        # As in Core._exceptions: a signal's exception is raised inside the `try`, and the instruction comes again.
        instance, answer = self._instance, _OK
        env = instance.env
        while True:
            try:
                while True:
                    yield answer
                    answer = _UNDEFINED
                    permitted = native(env, info, 0)
                    if permitted == _OK:
                        changed(self._line())
                    answer = permitted
            except GeneratorExit:
                return
            except BaseException as failure:
                answer = _UNDEFINED
                self._failed(failure)
