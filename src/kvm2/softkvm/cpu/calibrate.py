"""The private facts of the emulated core, found by value and checked once per process.

Unicorn's interface does not tell an exception's syndrome, fault address or target, cannot stop a running core without
executing an instruction twice, and limits physical addresses to 44 bits. The fields that do lie in the library's own
structures. Nothing here is a hard-coded offset: known values are put in (registers, `svc` immediates, a fault at a
known address), the structures are searched for them, and what is not found exactly once is an `EnvironmentFault` that
names the fact. All CPU models share one layout, so one instance of the largest model serves.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from ctypes import c_uint64, c_void_p
from dataclasses import dataclass
from typing import Final

from kvm2.errors import EnvironmentFault
from kvm2.softkvm.cpu import engine as uc
from kvm2.softkvm.cpu.peek import peek, peek_prefix
from kvm2.softkvm.cpu.undisturbed import undisturbed

_INTR_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, ctypes.c_uint32, c_void_p)
ENTER_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p)
TLBS: Final = 12
_TLB_WINDOW: Final = 0x200
_TLB_MASK: Final = 255 * 64
_CODE: Final = 0x10000
_WFE: Final = 0xD503205F
_HVC, _LDR_X2_X1, _LDXR_X6_X3, _PTRUE_P3, _SETFFR = 0xD40000E2, 0xF9400022, 0xC85F7C66, 0x2518E3E3, 0x252C9000
_SVCS: Final = (0x5AA5, 0x1234)
_BAD_ADDRESS: Final = 1 << 50 | 0xABC00
_EXCLUSIVE_VALUE: Final = 0xFEEDFACE_C0DEC0DE
_CPU_BYTES: Final = 0x20000
_INSTANCE_BYTES: Final = 0x2000
_EXCP_SWI, _EXCP_DATA_ABORT, _EXCP_HVC = 2, 4, 11

SCR_EL3: Final = 0xF088
HCR_EL2: Final = 0xE088
CPTR_EL3: Final = 0xF08A
CPACR_EL1: Final = 0xC082
ID_AA64MMFR0: Final = 0xC038
# The seven ID registers in the order in which the CPU object stores them; MMFR0 is the last but two.
_ID_BLOCK: Final = (0xC030, 0xC031, 0xC020, 0xC021, 0xC038, 0xC039, 0xC03A)
_SCR: Final = 0x30531  # NS, RES1, HCE, RW, APK, API: EL2 and below are non-secure AArch64
_HCR: Final = 3 << 40 | 1 << 31  # API, APK, RW


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes: `*_in_uc` from the instance, `*_in_cpu` from the CPU object, `*_in_env` from its registers."""

    env_in_cpu: int
    exception_in_env: int
    exception_index_in_cpu: int
    no_exit_request_in_uc: int
    mmfr0_in_env: int
    z_in_env: int
    p_in_env: int
    exclusive_in_env: int
    spare_in_env: int  # 128 bytes of a register file that AArch64 has not (iWMMXt), behind the exclusive monitor
    cp_regs_in_env: int
    env_bytes: int
    tlbs_in_cpu: int  # of each translation regime's TLB: (entries - 1) * 64, address
    enter_in_cpu: int  # the function that the library calls on its way into the guest
    # What `uc_emu_stop` writes: (offset, byte) in the instance, then in the CPU object.
    stop_in_uc: tuple[tuple[int, int], ...]
    stop_in_cpu: tuple[tuple[int, int], ...]


class ExceptionInfo(ctypes.Structure):
    """The exception about to be taken: `env.exception`."""

    _fields_ = [
        ("syndrome", ctypes.c_uint32),
        ("fsr", ctypes.c_uint32),
        ("vaddress", c_uint64),
        ("target_el", ctypes.c_uint32),
    ]


def _fault(fact: str) -> EnvironmentFault:
    version = ".".join(map(str, uc.VERSION))
    return EnvironmentFault(
        f"the emulated core's check failed: {fact} was not found in {uc.engine().path}, which says it is Unicorn "
        f"{version}; reinstall it: pip install --force-reinstall unicorn=={version}"
    )


def _only(hits: set[int], fact: str) -> int:
    if len(hits) != 1:
        raise _fault(f"{fact} ({len(hits)} candidates)")
    return hits.pop()


def _all(blob: bytes, pattern: bytes, align: int = 4) -> set[int]:
    hits, at = set(), blob.find(pattern)
    while at >= 0:
        if at % align == 0:
            hits.add(at)
        at = blob.find(pattern, at + 1)
    return hits


def quiet(engine: uc.Engine, handle: c_void_p) -> None:
    """A non-secure EL1 where nothing but HVC traps, of the largest model."""
    for enc, value in ((SCR_EL3, _SCR), (HCR_EL2, _HCR), (CPTR_EL3, 0x100), (CPACR_EL1, 0x330000)):
        engine.write_sys(handle, enc, value)


def cpu_object(engine: uc.Engine, handle: c_void_p) -> int:
    """The address of an instance's CPU object (its only CPU has the number "unassigned", or 0)."""
    for index in (-1, 0):
        address = engine.LIB.qemu_get_cpu_aarch64(handle, index)
        if address:
            return int(address)
    raise _fault("the CPU object")


def _changes(before: bytes, after: bytes) -> tuple[tuple[int, int], ...]:
    return tuple((at, new) for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new)


@dataclass
class _Stop:
    """What the interrupt hook saw: the library's exception number, the registers' bytes, the CPU object's bytes."""

    number: int
    env: bytes
    head: bytes
    stop_in_uc: tuple[tuple[int, int], ...]
    stop_in_cpu: tuple[tuple[int, int], ...]


class _Probe:
    """One instance of the largest model with a page of code, and a hook that records and stops."""

    def __init__(self) -> None:
        self.engine = engine = uc.engine()
        self.page = mmap.mmap(-1, mmap.PAGESIZE * 4)
        self.handle = engine.open(uc.MODEL_MAX, 1 << 20)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.page))
        size = len(self.page)
        error = engine.LIB.uc_mem_map_ptr(self.handle, _CODE, size, uc.PROT_ALL, c_void_p(self.address))
        engine.check(error, "mapping the probe's memory")
        quiet(engine, self.handle)
        self.cpu = cpu_object(engine, self.handle)
        self.env = 0
        self.env_bytes = 0
        self.stops: list[_Stop] = []
        self.callback = _INTR_CALLBACK(self._on_exception)
        engine.hook(self.handle, uc.HOOK_INTR, self.callback)

    def close(self) -> None:
        self.engine.LIB.uc_close(self.handle)

    def _on_exception(self, handle: int, number: int, user: object) -> None:
        head, instance = self._head(), self._instance()
        self.engine.FAST.uc_emu_stop(self.handle)
        changes = _changes(instance, self._instance()), _changes(head, self._head())
        self.stops.append(_Stop(number, peek(self.env, self.env_bytes) or b"", head, *changes))

    def _head(self) -> bytes:
        return peek(self.cpu, self.env - self.cpu) or b""

    def _instance(self) -> bytes:
        return peek_prefix(self.handle.value or 0, _INSTANCE_BYTES)

    def run(self, *words: int) -> _Stop:
        """Runs a few instructions, which must end in one exception."""
        # Each at its own place: the translation of an earlier one would be executed again.
        at = 0x40 * len(self.stops)
        self.page[at : at + 4 * len(words)] = struct.pack(f"<{len(words)}I", *words)
        before = len(self.stops)
        self.engine.LIB.uc_emu_start(self.handle, _CODE + at, 0, 0, 0)
        if len(self.stops) != before + 1:
            raise _fault("a stop at an exception")
        return self.stops[-1]


def _find_env(probe: _Probe) -> None:
    """The registers: X0.. at 64 bytes after the start (behind 16 AArch32 registers), then SP and PC."""
    engine, handle = probe.engine, probe.handle
    marks = [0xA5A5_0000_0000_0000 | number * 0x1111 for number in range(4)]
    for number, mark in enumerate(marks):
        engine.write_reg(handle, uc.REG_X0 + number, mark)
    for register, mark in ((uc.REG_SP, 0xA5A5_5150), (uc.REG_PC, 0xA5A5_5250)):
        engine.write_reg(handle, register, mark)
    blob = peek_prefix(probe.cpu, _CPU_BYTES)
    pattern = struct.pack("<4Q", *marks)
    found = {
        at - 64
        for at in _all(blob, pattern, 8)
        if blob[at + 248 : at + 264] == struct.pack("<2Q", 0xA5A5_5150, 0xA5A5_5250)
    }
    # The CPU object points to it.
    found = {at for at in found if struct.pack("<Q", probe.cpu + at) in blob[:at]}
    probe.env = probe.cpu + _only(found, "the registers in the CPU object")


def _context_bytes(probe: _Probe) -> int:
    """The size of the registers' structure, which `uc_context_save` copies whole: the context's first word."""
    context = c_void_p()
    probe.engine.check(probe.engine.LIB.uc_context_alloc(probe.handle, ctypes.byref(context)), "allocating a context")
    size = c_uint64.from_address(context.value or 0).value
    probe.engine.LIB.uc_context_free(context)
    return size


def _find_exception(probe: _Probe) -> tuple[int, int]:
    """(exception in env, exception_index in cpu), from two system calls, a hypercall and a fault at a known address."""
    hits: set[int] | None = None
    index: set[int] | None = None
    for number in _SVCS:
        stop = probe.run(0xD4000001 | number << 5)
        here = _all(stop.env, struct.pack("<I", 0x56000000 | number))
        hits = here if hits is None else hits & here
        index = _narrow(index, stop, _EXCP_SWI)
    at = _only(hits or set(), "the exception syndrome")
    stop = probe.run(_HVC)
    index = _narrow(index, stop, _EXCP_HVC)
    hvc = ExceptionInfo.from_buffer_copy(stop.env, at)
    if (hvc.syndrome, hvc.target_el) != (0x5A000007, 2):
        raise _fault("the target exception level")
    probe.engine.write_reg(probe.handle, uc.REG_X0 + 1, _BAD_ADDRESS)
    stop = probe.run(_LDR_X2_X1)
    index = _narrow(index, stop, _EXCP_DATA_ABORT)
    abort = ExceptionInfo.from_buffer_copy(stop.env, at)
    if (abort.syndrome >> 26, abort.vaddress, abort.target_el) != (0x25, _BAD_ADDRESS, 1):
        raise _fault("the fault address")
    return at, _only(index, "the exception number")


def _narrow(known: set[int] | None, stop: _Stop, number: int) -> set[int]:
    if stop.number != number:
        raise _fault(f"exception number {number}")
    here = _all(stop.head, struct.pack("<i", number))
    return here if known is None else known & here


def _find_stop(probe: _Probe) -> None:
    """Asking for a stop writes one flag of the instance and a few of the CPU object, the same ones each time."""
    stops = {(stop.stop_in_uc, stop.stop_in_cpu) for stop in probe.stops}
    if len(stops) != 1:
        raise _fault("one way to stop")
    in_uc, in_cpu = stops.pop()
    if [value for _, value in in_uc] != [1] or sorted(value for _, value in in_cpu) != [1, 0xFF, 0xFF]:
        raise _fault("the flags that stop the core")


def _find_vectors(probe: _Probe) -> tuple[int, int]:
    """(Z registers, P registers): 32 of 256 bytes, then 17 predicates of 32 bytes, the last of which is FFR."""
    marks = [bytes([0xC0 + number] * 16) for number in (0, 1, 31)]
    for number, mark in zip((0, 1, 31), marks, strict=True):
        cell = ctypes.create_string_buffer(mark, 16)
        error = probe.engine.LIB.uc_reg_write(probe.handle, uc.REG_Q0 + number, cell)
        probe.engine.check(error, "writing a vector register")
    blob = peek(probe.env, probe.env_bytes) or b""
    hits = {
        at
        for at in _all(blob, marks[0], 16)
        if blob[at + 256 : at + 272] == marks[1] and blob[at + 31 * 256 : at + 31 * 256 + 16] == marks[2]
    }
    z = _only(hits, "the vector registers")
    p = z + 32 * 256
    stop = probe.run(_PTRUE_P3, _SETFFR, _HVC)
    true = b"\xff\xff" + bytes(30)  # 16 bytes of vector: one bit each
    zeros = bytes(32)
    if [stop.env[p + 32 * number :][:32] for number in (0, 3, 4, 16)] != [zeros, true, zeros, true]:
        raise _fault("the predicate registers")
    return z, p


def _find_exclusive(probe: _Probe) -> int:
    """The exclusive monitor: an address and the value that was there."""
    address = _CODE + mmap.PAGESIZE
    probe.page[mmap.PAGESIZE : mmap.PAGESIZE + 8] = struct.pack("<Q", _EXCLUSIVE_VALUE)
    probe.engine.write_reg(probe.handle, uc.REG_X0 + 3, address)
    stop = probe.run(_LDXR_X6_X3, _HVC)
    at = _only(_all(stop.env, struct.pack("<2Q", address, _EXCLUSIVE_VALUE), 8), "the exclusive monitor")
    if stop.env[at + 24 : at + 152] != bytes(128):
        raise _fault("the unused registers behind the exclusive monitor")
    return at


def _find_no_exit_request(probe: _Probe) -> int:
    """A flag of the instance, four bytes that follow the context size and a 64-bit word: 0 ? [0] 1."""
    base = probe.handle.value or 0
    blob = peek_prefix(base, _INSTANCE_BYTES)
    hits = set()
    for at in _all(blob, struct.pack("<I", probe.env_bytes)):
        flags = at + 4 + 7 & ~7
        tail = blob[flags : flags + 12]
        if tail[:9] == bytes(9) and tail[10:12] == b"\0\1":
            hits.add(flags + 10)
    return _only(hits, "no_exit_request, the flag that makes stopping precise")


def _find_ids(probe: _Probe) -> tuple[int, int]:
    """(ID_AA64MMFR0 in env, the register table's pointer in env), both in the CPU object behind the registers."""
    blob = peek_prefix(probe.env, probe.env_bytes + 0x4000)
    values = [probe.engine.read_sys(probe.handle, enc) for enc in _ID_BLOCK]
    ids = _only(_all(blob, struct.pack("<7Q", *values), 8), "the ID registers")
    first = probe.env_bytes + 7 & ~7
    for at in range(first, min(first + 0x400, len(blob) - 8), 8):
        (pointer,) = struct.unpack_from("<Q", blob, at)
        table = peek(pointer, 20) if pointer > 1 << 16 and pointer % 8 == 0 else None
        if table is None:
            continue
        # GHashTable: size, mod, mask, nodes, occupied.
        size, _, mask, nodes, occupied = struct.unpack("<iiIii", table)
        if size >= 256 and size & size - 1 == 0 and mask == size - 1 and 100 < nodes <= occupied <= size:
            return ids + 32, at
    raise _fault("the table of system registers")


def _find_tlbs(probe: _Probe) -> int:
    """Twelve pairs right before the registers, at first all of one size."""
    blob = peek(probe.env - _TLB_WINDOW, _TLB_WINDOW) or b""
    for at in range(0, _TLB_WINDOW - TLBS * 16 + 1, 8):
        pairs = struct.unpack_from(f"<{2 * TLBS}Q", blob, at) if len(blob) == _TLB_WINDOW else ()
        if pairs and {*pairs[::2]} == {_TLB_MASK} and all(peek(table, _TLB_MASK + 64) for table in pairs[1::2]):
            return probe.env - _TLB_WINDOW + at - probe.cpu
    raise _fault("the translation lookaside buffers")


def _find_enter(probe: _Probe) -> int:
    """`cpu_exec_enter` in the CPU's class: it and `cpu_exec_exit` do nothing, `cpu_exec_interrupt` follows them."""
    engine = probe.engine
    known = ctypes.cast(engine.LIB.arm_cpu_exec_interrupt_aarch64, c_void_p).value or 0
    blob = peek_prefix(probe.cpu, _CPU_BYTES)
    at = _only(_all(blob, struct.pack("<Q", known), 8), "the functions of the CPU's class") - 16
    cell = c_void_p.from_address(probe.cpu + at)
    if cell.value is None or blob[at : at + 8] != blob[at + 8 : at + 16]:
        raise _fault("the function that is called at each entry")
    calls: list[int] = []
    callback, nothing = ENTER_CALLBACK(calls.append), cell.value
    cell.value = ctypes.cast(callback, c_void_p).value
    probe.run(_WFE, _HVC)
    cell.value = nothing
    if calls != [probe.cpu, probe.cpu]:  # at the start, and behind the WFE
        raise _fault("the function that is called at each entry")
    return at


@functools.cache
@undisturbed
def layout() -> Layout:
    """The layout of the loaded library, found at the first call (5 ms); EnvironmentFault if it is another one."""
    probe = _Probe()
    try:
        _find_env(probe)
        probe.env_bytes = _context_bytes(probe)
        if not 0x2800 <= probe.env_bytes <= 0x8000:
            raise _fault("the size of the registers")
        tlbs = _find_tlbs(probe)
        no_exit = _find_no_exit_request(probe)
        exception, index = _find_exception(probe)
        z, p = _find_vectors(probe)
        exclusive = _find_exclusive(probe)
        mmfr0, cp_regs = _find_ids(probe)
        _find_stop(probe)  # before a WFE, behind which the library has cleared a flag that nothing reads
        enter = _find_enter(probe)
        return Layout(
            env_in_cpu=probe.env - probe.cpu,
            exception_in_env=exception,
            exception_index_in_cpu=index,
            no_exit_request_in_uc=no_exit,
            mmfr0_in_env=mmfr0,
            z_in_env=z,
            p_in_env=p,
            exclusive_in_env=exclusive,
            spare_in_env=exclusive + 24,
            cp_regs_in_env=cp_regs,
            env_bytes=probe.env_bytes,
            tlbs_in_cpu=tlbs,
            enter_in_cpu=enter,
            stop_in_uc=probe.stops[0].stop_in_uc,
            stop_in_cpu=probe.stops[0].stop_in_cpu,
        )
    finally:
        probe.close()
