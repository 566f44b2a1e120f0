"""The `type` word of KVM_CREATE_VM: every encoding that was proposed or is in use, each one small object.

An encoding says three things: which word asks for a size (`encode`), what a word means (`meaning`, before any host
looks at it), and what a host makes of it (`decode`, a bare EINVAL as in the kernel).

>>> WORDS["ps"].encode(44), WORDS["log2"].encode(44)
(12, 44)
>>> WORDS["delta"].meaning(0xF).bits
38
>>> WORDS["delta"].encode(41)
Traceback (most recent call last):
kvm2.errors.UsageError: 'delta' cannot say 41 bits: it says 32..54, even sizes
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from kvm2.abi.vm2 import ARM64_DEFAULT_IPA_BITS as DEFAULT
from kvm2.errors import KvmError, UsageError

if TYPE_CHECKING:
    from kvm2.softkvm.limits import Limits

MIN_BITS, MAX_BITS = 32, 64
LOW_BITS = 0xFF
V3_LIMIT = 40
PROTECTED = 1 << 31
PROTECTED_MACHINE = 1
PAGE = 4096
PS_BITS = (32, 36, 40, 42, 44, 48, 52)  # VTCR_EL2.PS, ID_AA64MMFR0_EL1.PARange
ENUM_BITS = (40, 32, 36, 42, 44, 48, 52, 56)


class Meaning(NamedTuple):
    """What a word says: IPA bits (0 = no size in it), machine type; or, with `error`, why it says nothing."""

    bits: int = 0
    machine_type: int = 0
    error: str = ""
    pointer: bool = False


def _wrong(why: str) -> Meaning:
    return Meaning(error=why)


def _sign_extend(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


def _none(word: int) -> Meaning:
    return _wrong("anything but 0 is refused") if word else Meaning(DEFAULT)


def _log2(word: int) -> Meaning:
    if word & ~LOW_BITS:
        return _wrong("only bits [7:0] have a meaning")
    return Meaning(word or DEFAULT)


def _log2_protected(word: int) -> Meaning:
    if word & PROTECTED:
        return _log2(word & ~PROTECTED)._replace(machine_type=PROTECTED_MACHINE)
    return _log2(word)


def _log2_v3(word: int) -> Meaning:
    said = _log2(word)
    return _wrong(f"the v3 patch is capped at {V3_LIMIT} bits") if said.bits > V3_LIMIT else said


def _ps(word: int) -> Meaning:
    if word & ~0xF:
        return _wrong("only bits [3:0] have a meaning")
    if not word & 8:
        return _wrong("bits [2:0] without bit 3 (asked for)") if word else Meaning(DEFAULT)
    index = word & 7
    return Meaning(PS_BITS[index]) if index < len(PS_BITS) else _wrong("PS 0b111 means no size")


def _enum(word: int) -> Meaning:
    return Meaning(ENUM_BITS[word]) if word < len(ENUM_BITS) else _wrong(f"numbers are 0..{len(ENUM_BITS) - 1}")


def _delta5(word: int) -> Meaning:
    return Meaning(DEFAULT + _sign_extend(word, 5)) if word < 32 else _wrong("only bits [4:0] have a meaning")


def _delta(word: int) -> Meaning:
    return Meaning(DEFAULT + 2 * _sign_extend(word, 4)) if word < 16 else _wrong("only bits [3:0] have a meaning")


def _pointer(word: int) -> Meaning:
    if word < 256:
        return _log2(word)
    if word < PAGE:
        return _wrong("256..4095 is neither a size nor a pointer")
    return Meaning(pointer=True)


def _x86(word: int) -> Meaning:
    return Meaning(machine_type=word) if word < 32 else _wrong("VM types are 0..31")


def _s390(word: int) -> Meaning:
    return _wrong("only bit 0 (UCONTROL) has a meaning") if word & ~1 else Meaning(machine_type=word)


def _powerpc(word: int) -> Meaning:
    return Meaning(machine_type=word) if word <= 2 else _wrong("types are 0..2")


@dataclass(frozen=True)
class TypeWord:
    """One encoding. `raw` reads a word without bounds; `field` names its bits; `note` says what it cannot say."""

    name: str
    field: str
    note: str
    raw: Callable[[int], Meaning]
    sizes: tuple[int, ...] = ()
    sized: bool = True

    def meaning(self, word: int) -> Meaning:
        """What a word says on a host without limits: an `error` where no host can take it."""
        said = self.raw(word)
        if self.sized and not said.error and not said.pointer and not MIN_BITS <= said.bits <= MAX_BITS:
            return _wrong(f"{said.bits} bits: sizes are {MIN_BITS}..{MAX_BITS}")
        return said

    @cached_property
    def words(self) -> dict[int, int]:
        """The word for each size: the one that asks for it, where 0 means the same."""
        found: dict[int, int] = {}
        for word in range(LOW_BITS + 1):
            said = self.meaning(word)
            if self.sized and not said.error and (said.bits not in found or found[said.bits] == 0):
                found[said.bits] = word
        return found

    def can_say(self, bits: int) -> bool:
        """Whether there is a word for a size."""
        return bits in self.words

    def encode(self, bits: int) -> int:
        """The word that asks for an IPA size. UsageError where the encoding cannot say it."""
        word = self.words.get(bits)
        if word is None:
            raise UsageError(f"{self.name!r} cannot say {bits} bits: it says {self.range_text}")
        return word

    @property
    def range_text(self) -> str:
        """The sizes that it can say, for people."""
        return sizes_text(sorted(self.words))

    def is_pointer(self, word: int) -> bool:
        """Whether the word is the address of a list."""
        return self.raw is _pointer and word >= PAGE

    def decode(self, word: int, limits: Limits) -> tuple[int, int]:
        """(IPA bits, machine type) that a host gives for a word; a bare KvmError(EINVAL) where it refuses."""
        said = (_log2_protected if self.raw is _log2 and limits.machine_types & 2 else self.raw)(word)
        if not self.sized or not limits.is_arm64:
            if said.error:
                self._refuse(word, said.error)
            return 0, self._machine_type(said.machine_type, limits)
        limit = limits.ipa_limit(None)
        if limits.one_size and self.raw is not _none and not word & ~LOW_BITS & ~PROTECTED:
            # As recorded: such a kernel looks at nothing but the bits beside the size.
            return self._protected(word, said, limits)
        if said.error:
            self._refuse(word, said.error)
        if not MIN_BITS <= said.bits <= limit:
            why = f"{said.bits} bits{'' if word else ' (default)'}: this host allows {MIN_BITS}..{limit}"
            self._refuse(word, why)
        return said.bits, said.machine_type

    def _protected(self, word: int, said: Meaning, limits: Limits) -> tuple[int, int]:
        if word & PROTECTED and said.error:
            self._refuse(word, said.error)
        return limits.ipa_limit(None), said.machine_type

    def _machine_type(self, value: int, limits: Limits) -> int:
        known = limits.machine_types
        fine = not value & ~known if limits.arch == "s390x" else value < 64 and bool(known >> value & 1)
        if not fine:
            self._refuse(value, f"this host's types are the mask {known:#x}")
        return value

    def _refuse(self, word: int, why: str) -> None:
        raise KvmError(errno.EINVAL, f"type {word:#x} ({self.name}): {why}")


def sizes_text(sizes: list[int]) -> str:
    """A list of sizes, runs drawn together.

    >>> sizes_text([32, 33, 34, 40]), sizes_text([32, 34, 36, 38]), sizes_text([])
    ('32..34, 40', '32..38, even sizes', 'none')
    """
    if not sizes:
        return "none"
    if len(sizes) > 3 and sizes == list(range(sizes[0], sizes[-1] + 1, 2)):
        return f"{sizes[0]}..{sizes[-1]}, even sizes"
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][-1] == size - 1:
            runs[-1].append(size)
        else:
            runs.append([size])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


WORDS: dict[str, TypeWord] = {
    word.name: word
    for word in (
        TypeWord("none", "-", "anything but 0: arm before 4.20, x86 then", _none),
        TypeWord("log2-v3", "[7:0] = bits", "above 40: the v3 patch of June 2018", _log2_v3),
        TypeWord("log2", "[7:0] = bits", "nothing: mainline since 4.20", _log2),
        TypeWord(
            "ps", "[2:0] = VTCR_EL2.PS, [3] = asked for", "33, 41 and the like; 0b111 is its last free value", _ps
        ),
        TypeWord("enum", "a number that no architecture defines", "sizes that are not in its list", _enum),
        TypeWord("delta5", "40 + sign_extend([4:0])", "above 55", _delta5),
        TypeWord("delta", "40 + 2 * sign_extend([3:0])", "odd sizes, above 54", _delta),
        TypeWord("pointer", "< 256: bits; from 4096: -> struct kvm_create_vm2", "flags from bit 12 up", _pointer),
        TypeWord("x86-64", "VM type number, in the mask of KVM_CAP_VM_TYPES", "sizes", _x86, sized=False),
        TypeWord("s390x", "bit 0: UCONTROL", "sizes", _s390, sized=False),
        TypeWord("powerpc", "0 default, 1 HV, 2 PR", "sizes", _powerpc, sized=False),
    )
}


def word_of(name: str) -> TypeWord:
    """The encoding of that name, as a host file has it in `type_word`."""
    return WORDS[name]
