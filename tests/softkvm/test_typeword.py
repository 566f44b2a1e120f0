"""The type word: every encoding over its whole range, against formulas written down here."""

import errno
from dataclasses import replace

import pytest

from kvm2.errors import KvmError, UsageError
from kvm2.softkvm import creation, profile
from kvm2.softkvm.typeword import WORDS

from ..memory_image import LIST, MemoryImage, list_image

PS = {8: 32, 9: 36, 10: 40, 11: 42, 12: 44, 13: 48, 14: 52}
ENUM = [40, 32, 36, 42, 44, 48, 52, 56]
EXPECTED = {
    "none": {0: 40},
    "log2-v3": {0: 40} | {n: n for n in range(32, 41)},
    "log2": {0: 40} | {n: n for n in range(32, 65)},
    "ps": {0: 40} | PS,
    "enum": dict(enumerate(ENUM)),
    "delta5": {n: 40 + n for n in range(16)} | {32 + n: 40 + n for n in range(-8, 0)},
    "delta": {n: 40 + 2 * n for n in range(8)} | {16 + n: 40 + 2 * n for n in range(-4, 0)},
    "pointer": {0: 40} | {n: n for n in range(32, 65)},
}
HIGH = [0x100, 0x128, 0x800, 0x10028, 1 << 31, 1 << 31 | 40, 1 << 32, 1 << 32 | 40, 1 << 63, (1 << 64) - 1]


def host(encoding):
    return profile.load(f"type-{encoding}")


def create(described, word, memory=None):
    return creation.create_vm(described, memory or MemoryImage({}), word)


def refusal(described, word):
    with pytest.raises(KvmError) as caught:
        create(described, word)
    return caught.value


@pytest.mark.parametrize("encoding", EXPECTED)
def test_every_low_word_on_a_52_bit_host(encoding):
    for word in range(256):
        bits = EXPECTED[encoding].get(word)
        if bits is not None and bits <= 52:
            assert create(host(encoding), word).ipa_bits == bits, word
        else:
            error = refusal(host(encoding), word)
            assert (error.errno, error.findings) == (errno.EINVAL, ()), word
            assert error.reason


@pytest.mark.parametrize("encoding", [name for name in EXPECTED if name != "pointer"])
@pytest.mark.parametrize("word", HIGH)
def test_bits_outside_the_field(encoding, word):
    error = refusal(host(encoding), word)
    assert (error.errno, error.findings) == (errno.EINVAL, ())


@pytest.mark.parametrize("encoding", EXPECTED)
def test_what_a_word_means_without_a_host(encoding):
    for word in range(256):
        said = WORDS[encoding].meaning(word)
        assert (0 if said.error else said.bits) == EXPECTED[encoding].get(word, 0), word


@pytest.mark.parametrize("encoding", EXPECTED)
def test_a_size_is_said_or_refused_never_rounded(encoding):
    word = WORDS[encoding]
    for bits in range(120):
        if bits in EXPECTED[encoding].values():
            assert word.meaning(word.encode(bits)).bits == bits
            assert word.can_say(bits)
        else:
            assert not word.can_say(bits)
            with pytest.raises(UsageError, match=rf"'{encoding}' cannot say {bits} bits: it says "):
                word.encode(bits)


def test_words_that_are_asked_for_come_before_the_default():
    assert {name: word.encode(40) for name, word in WORDS.items() if word.sized} == {
        "none": 0, "log2-v3": 40, "log2": 40, "ps": 10, "enum": 0, "delta5": 0, "delta": 0, "pointer": 40,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["apple-m1", "mainline-m1"])
def test_the_default_on_a_36_bit_host(name):
    error = refusal(profile.load(name), 0)
    assert (error.errno, error.findings) == (errno.EINVAL, ())
    assert "40 bits (default): this host allows 32..36" in error.reason
    assert create(profile.load(name), 36).ipa_bits == 36
    assert refusal(profile.load(name), 37).errno == errno.EINVAL


def test_a_vm_of_the_old_call_keeps_mainlines_rules():
    config = create(profile.load("max-4k-6.12"), 48)
    assert not config.made_by_vm2
    assert config.sve_allowed and config.sve_vls is None and not config.needs_set_sve_vls
    assert (config.page_shift, config.max_vcpus) == (12, 512)
    assert not create(profile.load("max-4k-nosve"), 48).sve_allowed


def test_a_protected_host_gives_its_limit_whatever_the_size():
    described = profile.load("max-4k-protected")
    for word in range(256):
        assert create(described, word).ipa_bits == 52
    for word in HIGH:
        assert refusal(described, word).errno == errno.EINVAL


def test_bit_31_on_a_host_that_makes_protected_vms():
    described = replace(profile.load("max-4k-6.12"), vm_types=0b11)
    config = create(described, 1 << 31 | 48)
    assert (config.ipa_bits, config.machine_type) == (48, 1)
    assert create(described, 48).machine_type == 0
    for word in (1 << 31 | 53, 1 << 31 | 0x100, 1 << 30):
        assert refusal(described, word).errno == errno.EINVAL
    protected = replace(profile.load("max-4k-protected"), vm_types=0b11)
    config = create(protected, 1 << 31 | 7)
    assert (config.ipa_bits, config.machine_type) == (52, 1)


# ---- the pointer


def test_a_pointer_goes_on_to_the_list():
    from kvm2.abi import vm2

    memory = list_image(vm2.Arm64PhysaddrSize(physaddr_bits=44).pack(), vm2.MaxVcpus(max_vcpus=2).pack())
    config = create(host("pointer"), LIST, memory)
    assert (config.ipa_bits, config.max_vcpus, config.made_by_vm2) == (44, 2, True)


def test_what_is_wrong_in_the_list_has_findings():
    from kvm2.abi import vm2

    memory = list_image(vm2.Arm64PhysaddrSize(physaddr_bits=53).pack())
    with pytest.raises(KvmError) as caught:
        create(host("pointer"), LIST, memory)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert caught.value.findings[0].path == "attrs[0].physaddr_bits"


@pytest.mark.parametrize("word", [256, 257, 4095])
def test_between_a_size_and_a_pointer(word):
    error = refusal(host("pointer"), word)
    assert (error.errno, error.findings) == (errno.EINVAL, ())


@pytest.mark.parametrize("word", [4096, 4097, 1 << 31, 1 << 48, (1 << 64) - 1])
def test_a_pointer_to_nothing(word):
    error = refusal(host("pointer"), word)
    assert error.errno == errno.EFAULT
    assert error.findings


# ---- other architectures


@pytest.mark.parametrize(
    ("name", "fine"), [("x86-64", {0, 1}), ("x86-64-snp", {0, 2, 3, 4}), ("s390x", {0, 1}), ("powerpc", {0, 1, 2})]
)
def test_other_architectures(name, fine):
    described = profile.load(name)
    for word in [*range(300), *HIGH]:
        if word in fine:
            assert create(described, word).machine_type == word
        else:
            error = refusal(described, word)
            assert (error.errno, error.findings) == (errno.EINVAL, ())
