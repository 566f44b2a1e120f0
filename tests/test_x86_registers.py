"""x86-64 registers by name, over a backend that keeps the structures."""

import ctypes

import pytest

from kvm2.abi import ioctls_x86 as x86
from kvm2.abi.structs_x86 import Debugregs, Dtable, Fpu, Regs, Segment, Sregs
from kvm2.errors import UsageError
from kvm2.kvm import Kvm
from kvm2.x86_registers import X86Registers

CALLS = {
    Regs: (x86.KVM_GET_REGS, x86.KVM_SET_REGS),
    Sregs: (x86.KVM_GET_SREGS, x86.KVM_SET_SREGS),
    Fpu: (x86.KVM_GET_FPU, x86.KVM_SET_FPU),
    Debugregs: (x86.KVM_GET_DEBUGREGS, x86.KVM_SET_DEBUGREGS),
}


@pytest.fixture
def vcpu(fake):
    fake.arch = "x86_64"
    for kind, (get, put) in CALLS.items():
        held = ctypes.create_string_buffer(bytes(i * 7 % 251 for i in range(kind.SIZE)), kind.SIZE)
        fake.answers[get] = lambda fd, arg, held=held, kind=kind: ctypes.memmove(arg, held, kind.SIZE) and 0
        fake.answers[put] = lambda fd, arg, held=held, kind=kind: ctypes.memmove(held, arg, kind.SIZE) and 0
    with Kvm(fake, "fake") as host:
        yield host.create_vm().create_vcpu()


SPECIAL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base", "dr0", "dr3", "dr6", "dr7")
WORDS = [field.name for field in Regs.LAYOUT.fields] + list(SPECIAL)


@pytest.mark.parametrize("name", [*WORDS, "RAX", "Cr3"])
def test_a_register_changes_alone(vcpu, name):
    structures = (vcpu.get_regs, vcpu.get_sregs, vcpu.get_fpu, vcpu.get_debugregs)
    before = [get() for get in structures]
    vcpu.regs[name] = 0x1122334455667788
    assert vcpu.regs[name] == getattr(vcpu.regs, name) == 0x1122334455667788
    changed = [
        (field.name, index)
        for get, old in zip(structures, before, strict=True)
        for field in old.LAYOUT.fields
        for index in [old.LAYOUT.fields.index(field)]
        if getattr(get(), field.name) != getattr(old, field.name)
    ]
    assert len(changed) == 1 and changed[0][0] in (name.lower(), "db")


def test_segments_tables_and_the_fpu(vcpu):
    vcpu.regs.cs = Segment(0x1000, 0xFFFF, 8, type=11, present=1, s=1)
    vcpu.regs.gdt = Dtable(0x5000, 31)
    vcpu.regs.xmm15 = 1 << 127
    vcpu.regs.mxcsr = 0x1F80
    assert vcpu.regs.cs.base == 0x1000 and vcpu.regs.gdt == Dtable(0x5000, 31)
    assert vcpu.regs.xmm15 == 1 << 127 and vcpu.regs.mxcsr == 0x1F80 and vcpu.get_fpu().xmm[-1] == 0x80


def test_update_changes_several_with_one_call_for_each_structure(vcpu, fake):
    fake.calls.clear()
    vcpu.regs.update(rax=1, rbx=2, cr3=3, cr4=4, dr0=5)
    assert (vcpu.regs.rax, vcpu.regs.rbx, vcpu.regs.cr3, vcpu.regs.cr4, vcpu.regs.dr0) == (1, 2, 3, 4, 5)
    assert [request for _, request, _ in fake.calls][:6].count(x86.KVM_SET_SREGS) == 1


def test_a_wrong_register_is_never_silent(vcpu, fake):
    fake.calls.clear()
    for name in ("pc", "x0", "eax", "xmm16", "dr4", "interrupt_bitmap", ""):
        with pytest.raises(UsageError, match="not a register of x86-64"):
            vcpu.regs[name] = 0
        with pytest.raises(AttributeError):
            getattr(vcpu.regs, name)
    assert not hasattr(vcpu.regs, "pc") and "rip" in dir(vcpu.regs)
    for name, value in (
        ("rax", 1 << 64),
        ("rax", -1),
        ("rip", "0"),
        ("cs", 8),
        ("cs", Dtable()),
        ("gdt", Segment()),
        ("cr0", None),
        ("xmm0", 1 << 128),
        ("mxcsr", 1 << 32),
        ("dr7", 1 << 64),
    ):
        with pytest.raises(UsageError, match=r"allowed|takes a"):
            vcpu.regs[name] = value
    assert not [call for call in fake.calls if call[1] in (x86.KVM_SET_REGS, x86.KVM_SET_SREGS, x86.KVM_SET_FPU)]
    assert isinstance(vcpu.regs, X86Registers)
