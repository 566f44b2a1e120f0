"""Accesses to no memory: what userspace is told, and what the guest gets back."""

from __future__ import annotations

import errno

import pytest

from kvm2.errors import KvmError
from kvm2.exits import Interrupted, Mmio, Nisv, SystemEvent

from .rig import RAM, bench

DEVICE = 0x0A00_0000
VALUE = 0x8182_8384_8586_8788
ALL = (1 << 64) - 1
LOADS = [  # instruction, bytes, what arrives in the 64-bit register
    ("ldrb w13, [x1]", 1, 0x88),
    ("ldrh w13, [x1]", 2, 0x8788),
    ("ldr w13, [x1]", 4, 0x8586_8788),
    ("ldr x13, [x1]", 8, VALUE),
    ("ldrsb w13, [x1]", 1, 0xFFFF_FF88),
    ("ldrsb x13, [x1]", 1, ALL - 0x77),
    ("ldrsh w13, [x1]", 2, 0xFFFF_8788),
    ("ldrsh x13, [x1]", 2, ALL - 0x7877),
    ("ldrsw x13, [x1]", 4, ALL - 0x7A79_7877),
    ("ldar w13, [x1]", 4, 0x8586_8788),
    ("ldurh w13, [x1]", 2, 0x8788),
]
STORES = [("strb w2, [x1]", 1), ("strh w2, [x1]", 2), ("str w2, [x1]", 4), ("str x2, [x1]", 8), ("stlr x2, [x1]", 8)]
# SYSTEM_OFF, whose result goes into x0 to x3.
OFF = "\n mov w0, #8\n movk w0, #0x8400, lsl #16\n hvc #0"
BIG = "mrs x9, sctlr_el1\n orr x9, x9, #(1 << 25)\n msr sctlr_el1, x9\n isb\n"
# On the last the core's translation is done in Python, as its RAM lies above 48 bits.
HOSTS = [("cortex-a57-4k", RAM, 44), ("max-16k-6.12", RAM, 48), ("lpa2-4k-52", 1 << 50, 52)]


def swapped(value, size):
    return int.from_bytes(value.to_bytes(size, "big"), "little")


@pytest.mark.parametrize(("host", "ram", "bits"), HOSTS)
@pytest.mark.parametrize("big", [False, True], ids=["little", "big"])
def test_loads(host, ram, bits, big):
    with bench(host, ram, vm_of=lambda kvm: kvm.create_vm2(physaddr_bits=bits)) as b:
        for text, size, expected in LOADS:
            exit = b.run(f"{BIG if big else ''}{text}{OFF}", x1=DEVICE + 0x18, x13=ALL)
            assert isinstance(exit, Mmio)
            assert (exit.address, exit.size, exit.is_write) == (DEVICE + 0x18, size, False)
            answer = VALUE & (1 << 8 * size) - 1
            exit.reply(swapped(answer, size) if big else answer)
            assert isinstance(b.vcpu.run_once(), SystemEvent)
            assert b.vcpu.regs.x13 == expected, text
            b.vcpu.init()


@pytest.mark.parametrize(("host", "ram", "bits"), HOSTS)
@pytest.mark.parametrize("big", [False, True], ids=["little", "big"])
def test_stores(host, ram, bits, big):
    with bench(host, ram, vm_of=lambda kvm: kvm.create_vm2(physaddr_bits=bits)) as b:
        for text, size in STORES:
            exit = b.run(f"{BIG if big else ''}{text}{OFF}", x1=DEVICE, x2=VALUE)
            assert (exit.address, exit.size, exit.is_write) == (DEVICE, size, True)
            value = VALUE & (1 << 8 * size) - 1
            assert exit.data == value.to_bytes(size, "big" if big else "little")
            assert isinstance(b.vcpu.run_once(), SystemEvent)
            b.vcpu.init()


def test_zero_register():
    with bench() as b:
        exit = b.run(f"str xzr, [x1]\n ldr xzr, [x1, #8]{OFF}", x1=DEVICE)
        assert exit.is_write and exit.data == bytes(8)
        exit = b.vcpu.run_once()
        assert (exit.address, exit.is_write) == (DEVICE + 8, False)
        exit.reply(VALUE)
        assert isinstance(b.vcpu.run_once(), SystemEvent)


NISV = [
    "ldp x13, x4, [x1]",
    "stp x13, x4, [x1]",
    "ldr q0, [x1]",
    "str x2, [x1], #8",
    "ldxr x13, [x1]",
    "ld1 {v0.16b}, [x1]",
]


@pytest.mark.parametrize("text", NISV)
def test_no_valid_syndrome(text):
    """ENOSYS, or an exit of its own where userspace asked for one; PC stays at the access."""
    fpen = "mov x9, #(3 << 20)\n msr cpacr_el1, x9\n isb\n"
    with bench() as b:
        with pytest.raises(KvmError) as refused:
            b.run(fpen + text, x1=DEVICE)
        assert refused.value.errno == errno.ENOSYS
        pc = b.vcpu.regs.pc
        assert b.vm.enable_cap("ARM_NISV_TO_USER") == 0
        exit = b.vcpu.run_once()
        assert isinstance(exit, Nisv) and exit.fault_ipa == DEVICE
        assert bool(exit.esr_iss & 1 << 6) == text.startswith("st")
        assert b.vcpu.regs.pc == pc
        b.vcpu.regs.pc = pc + 4
        b.vcpu.kick()
        assert isinstance(b.vcpu.run_once(), Interrupted)


def test_slot_edges():
    """The last bytes of a slot are memory, the first behind it are not; an access over the edge is not emulated."""
    end = 0x4010_0000
    with bench() as b:
        exit = b.run(f"str x2, [x1, #-8]\n ldr x13, [x1, #-8]\n str x2, [x1]{OFF}", x1=end, x2=VALUE)
        assert (exit.address, exit.is_write, b.vcpu.regs.x13) == (end, True, VALUE)
        assert isinstance(b.vcpu.run_once(), SystemEvent)
        b.vcpu.init()
        exit = b.run(f"ldr x13, [x1, #8]{OFF}", x1=RAM - 16)  # below the slot
        assert exit.address == RAM - 8
        exit.reply(0)
        assert isinstance(b.vcpu.run_once(), SystemEvent)


def test_the_last_addresses_of_the_ipa_space():
    with bench(vm_of=lambda kvm: kvm.create_vm2(physaddr_bits=36)) as b:
        exit = b.run(f"str w2, [x1]{OFF}", x1=(1 << 36) - 4, x2=7)
        assert (exit.address, exit.value) == ((1 << 36) - 4, 7)


def test_a_read_only_slot():
    """Reads and instruction fetches are memory, writes leave as MMIO and change nothing."""
    with bench() as b:
        rom = b.vm.map(0x5000_0000, 0x10000, readonly=True)
        rom.write(0, (0x1234).to_bytes(8, "little") + bytes.fromhex("c0035fd6"))  # ret
        text = f"ldr x13, [x1]\n add x4, x1, #8\n blr x4\n str x2, [x1]\n ldr x5, [x1]{OFF}"
        exit = b.run(text, x1=0x5000_0000, x2=9)
        assert (exit.address, exit.value, exit.is_write) == (0x5000_0000, 9, True)
        assert isinstance(b.vcpu.run_once(), SystemEvent)
        assert b.vcpu.regs.x13 == b.vcpu.regs.x5 == 0x1234


def test_registers_may_change_before_the_answer_is_used():
    """The answer lands when KVM_RUN goes on, also when the VMM looked at registers and wrote others meanwhile."""
    with bench() as b:
        exit = b.run(f"ldr x13, [x1]{OFF}", x1=DEVICE)
        assert b.vcpu.regs.x13 != 77
        pc = b.vcpu.regs.pc
        b.vcpu.regs.x7 = 5
        exit.reply(77)
        b.vcpu.kick()  # completes the access, then ends with EINTR
        assert isinstance(b.vcpu.run_once(), Interrupted)
        assert (b.vcpu.regs.x13, b.vcpu.regs.x7, b.vcpu.regs.pc) == (77, 5, pc + 4)
        assert isinstance(b.vcpu.run_once(), SystemEvent)
