"""The stage-2 format: the golden table, and every VTCR_EL2 that real kernels were seen with."""

from __future__ import annotations

import errno
import json
import timeit
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvm2.errors import KvmError
from kvm2.softkvm.stage2_format import stage2_format, vtcr_fields

DUMPS = Path(__file__).parent.parent / "data" / "stage2"

# IPA bits: (levels, start level, SL0, PGD pages) for 4K, 16K and 64K pages
GOLDEN = {
    32: ((2, 2, 0, 4), (2, 2, 1, 1), (2, 2, 1, 1)),
    33: ((2, 2, 0, 8), (2, 2, 1, 1), (2, 2, 1, 1)),
    34: ((2, 2, 0, 16), (2, 2, 1, 1), (2, 2, 1, 1)),
    35: ((3, 1, 1, 1), (2, 2, 1, 1), (2, 2, 1, 1)),
    36: ((3, 1, 1, 1), (2, 2, 1, 1), (2, 2, 1, 1)),
    37: ((3, 1, 1, 1), (2, 2, 1, 2), (2, 2, 1, 1)),
    40: ((3, 1, 1, 2), (2, 2, 1, 16), (2, 2, 1, 1)),
    41: ((3, 1, 1, 4), (3, 1, 2, 1), (2, 2, 1, 1)),
    42: ((3, 1, 1, 8), (3, 1, 2, 1), (2, 2, 1, 1)),
    43: ((3, 1, 1, 16), (3, 1, 2, 1), (2, 2, 1, 2)),
    44: ((4, 0, 2, 1), (3, 1, 2, 1), (2, 2, 1, 4)),
    46: ((4, 0, 2, 1), (3, 1, 2, 1), (2, 2, 1, 16)),
    47: ((4, 0, 2, 1), (3, 1, 2, 1), (3, 1, 2, 1)),
    48: ((4, 0, 2, 1), (3, 1, 2, 2), (3, 1, 2, 1)),
    49: ((4, 0, 2, 2), (3, 1, 2, 4), (3, 1, 2, 1)),
    51: ((4, 0, 2, 8), (3, 1, 2, 16), (3, 1, 2, 1)),
    52: ((4, 0, 2, 16), (4, 0, 3, 1), (3, 1, 2, 1)),
}


def host(page_shift=12, parange=6, lpa2=True, vmid_bits=16, **more):
    return SimpleNamespace(
        page_shift=page_shift, parange=parange, lpa2=lpa2, vmid_bits=vmid_bits, lpa2_for=lambda shift: lpa2, **more
    )


@pytest.mark.parametrize("bits", GOLDEN)
@pytest.mark.parametrize("column", range(3))
def test_golden_table(bits, column):
    shift = (12, 14, 16)[column]
    f = stage2_format(host(shift), bits)
    assert (f.levels, f.start_level, f.sl0, f.pgd_pages) == GOLDEN[bits][column]
    assert f.concatenated == f.pgd_pages
    assert (f.t0sz, f.ipa_bits, f.page_shift) == (64 - bits, bits, shift)
    assert f.entries == 1 << f.index_bits
    assert f.index_bits + f.shift_at(f.start_level) == bits
    fields = vtcr_fields(f.vtcr)
    assert (fields["SL0"], fields["T0SZ"], fields["TG0"]) == (f.sl0, f.t0sz, 1 << shift)
    assert fields["SL2"] == 0


def recorded():
    for path in sorted(DUMPS.glob("*.json")):
        data = json.loads(path.read_text())
        for dump in data["dumps"]:
            yield pytest.param(data["page"], dump, id=f"{path.stem[7:]}-{dump['ipa']}")


@pytest.mark.parametrize(("page", "dump"), list(recorded()))
def test_recorded_vtcr(page, dump):
    fields = dump["fields"]
    machine = host(page.bit_length() - 1, fields["PS"], bool(fields["DS"]), 16 if fields["VS"] else 8)
    f = stage2_format(machine, dump["ipa"] or 40)
    assert f.vtcr == int(dump["vtcr"], 16)
    assert f.fields() == fields
    assert (f.start_level, f.entries, f.concatenated) == (dump["start"], dump["entries"], dump["concat"])
    assert (f.index_bits, f.pgd_bytes) == (dump["index_bits"], dump["pgd_bytes"])


@pytest.mark.parametrize(
    ("machine", "bits", "vtcr"),
    [
        (host(), 40, 0x1802E3558),
        (host(), 36, 0x1802E355C),
        (host(), 52, 0x1802E358C),
        (host(parange=4, lpa2=False, vmid_bits=8), 40, 0x80243558),
        (host(14), 40, 0x1802EB558),
        (host(lpa2=False), 48, 0x802D3590),
        # 64K pages, which no recorded host has: 52 bits need no LPA2, and DS is not set for them
        (host(16), 52, 0x802E758C),
        (host(16, lpa2=False), 52, 0x802E758C),
        (host(16, parange=5), 48, 0x802D7590),
        (host(parange=7), 40, 0x1802E3558),  # an encoding above what the kernel knows counts as 52 bits
    ],
)
def test_vtcr(machine, bits, vtcr):
    assert stage2_format(machine, bits).vtcr == vtcr


@pytest.mark.parametrize("shift", [12, 14, 16])
@pytest.mark.parametrize("bits", range(32, 53))
def test_core_gets_a_format_it_can_walk(shift, bits):
    f = stage2_format(host(shift), bits)
    core = vtcr_fields(f.core_vtcr)
    assert (core["DS"], core["PS"], core["T0SZ"]) == (0, 5, 64 - min(bits, 48))
    if bits <= 48:
        assert core["SL0"] == f.sl0


def test_another_granule_than_the_host_page():
    machine = host(12)
    assert stage2_format(machine, 40, 16).vtcr == stage2_format(host(16), 40).vtcr
    assert stage2_format(machine, 40, 14) == stage2_format(host(14), 40)
    only_4k = SimpleNamespace(page_shift=12, parange=6, lpa2=True, vmid_bits=16, lpa2_for=lambda shift: shift == 12)
    assert not stage2_format(only_4k, 40, 14).ds


@pytest.mark.parametrize(
    ("machine", "bits"),
    [(host(), 31), (host(), 53), (host(lpa2=False), 49), (host(parange=1), 37), (host(parange=2), 41), (host(), 0)],
)
def test_sizes_that_no_format_has(machine, bits):
    with pytest.raises(KvmError) as caught:
        stage2_format(machine, bits)
    assert caught.value.errno == errno.EINVAL
    assert str(bits) in str(caught.value)


def test_granules_that_do_not_exist():
    with pytest.raises(KvmError, match="page_shift 13"):
        stage2_format(host(), 40, 13)


@pytest.mark.parametrize(
    ("machine", "bits", "address", "bits_set"),
    [
        (host(), 52, 0x000F_1234_5678_9000, 0x0003_1234_5678_9300),
        (host(14), 52, 0x0007_1234_5678_8000, 0x0003_1234_5678_8100),
        (host(16), 52, 0x000F_1234_5678_0000, 0x0000_1234_5678_F000),
        (host(lpa2=False), 48, 0x7234_5678_9000, 0x7234_5678_9000),
    ],
)
def test_addresses_in_descriptors(machine, bits, address, bits_set):
    f = stage2_format(machine, bits)
    assert f.encode_address(address) == bits_set
    assert f.decode_address(bits_set | 0x4C3) == address


def test_addresses_that_do_not_fit():
    with pytest.raises(ValueError, match="0x1000000000000"):
        stage2_format(host(lpa2=False), 48).encode_address(1 << 48)
    with pytest.raises(ValueError, match="52 bits"):
        stage2_format(host(), 48).encode_address(1 << 52)


def test_creation_can_afford_it():
    machine = host()
    once = min(timeit.repeat(lambda: stage2_format(machine, 41), number=1000, repeat=5)) / 1000
    assert once < 10e-6
