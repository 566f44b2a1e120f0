"""IC IVAU of what the emulator has no translation for: the page is mapped by the guest's tables, no code dropped."""

from __future__ import annotations

from kvm2.exits import Mmio

from .rig import RAM, bench

MMIO, PAGE = 0x1000_0000, 0x20000


def test_an_untouched_page_is_mapped_and_no_code_is_forgotten():
    with bench() as b:
        vm = b.vm.backend.inspect(b.vm.fd)
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
        generation = vm.code_generation
        exit = b.run("ic ivau, x10\n ic ivau, x11\n str x1, [x3]", x10=MMIO + 0x5000, x11=1 << 60, x3=MMIO)
        assert isinstance(exit, Mmio) and exit.address == MMIO
        assert vm.code_generation == generation


def test_new_instructions_behind_a_line_that_is_maintained_are_executed():
    """The code lies in a page that another alias of the guest's has written, with nothing translated there yet."""
    with bench() as b:
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
