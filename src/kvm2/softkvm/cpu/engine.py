"""Unicorn's C library, called directly: the few functions that the core uses, with their types declared once.

The `unicorn` package is not imported (that alone costs 80 ms); its shared library is loaded from where the package
lies. `LIB` calls release the interpreter lock, `FAST` calls keep it: those take well under a microsecond, and giving
the lock up there would only invite another thread to hold up the guest.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final

from kvm2.errors import EnvironmentFault

VERSION: Final = (2, 1, 4)

ARCH_ARM64: Final = 2
MODEL_A72: Final = 2
MODEL_MAX: Final = 3
PROT_READ, PROT_WRITE, PROT_EXEC, PROT_ALL = 1, 2, 4, 7
HOOK_INTR: Final = 1 << 0
HOOK_TLB_FILL: Final = 1 << 17
MEM_READ, MEM_WRITE, MEM_FETCH = 16, 17, 18
TLB_VIRTUAL: Final = 1
ERR_EXCEPTION: Final = 21

# Register numbers of `enum uc_arm64_reg`.
REG_SP, REG_Q0, REG_X0, REG_PC, REG_PSTATE = 4, 104, 199, 260, 265
REG_ELR_EL1, REG_SP_EL0, REG_SP_EL1, REG_CP, REG_FPCR, REG_FPSR = 267, 270, 271, 290, 291, 292

_WRITE: Final = 1
_CTL_PAGE_SIZE, _CTL_USE_EXITS, _CTL_CPU_MODEL = 1, 4, 7
_CTL_TB_FLUSH, _CTL_TLB_FLUSH, _CTL_TLB_TYPE, _CTL_TCG_BUFFER_SIZE = 10, 11, 12, 13

# The instance, the exception's number and the user's pointer come in; only the first is taken.
INTR_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p)


class CpReg(ctypes.Structure):
    """`uc_arm64_cp_reg`: a system register by its encoding, and its value."""

    _fields_ = [(name, c_uint32) for name in ("crn", "crm", "op0", "op1", "op2")] + [("value", c_uint64)]

    @classmethod
    def of(cls, enc: int, value: int = 0) -> CpReg:
        """The request for the register with encoding `op0<<14 | op1<<11 | crn<<7 | crm<<3 | op2`."""
        return cls(enc >> 7 & 15, enc >> 3 & 15, enc >> 14 & 3, enc >> 11 & 7, enc & 7, value)


class TlbEntry(ctypes.Structure):
    """`uc_tlb_entry`: what a TLB_FILL hook answers."""

    _fields_ = [("paddr", c_uint64), ("perms", c_uint32)]


FILL_CALLBACK = ctypes.CFUNCTYPE(c_uint8, c_void_p, c_uint64, c_uint32, c_void_p, c_void_p)

# name: (argument types, result); functions without the uc_ prefix are internals that the library exports.
_SIGNATURES: Final[dict[str, tuple[list[Any], Any]]] = {
    "uc_version": ([POINTER(c_uint32), POINTER(c_uint32)], c_uint32),
    "uc_strerror": ([c_int], c_char_p),
    "uc_open": ([c_int, c_int, POINTER(c_void_p)], c_int),
    "uc_close": ([c_void_p], c_int),
    "uc_ctl": ([c_void_p, c_int], c_int),
    "uc_mem_map_ptr": ([c_void_p, c_uint64, c_uint64, c_uint32, c_void_p], c_int),
    "uc_vmem_translate": ([c_void_p, c_uint64, c_uint32, POINTER(c_uint64)], c_int),
    "uc_vmem_read": ([c_void_p, c_uint64, c_uint32, c_void_p, c_size_t], c_int),
    "uc_hook_add": ([c_void_p, POINTER(c_size_t), c_int, c_void_p, c_void_p, c_uint64, c_uint64], c_int),
    "uc_emu_start": ([c_void_p, c_uint64, c_uint64, c_uint64, c_size_t], c_int),
    "uc_emu_stop": ([c_void_p], c_int),
    "uc_reg_read": ([c_void_p, c_int, c_void_p], c_int),
    "uc_reg_write": ([c_void_p, c_int, c_void_p], c_int),
    "uc_reg_read_batch": ([c_void_p, POINTER(c_int), POINTER(c_void_p), c_int], c_int),
    "uc_reg_write_batch": ([c_void_p, POINTER(c_int), POINTER(c_void_p), c_int], c_int),
    "uc_context_alloc": ([c_void_p, POINTER(c_void_p)], c_int),
    "uc_context_save": ([c_void_p, c_void_p], c_int),
    "uc_context_size": ([c_void_p], c_size_t),
    "uc_context_free": ([c_void_p], c_int),
    "qemu_get_cpu_aarch64": ([c_void_p, c_int], c_void_p),
    "arm_cpu_do_interrupt_aarch64": ([c_void_p], None),
    "arm_cpu_exec_interrupt_aarch64": ([c_void_p, c_int], ctypes.c_bool),
    "arm_rebuild_hflags_aarch64": ([c_void_p], None),
    "tb_invalidate_phys_range_aarch64": ([c_void_p, c_uint64, c_uint64], None),
    "tb_exec_unlock_aarch64": ([c_void_p], None),
    "tb_exec_lock_aarch64": ([c_void_p], None),
    "get_arm_cp_reginfo_aarch64": ([c_void_p, c_uint32], c_void_p),
    "tlb_vaddr_to_host_aarch64": ([c_void_p, c_uint64, c_int, c_int], c_void_p),
    "arm_mmu_idx_aarch64": ([c_void_p], c_int),
    "tlb_flush_page_aarch64": ([c_void_p, c_uint64], None),
    "get_phys_addr_aarch64": (
        [c_void_p, c_uint64, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p],
        ctypes.c_bool,
    ),
    "define_one_arm_cp_reg_with_opaque_aarch64": ([c_void_p, c_void_p, c_void_p], None),
}


class Engine:
    """The loaded library: `LIB` releases the interpreter lock during a call, `FAST` does not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.LIB = ctypes.CDLL(str(path))
        # The same library once more, with calls that keep the interpreter lock.
        self.FAST = ctypes.PyDLL(str(path))
        for library in (self.LIB, self.FAST):
            for name, (arguments, result) in _SIGNATURES.items():
                try:
                    function = getattr(library, name)
                except AttributeError:
                    raise EnvironmentFault(
                        f"the emulated core needs the function {name}, and {path} does not export it; "
                        "install the official wheel: pip install unicorn==2.1.4"
                    ) from None
                function.argtypes = arguments
                function.restype = result

    def check(self, error: int, doing: str) -> None:
        """Raise `EnvironmentFault` for a Unicorn error code."""
        if error:
            text = self.LIB.uc_strerror(error).decode()
            raise EnvironmentFault(f"the emulated core failed while {doing}: {text} (Unicorn error {error})")

    def open(self, model: int, tcg_buffer: int, page_size: int = 4096) -> c_void_p:
        """A new Unicorn instance of an arm64 CPU model, with nothing mapped."""
        handle = c_void_p()
        self.check(self.LIB.uc_open(ARCH_ARM64, 0, ctypes.byref(handle)), "creating an arm64 instance")
        for control, value in (
            (_CTL_CPU_MODEL, model),
            (_CTL_PAGE_SIZE, page_size),
            (_CTL_TCG_BUFFER_SIZE, tcg_buffer),
            (_CTL_USE_EXITS, 1),
        ):
            self.control(handle, control, value)
        return handle

    def control(self, handle: c_void_p, control: int, value: int | None = None) -> None:
        """`uc_ctl` with a write request of one argument or none."""
        if value is None:
            error = self.LIB.uc_ctl(handle, c_int(control | _WRITE << 30))
        else:
            error = self.LIB.uc_ctl(handle, c_int(control | 1 << 26 | _WRITE << 30), c_uint32(value))
        self.check(error, f"setting control {control}")

    def flush_tlb(self, handle: c_void_p) -> None:
        """Forget every cached translation of addresses."""
        self.FAST.uc_ctl(handle, c_int(_CTL_TLB_FLUSH | _WRITE << 30))

    def flush_code(self, handle: c_void_p) -> None:
        """Forget every translated block of guest code."""
        self.FAST.uc_ctl(handle, c_int(_CTL_TB_FLUSH | _WRITE << 30))

    def virtual_tlb(self, handle: c_void_p) -> None:
        """Let a TLB_FILL hook translate addresses instead of the core's own walker."""
        self.control(handle, _CTL_TLB_TYPE, TLB_VIRTUAL)

    def hook(self, handle: c_void_p, kind: int, callback: Any) -> None:
        """Install a hook for every address; the caller keeps `callback` alive."""
        hook = c_size_t()
        pointer = ctypes.cast(callback, c_void_p)
        self.check(self.LIB.uc_hook_add(handle, ctypes.byref(hook), kind, pointer, None, 1, 0), "adding a hook")

    def read_reg(self, handle: c_void_p, register: int) -> int:
        """One 64-bit register by its Unicorn number."""
        value = c_uint64()
        self.check(self.FAST.uc_reg_read(handle, register, ctypes.byref(value)), f"reading register {register}")
        return value.value

    def write_reg(self, handle: c_void_p, register: int, value: int) -> None:
        """One 64-bit register by its Unicorn number."""
        cell = c_uint64(value)
        self.check(self.FAST.uc_reg_write(handle, register, ctypes.byref(cell)), f"writing register {register}")

    def read_sys(self, handle: c_void_p, enc: int) -> int:
        """A system register by its encoding."""
        request = CpReg.of(enc)
        error = self.FAST.uc_reg_read(handle, REG_CP, ctypes.byref(request))
        self.check(error, f"reading system register {enc:#06x}")
        return int(request.value)

    def write_sys(self, handle: c_void_p, enc: int, value: int) -> None:
        """A system register by its encoding; also recomputes the core's cached flags."""
        request = CpReg.of(enc, value)
        error = self.FAST.uc_reg_write(handle, REG_CP, ctypes.byref(request))
        self.check(error, f"writing system register {enc:#06x}")


def _library_path() -> Path:
    spec = importlib.util.find_spec("unicorn")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for pattern in ("libunicorn.so*", "libunicorn*.dylib"):
            found = sorted((Path(folder) / "lib").glob(pattern))
            if found:
                return found[0]
    raise EnvironmentFault(
        "the software KVM's emulated core is Unicorn 2.1.4, which is not installed here (or has no Linux or macOS "
        "library); install it with: pip install unicorn==2.1.4"
    )


@functools.cache
def engine() -> Engine:
    """The library, loaded and its version checked once per process."""
    loaded = Engine(_library_path())
    version = loaded.LIB.uc_version(None, None)
    found = (version >> 24 & 0xFF, version >> 16 & 0xFF, version >> 8 & 0xFF)
    if found != VERSION:
        want = ".".join(map(str, VERSION))
        raise EnvironmentFault(
            f"the emulated core was checked with Unicorn {want}, and {loaded.path} is version "
            f"{'.'.join(map(str, found))}; install the checked one: pip install unicorn=={want}"
        )
    return loaded
