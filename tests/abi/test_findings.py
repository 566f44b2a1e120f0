"""Findings: the record's bytes, what a person reads, which field is meant."""

import errno

import pytest

from kvm2.abi.findings import NO_ATTR, Finding, path_of, read_records

DEFAULT_SIZE = Finding(
    NO_ATTR, 2, errno.EOPNOTSUPP, 4, 40, 32, 36, 0x1F << 32,
    "physaddr_bits = 40 (default): this host allows 32..36 (PARange 0b0001)",
)  # fmt: skip


def test_what_a_person_reads():
    assert str(DEFAULT_SIZE) == (
        "physaddr_bits = 40 (default): this host allows 32..36 (PARange 0b0001); ask for 36 or fewer, or use 'auto'"
    )


def test_record_is_192_bytes_with_every_number():
    data = DEFAULT_SIZE.record()
    assert len(data) == 192
    assert data[:16].hex() == "ffffffff020000005f00000004000000"
    assert [int.from_bytes(data[i : i + 8], "little") for i in (16, 24, 32, 40)] == [40, 32, 36, 0x1F << 32]
    assert data[48:].rstrip(b"\0").decode() == DEFAULT_SIZE.message
    assert Finding.from_record(data) == DEFAULT_SIZE


def test_a_long_message_is_cut_and_stays_terminated():
    data = Finding(0, 2, 22, 4, message="x" * 500).record()
    assert data[48:191] == b"x" * 143
    assert data[191] == 0


def test_a_message_that_is_not_ascii_stays_readable():
    assert Finding(0, 2, 22, 4, message="größe").record()[48:53] == b"gr??e"


def test_numbers_of_64_bits_survive():
    finding = Finding(3, 7, errno.EOPNOTSUPP, 8, (1 << 64) - 1, 1 << 63, (1 << 64) - 1, 1)
    assert Finding.from_record(finding.record()) == finding


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ((0, 2, 4), "attrs[0].physaddr_bits"),
        ((1, 1, 8), "attrs[1].capabilities[0]"),
        ((1, 1, 24), "attrs[1].capabilities[2]"),
        ((5, 7, 16), "attrs[5].vls[1]"),
        ((2, 8, 12), "attrs[2].pad"),
        ((2, 99, 6), "attrs[2].flags"),
        ((4, 0, 0), "attrs[4]"),
        ((2, 9, 24), "attrs[2].byte 24"),
        ((NO_ATTR, 2, 4), "physaddr_bits"),
        ((NO_ATTR, 0, 4), "nr_attrs"),
        ((NO_ATTR, 0, 6), "pad"),
        ((NO_ATTR, 0, 8), "attrs"),
    ],
)
def test_path(where, path):
    assert path_of(*where) == path


def test_notes_are_not_errors():
    note = Finding(0, 99, 0, 0, message="type = 99: skipped")
    assert not note.is_error
    assert note.name == "note"
    assert DEFAULT_SIZE.is_error and DEFAULT_SIZE.name == "EOPNOTSUPP"


def test_read_records_takes_what_was_written():
    area = DEFAULT_SIZE.record() + Finding(0, 9, 22, 12).record()
    assert len(read_records(area, count=5, capacity=2)) == 2
    assert len(read_records(area, count=1, capacity=2)) == 1
    assert read_records(area, 0, 2) == ()


def test_to_dict_is_whole():
    said = DEFAULT_SIZE.to_dict()
    assert said["error"] == "EOPNOTSUPP" and said["path"] == "physaddr_bits" and said["max"] == 36
    assert said["hint"] == "ask for 36 or fewer, or use 'auto'"


@pytest.mark.parametrize(
    ("finding", "hint"),
    [
        (Finding(0, 2, errno.EOPNOTSUPP, 4, 40, 52, 52), "ask for 52, or use 'auto'"),
        (Finding(0, 9, errno.EOPNOTSUPP, 8, 600, 1, 512), "ask for 512 or fewer"),
        (Finding(0, 8, errno.EOPNOTSUPP, 8, 14, 12, 16, 1 << 12 | 1 << 16), "ask for one of 12, 16"),
        (Finding(0, 1, errno.EOPNOTSUPP, 8, 5, 0, 2, 2), "leave out bits 0x5"),
        (Finding(0, 7, errno.EOPNOTSUPP, 8, 5), "ask for no SVE"),
        (Finding(1, 9, errno.EEXIST, 0, 9), "give each attribute once"),
        (Finding(NO_ATTR, 0, errno.EOPNOTSUPP, 0, 1), "use version 0"),
    ],
)
def test_hints(finding, hint):
    assert finding.hint == hint


def test_only_types_with_flags_are_told_of_skip_unknown():
    assert "SKIP_UNKNOWN" in Finding(0, 99, errno.ENOENT, 0, 99).hint
    assert "SKIP_UNKNOWN" not in Finding(0, 2, errno.ENOENT, 0, 2).hint
    assert "SKIP_UNKNOWN" not in Finding(0, 0, errno.ENOENT, 0, 0).hint
