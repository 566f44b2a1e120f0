"""What a type word means in each encoding."""

import pytest

from kvm2.errors import UsageError
from kvm2.lab.explain import explain
from kvm2.softkvm import profile


def meanings(word):
    return {r.encoding: r.bits for r in explain(word).readings if r.bits}


def test_the_same_word_means_many_things():
    assert meanings(0xC) == {"ps": 44, "delta5": 52, "delta": 32}
    assert meanings(0) == dict.fromkeys(("none", "log2-v3", "log2", "ps", "enum", "delta5", "delta", "pointer"), 40)
    assert meanings(40) == {"log2-v3": 40, "log2": 40, "pointer": 40}
    assert meanings(1 << 31) == {}


def test_how_to_say_a_size():
    words = explain(0, sizes=[52, 41]).words
    assert list(words) == [41, 52]
    assert words[52] == {
        "none": None, "log2-v3": None, "log2": 52, "ps": 14, "enum": 6, "delta5": 12, "delta": 6, "pointer": 52,
    }  # fmt: skip
    assert [name for name, word in words[41].items() if word is not None] == ["log2", "delta5", "pointer"]


def test_on_a_host():
    report = explain(0x2C, profile.load("apple-m1"))
    assert not report.answer.accepted and "32..36" in report.answer.reason
    by_name = {r.encoding: r.on_host for r in report.readings}
    assert not by_name["log2"].accepted
    assert by_name["x86-64"] is None
    assert explain(0x24, profile.load("apple-m1")).answer.bits == 36


def test_a_host_that_speaks_another_encoding():
    assert explain(0xC, profile.load("type-ps")).answer.bits == 44
    assert explain(0xC, profile.load("type-delta")).answer.bits == 32
    assert explain(0x7FFF0000, profile.load("type-pointer")).answer.accepted


def test_other_architectures():
    report = explain(1, profile.load("s390x"))
    assert report.answer.accepted and report.answer.machine_type == 1
    assert {r.encoding for r in report.readings if r.on_host} >= {"s390x"}
    assert next(r for r in report.readings if r.encoding == "log2").on_host is None


@pytest.mark.parametrize("word", [-1, 1 << 64])
def test_a_word_has_64_bits(word):
    with pytest.raises(UsageError, match="64-bit"):
        explain(word)


@pytest.mark.parametrize("bits", [0, 31, 65])
def test_sizes_that_no_vm_has(bits):
    with pytest.raises(UsageError, match=r"32\.\.64"):
        explain(0, sizes=[bits])


def test_to_dict():
    said = explain(0x2C, profile.load("apple-m1")).to_dict()
    assert said["word"] == 44
    assert said["host"]["type_word"] == "log2" and said["host"]["answer"]["accepted"] is False
    assert said["words"]["44"]["ps"] == 12
    assert explain(0).to_dict()["host"] is None
