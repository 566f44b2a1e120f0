"""Plans: the size a map needs, and what each host says to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvm2.lab.plan import HostPlan, plan
from kvm2.memorymap import parse_memory_map
from kvm2.softkvm.profile import load


def ask(host: str, *memory: str, granule: int | None = None) -> HostPlan:
    return plan(parse_memory_map(memory), [load(host)], granule).hosts[0]


@pytest.mark.parametrize(
    ("memory", "bits"),
    [
        (["512M@1G"], 32),
        (["4K@0"], 32),
        (["4G@0"], 32),
        (["4K@4G"], 33),
        (["3G@1G"], 32),
        (["3G@1G", "4K@4G"], 33),
        (["512M@1G", "64G@1T"], 41),
        (["1G@63G"], 36),
        (["4K@64G"], 37),
        (["1T@0"], 40),
        (["4K@1T"], 41),
        (["4K@0xffffffffff000"], 52),
    ],
)
def test_the_smallest_size(memory: list[str], bits: int) -> None:
    assert plan(parse_memory_map(memory), []).ipa_bits == bits


def test_the_last_byte_may_be_the_limit() -> None:
    assert ask("apple-m1", "1G@63G").fits
    refused = ask("apple-m1", "16K@64G")
    assert not refused.fits and refused.ipa_bits is None and refused.tables is None
    assert refused.reasons == ("the memory needs 37 bits, this host has 36 (PARange)",)


def test_why_48() -> None:
    assert "PARange 52, but 48 without LPA2 or 64K pages" in ask("max-4k-nolpa2", "4K@256T").reasons[0]
    assert ask("armv9-64k-52", "64K@256T").fits


def test_the_default() -> None:
    assert ask("graviton2", "512M@1G").default_fits
    assert not ask("graviton2", "4K@1T").default_fits  # 41 bits
    m1 = ask("apple-m1", "512M@1G")
    assert m1.fits and not m1.default_fits and m1.ipa_bits == 32  # 40 is more than its limit


def test_alignment() -> None:
    assert ask("graviton2", "4K@4K").fits
    answer = ask("apple-m1", "4K@4K")
    assert [("16K" in reason, "0x1000" in reason) for reason in answer.reasons] == [(True, True)] * 2
    assert "the address" in answer.reasons[0] and "the size" in answer.reasons[1]
    assert not ask("jetson-xavier", "16K@64K").fits and ask("jetson-xavier", "64K@64K").fits
    assert not ask("graviton2", "4095@0").fits


def test_granules() -> None:
    assert ask("graviton2", "64K@64K", granule=16).tables.granule == 16  # type: ignore[union-attr]
    assert "multiple of 64K" in ask("graviton2", "4K@64K", granule=16).reasons[0]
    assert "multiple of 16K" in ask("apple-m1", "4K@16K", granule=12).reasons[0]  # the host page is the larger
    assert ask("apple-m1", "64K@0", granule=16).reasons == ("no stage-2 granule of 64K: it has 4K, 16K",)
    assert "needs KVM_CREATE_VM2" in ask("mainline-6.12", "64K@0", granule=16).reasons[0]
    assert ask("vm2-fixed-only", "64K@0", granule=12).call == "KVM_CREATE_VM"
    assert not ask("vm2-fixed-only", "64K@0", granule=14).fits
    assert ask("lpa2-4k-52", "64K@256T", granule=16).fits


def test_how_to_ask(tmp_path: Path) -> None:
    assert (ask("graviton2", "4K@1T").call, ask("graviton2", "4K@1T").type) == ("KVM_CREATE_VM2", None)
    assert (ask("mainline-6.12", "4K@1T").call, ask("mainline-6.12", "4K@1T").type) == ("KVM_CREATE_VM", 41)
    words = {"ps": (42, 0b1011), "enum": (42, 3), "delta5": (41, 1), "delta": (42, 1), "log2": (41, 41)}
    for word, (bits, value) in words.items():
        path = tmp_path / f"{word}.toml"
        path.write_text(f'base = "type-{word}"\ncreate_vm2 = 0')
        answer = ask(str(path), "4K@1T")
        assert (answer.ipa_bits, answer.type) == (bits, value)


def test_a_word_that_cannot_say_it(tmp_path: Path) -> None:
    path = tmp_path / "v3.toml"
    path.write_text('base = "type-log2-v3"\ncreate_vm2 = 0')
    answer = ask(str(path), "4K@1T")
    assert not answer.fits and "its only way to ask is the type word 'log2-v3'" in answer.reasons[0]
    assert ask(str(path), "512M@1G").ipa_bits == 32


def test_protected_hosts_give_their_limit() -> None:
    answer = ask("max-4k-protected", "512M@1G")
    assert answer.ipa_bits == 52 and answer.default_fits


def test_slots() -> None:
    assert ask("max-4k-6.12", "8T@0").reasons[0].endswith("more than 2147483647 pages in one slot: split it")
    assert ask("max-4k-6.12", "4T@0", "4T@4T").fits


def test_other_architectures() -> None:
    assert ask("x86-64", "512M@1G").reasons == ("an x86_64 host has no IPA size",)


def test_the_tables_of_the_golden_list() -> None:
    tables = ask("graviton2", "4K@1023G").tables
    assert tables and (tables.levels, tables.start_level, tables.sl0, tables.concatenated, tables.t0sz) == (
        3,
        1,
        1,
        2,
        24,
    )


def test_json() -> None:
    made = plan(parse_memory_map(["64G@1T"]), [load("apple-m1"), load("graviton2")])
    data = made.to_json()
    assert data["schema"] == "kvm2.plan/1" and data["ipa_bits"] == 41 and not made.fits
    assert (data["fits"], data["refused"]) == (["graviton2"], ["apple-m1"])
    assert data["memory"] == [{"address": 1 << 40, "size": 64 << 30}]
    assert set(data["hosts"][0]) == set(HostPlan.__dataclass_fields__)
