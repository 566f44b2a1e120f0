"""The emulated core walks the tables of every format by `core_vtcr` and `core_vttbr`, and finds what was mapped."""

from __future__ import annotations

import ctypes
import mmap
import struct

import pytest

from kvm2.softkvm import profile
from kvm2.softkvm.cpu.core import Core
from kvm2.softkvm.cpu.state import CpuState
from kvm2.softkvm.stage2 import Stage2, stage2_format

LDR_X1_X0, STR_X1_X0_8, HVC = 0xF9400001, 0xF9000401, 0xD4000022
EL1H = 0x3C5
EC_HVC, EC_DABT = 0x16, 0x24
TRANSLATION, PERMISSION, WNR = 0x04, 0x0C, 1 << 6
CODE_IPA = 0x4000_0000
UNIT = 1 << 16  # a page of any granule


@pytest.fixture(scope="module")
def memory():
    """(address of 64K-aligned memory, function to read a word of it); page 0 is code, page 1 data."""
    size = 4 * UNIT
    area = mmap.mmap(-1, size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    base = -(-start // UNIT) * UNIT
    struct.pack_into("<3I", area, base - start, LDR_X1_X0, STR_X1_X0_8, HVC)
    yield base, lambda offset: struct.unpack_from("<Q", area, base - start + offset)[0]
    area.close()


@pytest.fixture(scope="module")
def core():
    made = Core("a72", lambda: False)
    yield made
    made.close()


def run(core, stage2, ipa):
    """What stops a guest that loads from `ipa` and stores eight bytes further: (EC, fault status, IPA)."""
    core.set_stage2(stage2.core_vtcr, stage2.core_vttbr)
    core.flush_tlb()
    core.flush_code()
    state = CpuState()
    state.pc, state.pstate, state.x[0] = CODE_IPA, EL1H, ipa
    core.load(state)
    assert core.run() == "trap", core.error
    esr = core.abort_syndrome()
    return esr >> 26, esr & (0x3C | WNR), core.hpfar()


def places(bits):
    """IPAs worth a look: both ends of what the core reaches, and around its table boundaries."""
    top = 1 << min(bits, 48)
    return sorted(
        {0, UNIT, top // 2, top - UNIT, 3 * top // 4, CODE_IPA + (1 << 25)} | ({1 << 47} if bits >= 48 else set())
    )


@pytest.mark.parametrize("bits", [*range(32, 53)])
@pytest.mark.parametrize("shift", [12, 14, 16])
def test_core_walks_every_format(core, memory, shift, bits):
    machine, (base, word) = profile.load("max-4k-6.12"), memory
    stage2 = Stage2(stage2_format(machine, bits, shift), machine)
    stage2.map(CODE_IPA, base, UNIT, writable=False, executable=True)
    if bits > 48:  # beyond the core's reach: must not disturb what it sees
        stage2.map(1 << 48, base, UNIT, writable=True)
        stage2.map((1 << bits) - UNIT, base, UNIT, writable=True)
    for number, ipa in enumerate(places(bits)):
        at = number * 16 + UNIT
        ctypes.c_uint64.from_address(base + at).value = 0x1234_0000 + number
        ipa_at = ipa + number * 16
        page = ipa_at & -stage2.format.page_size
        assert run(core, stage2, ipa_at) == (EC_DABT, TRANSLATION, page), hex(ipa)
        stage2.map(ipa, base + UNIT, UNIT, writable=False)
        assert run(core, stage2, ipa_at) == (EC_DABT, PERMISSION | WNR, page), hex(ipa)
        assert word(at + 8) != 0x1234_0000 + number
        stage2.map(ipa, base + UNIT, UNIT, writable=True)
        assert run(core, stage2, ipa_at)[0] == EC_HVC, hex(ipa)
        assert word(at + 8) == 0x1234_0000 + number
        stage2.unmap(ipa, UNIT)
        assert run(core, stage2, ipa_at) == (EC_DABT, TRANSLATION, page), hex(ipa)
        ctypes.c_uint64.from_address(base + at + 8).value = 0
    stage2.close()


@pytest.mark.parametrize(("host", "shift"), [("max-4k-6.12", 12), ("max-16k-6.12", 14), ("cortex-a57-4k", 12)])
def test_core_reads_blocks(core, memory, host, shift):
    machine, (base, word) = profile.load(host), memory
    stage2 = Stage2(stage2_format(machine, 40, shift), machine)
    block = stage2.format.block_size
    low = base & -block  # of the block that the memory lies in, nothing else is touched
    stage2.map(CODE_IPA, base, UNIT, writable=False, executable=True)
    stage2.map(4 * block, low, block, writable=True)
    ipa = 4 * block + base - low + UNIT
    ctypes.c_uint64.from_address(base + UNIT).value = 0x5678
    assert run(core, stage2, ipa)[0] == EC_HVC
    assert word(UNIT + 8) == 0x5678
    stage2.close()
