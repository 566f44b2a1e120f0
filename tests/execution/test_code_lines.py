"""IC IVAU of what the emulator has no translation for: the page is mapped by the guest's tables, no code dropped."""

from __future__ import annotations

import struct

import pytest

from kvm2.exits import Mmio

from .rig import RAM, bench

MMIO, PAGE = 0x1000_0000, 0x20000


def test_an_untouched_page_is_mapped_and_no_code_is_forgotten():
    with bench() as b:
        vm = b.vm.backend.inspect(b.vm.fd)
        b.vcpus.append(b.vm.create_vcpu(1))  # one that is alone need not care
        b.load("ic ivau, x10\n str x1, [x3]", x10=RAM + PAGE + 0x40, x3=MMIO)
        generation = vm.code_generation
        assert vm.stage2.translate(RAM + PAGE) is None
        assert isinstance(b.vcpu.run_once(), Mmio)
        assert vm.code_generation == generation
        leaf = vm.stage2.translate(RAM + PAGE)
        assert leaf is not None and not leaf.executable and leaf.hva == b.ram.hva + PAGE


def test_addresses_without_memory_are_nothing():
    with bench() as b:
        vm = b.vm.backend.inspect(b.vm.fd)
        b.vcpus.append(b.vm.create_vcpu(1))
        generation = vm.code_generation
        exit = b.run("ic ivau, x10\n ic ivau, x11\n str x1, [x3]", x10=MMIO + 0x5000, x11=1 << 60, x3=MMIO)
        assert isinstance(exit, Mmio) and exit.address == MMIO
        assert vm.code_generation == generation


@pytest.mark.parametrize("vcpus", [1, 2])
def test_new_instructions_behind_a_line_that_is_maintained_are_executed(vcpus):
    with bench() as b:
        b.vcpus += [b.vm.create_vcpu(number) for number in range(1, vcpus)]
        text = """
            mov w9, #3                  // attempts
        1:  blr x10                     // what is there now
            add x7, x7, x0
            ldr w1, [x11], #4           // the next version
            str w1, [x10]
            dc cvau, x10
            dsb ish
            ic ivau, x10
            dsb ish
            isb
            subs w9, w9, #1
            b.ne 1b
            str x7, [x3]
        """
        versions = (0xD2800020, 0xD2800140, 0xD2800C80, 0xD2800000)  # mov x0, #1; #10; #100; #0
        b.ram.write(PAGE, versions[0].to_bytes(4, "little") + 0xD65F03C0.to_bytes(4, "little"))
        b.ram.write(2 * PAGE, b"".join(word.to_bytes(4, "little") for word in versions[1:]))
        exit = b.run(text, x10=RAM + PAGE, x11=RAM + 2 * PAGE, x3=MMIO)
        assert isinstance(exit, Mmio) and int.from_bytes(exit.data, "little") == 111


def test_a_vcpu_that_gets_company_tells_it_of_new_code():
    """It ran alone at first; then another one runs a function that it changes, with the maintenance that this needs."""
    with bench() as b:
        b.ram.write(PAGE, struct.pack("<2I", 0xD2800020, 0xD65F03C0))  # mov x0, #1; ret
        assert isinstance(b.run("str x1, [x3]", x3=MMIO), Mmio)
        other = b.vm.create_vcpu(1)
        other.init()
        b.vcpus.append(other)
        call = "nop\n blr x10\n str x0, [x3]"
        b.load(call, 0x1000, vcpu=other, x10=RAM + PAGE, x3=MMIO)
        assert other.run_once().data[0] == 1
        change = "nop\n str w1, [x10]\n dc cvau, x10\n dsb ish\n ic ivau, x10\n dsb ish\n isb\n str x1, [x3]"
        b.load(change, 0x2000, x10=RAM + PAGE, x1=0xD2800040, x3=MMIO)  # mov x0, #2
        assert isinstance(b.vcpu.run_once(), Mmio)
        other.regs.pc = RAM + 0x1000
        assert other.run_once().data[0] == 2
