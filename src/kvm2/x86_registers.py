"""An x86-64 vCPU's registers by name, over the structures that KVM gives them in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from kvm2.abi.structs_x86 import Debugregs, Dtable, Fpu, Regs, Segment, Sregs
from kvm2.errors import UsageError
from kvm2.handle import checked_word

if TYPE_CHECKING:
    from kvm2.abi.layout import Structure
    from kvm2.vcpu import Vcpu

_GENERAL = frozenset(field.name for field in Regs.LAYOUT.fields)
_SPECIAL = frozenset(field.name for field in Sregs.LAYOUT.fields) - {"interrupt_bitmap"}
_FPU = frozenset({"fcw", "fsw", "ftwx", "last_opcode", "last_ip", "last_dp", "mxcsr"})
_DEBUG = {**{f"dr{n}": n for n in range(4)}, "dr6": -1, "dr7": -1}
_XMM_BYTES = 16
_XMM = {f"xmm{n}": n for n in range(len(Fpu().xmm) // _XMM_BYTES)}
_ALLOWED = (
    "allowed are rax..r15, rip, rflags, cs ds es fs gs ss tr ldt (Segment), gdt idt (Dtable), cr0 cr2 cr3 cr4 cr8, "
    "efer, apic_base, dr0..dr3 dr6 dr7, xmm0..xmm15, mxcsr, fcw, fsw; MSRs by number are in get_msrs and set_msrs"
)


class X86Registers:
    """`vcpu.regs` on x86-64: registers as attributes or in brackets, by the names of the manuals, in lower case.

    Values are numbers; segment registers are `Segment` and descriptor tables `Dtable` of abi.structs_x86. To read is
    one ioctl and to change is two, the whole structure each time; `update` changes several of one structure at once.
    """

    __slots__ = ("_vcpu",)
    _vcpu: Vcpu

    def __init__(self, vcpu: Vcpu) -> None:
        object.__setattr__(self, "_vcpu", vcpu)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self.update(**{name: value})

    def __setitem__(self, name: str, value: Any) -> None:
        self.update(**{name: value})

    def __dir__(self) -> list[str]:
        return sorted({"update", *_GENERAL, *_SPECIAL, *_FPU, *_DEBUG, *_XMM})

    def __getitem__(self, name: str) -> Any:
        register, vcpu = _known(name), self._vcpu
        if register in _GENERAL:
            return getattr(vcpu.get_regs(), register)
        if register in _SPECIAL:
            return getattr(vcpu.get_sregs(), register)
        if register in _XMM:
            at = _XMM_BYTES * _XMM[register]
            return int.from_bytes(vcpu.get_fpu().xmm[at : at + _XMM_BYTES], "little")
        if register in _FPU:
            return getattr(vcpu.get_fpu(), register)
        found = vcpu.get_debugregs()
        return found.db[_DEBUG[register]] if _DEBUG[register] >= 0 else getattr(found, register)

    def update(self, **values: Any) -> None:
        """Change some registers and leave the others; KvmError where KVM refuses, UsageError for a name or a size."""
        wanted = {_known(name): value for name, value in values.items()}
        general, special, fpu, debug = ({n: v for n, v in wanted.items() if n in names} for names in _GROUPS)
        vcpu = self._vcpu
        for name, value in {**general, **special}.items():
            _check(name, value, Regs if name in general else Sregs)
        if special:
            vcpu.set_sregs(_changed(vcpu.get_sregs(), special))
        if general:
            vcpu.set_regs(_changed(vcpu.get_regs(), general))
        if fpu:
            vcpu.set_fpu(_changed_fpu(vcpu.get_fpu(), fpu))
        if debug:
            vcpu.set_debugregs(_changed_debug(vcpu.get_debugregs(), debug))


_GROUPS = (_GENERAL, _SPECIAL, _FPU | _XMM.keys(), _DEBUG.keys())


def _known(name: str) -> str:
    register = name.lower() if isinstance(name, str) else name
    if not any(register in names for names in _GROUPS):
        _unknown(name)
    return register


def _unknown(name: object) -> NoReturn:
    raise UnknownRegister(f"{name!r} is not a register of x86-64: {_ALLOWED}")


class UnknownRegister(UsageError, AttributeError):
    """A name that no register of x86-64 has; an AttributeError too, so that `hasattr` works."""


def _check(name: str, value: Any, kind: type[Structure]) -> None:
    field = kind.LAYOUT.at(name)
    if isinstance(field.type, type):
        if not isinstance(value, Segment | Dtable) or type(value) is not field.type:
            raise UsageError(f"{name} takes a kvm2.abi.structs_x86.{field.type.__name__}, not {value!r}")
        return
    checked_word(name, value, 8 * field.size)


def _changed(old: Any, values: dict[str, Any]) -> Any:
    """The structure with some of its fields changed."""
    return type(old)(**{field.name: getattr(old, field.name) for field in old.LAYOUT.fields} | values)


def _changed_fpu(old: Fpu, values: dict[str, Any]) -> Fpu:
    xmm, rest = bytearray(old.xmm), {}
    for name, value in values.items():
        if name in _XMM:
            at = _XMM_BYTES * _XMM[name]
            xmm[at : at + _XMM_BYTES] = checked_word(name, value, 8 * _XMM_BYTES).to_bytes(_XMM_BYTES, "little")
        else:
            _check(name, value, Fpu)
            rest[name] = value
    changed: Fpu = _changed(old, {**rest, "xmm": bytes(xmm)})
    return changed


def _changed_debug(old: Debugregs, values: dict[str, Any]) -> Debugregs:
    breakpoints, rest = list(old.db), {}
    for name, value in values.items():
        checked_word(name, value, 64)
        if _DEBUG[name] >= 0:
            breakpoints[_DEBUG[name]] = value
        else:
            rest[name] = value
    changed: Debugregs = _changed(old, {**rest, "db": tuple(breakpoints)})
    return changed
