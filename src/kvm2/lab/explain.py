"""What a `type` word of KVM_CREATE_VM says in every encoding that was proposed or is in use, and how each says a size.

>>> report = explain(0x2C)
>>> [(reading.encoding, reading.bits) for reading in report.readings if not reading.error and reading.bits]
[('log2', 44), ('pointer', 44)]
>>> report.words[44]["ps"], report.words[44]["delta"], report.words[44]["none"]
(12, 2, None)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvm2.errors import KvmError, UsageError
from kvm2.softkvm.limits import limits_of
from kvm2.softkvm.typeword import MAX_BITS, MIN_BITS, WORDS, word_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm2.softkvm.profile import Profile
    from kvm2.softkvm.typeword import TypeWord

WORD_LIMIT = 1 << 64


@dataclass(frozen=True)
class Answer:
    """What a host gives for the word: `bits` and `machine_type`, or a bare EINVAL with our `reason`."""

    accepted: bool
    bits: int = 0
    machine_type: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Reading:
    """The word in one encoding: `bits` (0 where it has no size), `machine_type`, `pointer`, or `error`: why nothing.

    `on_host` is what the host of the question would make of it, if its kernel spoke this encoding.
    """

    encoding: str
    field: str
    cannot_say: str
    bits: int
    machine_type: int
    pointer: bool
    error: str
    on_host: Answer | None


@dataclass(frozen=True)
class Explanation:
    """`words` has, for each size in question, the word that says it in each encoding, None where none does.

    `answer` is what KVM_CREATE_VM on the host gives, in the encoding (`speaks`) that its kernel has.
    """

    word: int
    readings: tuple[Reading, ...]
    words: dict[int, dict[str, int | None]]
    host: str = ""
    speaks: str = ""
    answer: Answer | None = None

    def to_dict(self) -> dict[str, object]:
        """For JSON: the payload of schema kvm2.explain/1."""
        return {
            "word": self.word,
            "host": {"name": self.host, "type_word": self.speaks, "answer": vars(self.answer)} if self.answer else None,
            "readings": [
                {**vars(reading), "on_host": vars(reading.on_host) if reading.on_host else None}
                for reading in self.readings
            ],
            "words": {str(bits): words for bits, words in self.words.items()},
        }


def explain(word: int, host: Profile | None = None, sizes: Iterable[int] = ()) -> Explanation:
    """Explains a word. `sizes` in bits: how to say them; without, every size that some encoding reads in the word.

    Raises UsageError for a word that is no 64-bit number, or a size that no VM has.
    """
    if not 0 <= word < WORD_LIMIT:
        raise UsageError(f"type word {word}: it is one unsigned 64-bit number")
    chosen = sorted(set(sizes))
    for bits in chosen:
        if not MIN_BITS <= bits <= MAX_BITS:
            raise UsageError(f"{bits} bits: an IPA size is {MIN_BITS}..{MAX_BITS}")
    readings = tuple(_read(encoding, word, host) for encoding in WORDS.values())
    chosen = chosen or sorted({reading.bits for reading in readings if reading.bits})
    words = {bits: {e.name: e.words.get(bits) for e in WORDS.values() if e.sized} for bits in chosen}
    if host is None:
        return Explanation(word, readings, words)
    answer = _ask(word_of(host.type_word), word, host)
    return Explanation(word, readings, words, host.name, host.type_word, answer)


def _read(encoding: TypeWord, word: int, host: Profile | None) -> Reading:
    said = encoding.meaning(word)
    fits = host is not None and encoding.sized == (host.arch == "arm64")
    answer = _ask(encoding, word, host) if host is not None and fits else None
    bits = 0 if said.error or said.pointer else said.bits
    return Reading(
        encoding.name, encoding.field, encoding.note, bits, said.machine_type, said.pointer, said.error, answer
    )


def _ask(encoding: TypeWord, word: int, host: Profile) -> Answer:
    if encoding.is_pointer(word):
        return Answer(True, reason="the list that it points to decides")
    try:
        bits, machine_type = encoding.decode(word, limits_of(host))
    except KvmError as refused:
        return Answer(False, reason=refused.reason)
    return Answer(True, bits, machine_type)
