"""System registers that Python answers for the core, and the guest's SVE vector lengths."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import instance as inst
from kvm2.softkvm.cpu import registers as reg

if TYPE_CHECKING:
    from kvm2.softkvm.cpu.instance import Instance
    from kvm2.softkvm.cpu.stop import StopGate

ZCR_LEN: Final = 0xF
MAX_VQ: Final = 16
CONSTANT: Final = 2  # ARM_CP_CONST


def effective_vq(wanted: int, vqs: tuple[int, ...]) -> int:
    """The vector length for a request of `wanted` quadwords: the next lower one that exists (Arm ARM, ZCR_ELx.LEN).

    >>> [effective_vq(vq, (1, 2, 4)) for vq in (1, 2, 3, 4, 16)]
    [1, 2, 2, 4, 4]
    """
    return max(vq for vq in vqs if vq <= max(wanted, min(vqs)))


class Overrides:
    """The replaced registers of one instance."""

    def __init__(self, instance: Instance, gate: StopGate) -> None:
        self.instance = instance
        self._gate = gate
        self._kept: list[Any] = []  # the callbacks: the library has only their addresses
        self._zcr = 0
        for slot, enc in enumerate(reg.STORED):
            info = inst.register_info(instance, enc)
            info.type &= ~CONSTANT
            info.fieldoffset = instance.layout.spare_in_env + 8 * slot

    def override(self, enc: int, read: Callable[[], int] | None, write: Callable[[int], None] | None) -> None:
        """Functions in place of the core's own, for the guest and for `Core.load` and `save`; None keeps that one."""
        info = inst.register_info(self.instance, enc)
        gate = self._gate

        def on_read(env: int, description: int) -> int:
            assert read is not None
            gate.in_hook = True
            try:
                return read() & (1 << 64) - 1
            finally:
                gate.in_hook = False

        def on_write(env: int, description: int, value: int) -> None:
            assert write is not None
            gate.in_hook = True
            try:
                write(value)
            finally:
                gate.in_hook = False

        if read is not None:
            reader = inst.READ_CALLBACK(on_read)
            self._kept.append(reader)
            info.readfn = info.raw_readfn = ctypes.cast(reader, ctypes.c_void_p).value
        if write is not None:
            writer = inst.WRITE_CALLBACK(on_write)
            self._kept.append(writer)
            info.writefn = info.raw_writefn = ctypes.cast(writer, ctypes.c_void_p).value

    def set_sve(self, vqs: tuple[int, ...] | None) -> None:
        """ZCR_EL2 limits the length; a set with gaps also needs each of the guest's ZCR_EL1 writes."""
        instance = self.instance
        if vqs is None:
            if instance.model == "max":
                instance.write_sys(reg.CPTR_EL2, inst.CPTR_EL2_RES1 | inst.CPTR_EL2_TZ)
            return
        if instance.model != "max" or not vqs or not 1 <= min(vqs) <= max(vqs) <= MAX_VQ:
            raise EnvironmentFault(
                f'SVE lengths {vqs} cannot be set: they are 1 to {MAX_VQ} quadwords, on a core of model "max"'
            )
        instance.write_sys(reg.CPTR_EL2, inst.CPTR_EL2_RES1)
        instance.write_sys(reg.ZCR_EL2, max(vqs) - 1)
        if sorted(vqs) != list(range(1, max(vqs) + 1)):
            self._gaps(vqs)

    def _gaps(self, vqs: tuple[int, ...]) -> None:
        info = inst.register_info(self.instance, reg.ZCR_EL1)
        native = inst.WRITE_CALLBACK(info.writefn)
        env, description = self.instance.env, ctypes.addressof(info)

        def write(value: int) -> None:
            self._zcr = value & ZCR_LEN
            native(env, description, effective_vq(self._zcr + 1, vqs) - 1)

        self.override(reg.ZCR_EL1, lambda: self._zcr, write)
        write(0)
