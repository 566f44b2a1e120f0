"""The frame of an ITS: what its registers hold, and what they refuse."""

from __future__ import annotations

from kvm2.abi import its as abi
from kvm2.softkvm.vgic import its_map

from .its_guest import COLLECTIONS, DEVICES, FIRST, guest, mapc, mapd, mapti


def test_the_registers_of_a_new_its():
    with guest() as g:
        at_reset = {
            abi.GITS_CTLR: (0x8000_0000, 4),
            abi.GITS_IIDR: (0x4B00_043B, 4),
            abi.GITS_TYPER: (0x1EF71, 8),
            abi.GITS_TYPER + 4: (0, 4),
            abi.GITS_CBASER: (0, 8),
            abi.GITS_CWRITER: (0, 8),
            abi.GITS_CREADR: (0, 8),
            abi.GITS_BASER: (0x1907_0000_0000_0600, 8),
            abi.GITS_BASER + 8: (0x1C07_0000_0000_0600, 8),
            abi.GITS_BASER + 12: (0x1C07_0000, 4),
            abi.GITS_BASER + 16: (0, 8),
            0xFFE8: (0x3B, 4),
            0xFFD4: (0, 4),
            0xFFF0: (0x0D, 4),
        }
        assert {at: g.reg(at, size) for at, (_, size) in at_reset.items()} == {at: v for at, (v, _) in at_reset.items()}
        # No register, another width, not aligned: zero, and never for userspace.
        for at, size in (
            (0x10, 4),
            (0x200, 8),
            (0x10040, 4),
            (0x1FFFC, 4),
            (0, 8),
            (0, 1),
            (8, 2),
            (0x84, 8),
            (0x82, 4),
        ):
            assert g.reg(at, size) == 0
            g.set_reg(at, 0xFFFF_FFFF, size)
        assert g.reg(abi.GITS_CTLR, 4) == 0x8000_0000


def test_base_registers_keep_what_kvm_supports():
    with guest() as g:
        ones = (1 << 64) - 1
        for offset, expected in (
            (abi.GITS_BASER, 0xF907_FFFF_FFFF_FEFF),
            (abi.GITS_BASER + 8, 0xBC07_FFFF_FFFF_FEFF),
            (abi.GITS_BASER + 16, 0),
            (abi.GITS_CBASER, 0xFF1F_FFFF_FFFF_0FFF),
        ):
            g.set_reg(offset, ones)
            assert g.reg(offset) == expected
        g.set_reg(abi.GITS_BASER, 0)
        assert g.reg(abi.GITS_BASER) == 0x1907_0000_0000_0200
        g.set_reg(abi.GITS_BASER, 2 << 10)  # outer shareable: inner
        assert g.reg(abi.GITS_BASER) == 0x1907_0000_0000_0600
        g.set_reg(abi.GITS_BASER, 0x1_2345, 4)
        g.set_reg(abi.GITS_BASER + 4, 0x8000_0001, 4)
        assert g.reg(abi.GITS_BASER) == 0x9907_0001_0001_2245
        g.set_reg(abi.GITS_CBASER, abi.VALID | 0x4_F012)
        assert g.reg(abi.GITS_CBASER) == 0x9800_0000_0004_0012


def test_tables_above_48_bits():
    assert its_map.table_address(abi.VALID | 0x8765_0000 | 0xF0FF) == 0xF << 48 | 0x8765_0000
    high = 1 << 50
    with guest("lpa2-4k-52", physaddr_bits=52) as g:
        g.vm.map(high, 0x40000)
        g.start()
        g.set_reg(abi.GITS_CTLR, 0, 4)
        g.set_reg(abi.GITS_BASER, 4 << 12 | abi.VALID)
        g.set_reg(abi.GITS_BASER + 8, 4 << 12 | 0x1_0000 | abi.VALID)
        g.set_reg(abi.GITS_CBASER, high | 0x2_0000 | abi.VALID)
        g.set_reg(abi.GITS_CTLR, 1, 4)
        g.vm.write(high | 0x2_0000, mapd(5) + mapc(0) + mapti(5, 0, FIRST))
        g.configure(FIRST)
        g.set_reg(abi.GITS_CWRITER, 3 * 32)
        assert g.message(5, 0) == 1 and g.acknowledge() == FIRST
        g.control(1)
        assert g.entry(high | 0x1_0000) == abi.VALID and g.entry(high | 5 * 8) >> 63


def test_enabling_needs_tables_and_locks_the_registers():
    with guest() as g:
        g.set_reg(abi.GITS_CTLR, 1, 4)
        assert g.reg(abi.GITS_CTLR, 4) == 0x8000_0000
        g.start()
        before = [g.reg(at) for at in (abi.GITS_CBASER, abi.GITS_BASER, abi.GITS_BASER + 8)]
        for at in (abi.GITS_CBASER, abi.GITS_BASER, abi.GITS_BASER + 8, abi.GITS_TYPER, abi.GITS_CREADR):
            g.set_reg(at, 0)
        g.set_reg(abi.GITS_IIDR, 0, 4)
        assert [g.reg(at) for at in (abi.GITS_CBASER, abi.GITS_BASER, abi.GITS_BASER + 8)] == before


def test_another_table_forgets_what_was_mapped_and_the_same_one_does_not():
    with guest() as g:
        g.start()
        g.send(mapd(5), mapc(0, 0), mapc(1, 1), mapti(5, 0, FIRST))
        g.set_reg(abi.GITS_CTLR, 0, 4)
        for offset in (abi.GITS_BASER, abi.GITS_BASER + 8):
            value = g.reg(offset)
            assert value is not None
            g.set_reg(offset, value)
        assert g.lpi(FIRST) is not None and set(g.model.collections) == {0, 1}
        g.set_reg(abi.GITS_BASER + 8, COLLECTIONS | abi.VALID | 1)
        assert not g.model.collections and g.lpi(FIRST) is not None
        g.set_reg(abi.GITS_BASER, DEVICES | abi.VALID | 1)
        assert not g.model.devices and g.lpi(FIRST) is None
