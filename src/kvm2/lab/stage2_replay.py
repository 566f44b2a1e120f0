"""Compares the software KVM's stage-2 tables with those of real kernels, descriptor by descriptor.

A recorded dump has, for each IPA size that was asked for, VTCR_EL2, VTTBR_EL2 and every non-zero descriptor of a VM
with five slots whose guest touched a page of each (`rebuild`, `touches`). The same VM is built
here, through the code that handles a guest's faults, and everything but the machine's own addresses must be equal.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvm2.abi.structs import KVM_MEM_READONLY, UserspaceMemoryRegion
from kvm2.errors import KvmError, UsageError
from kvm2.softkvm.memslots import MemSlots
from kvm2.softkvm.stage2 import CNP, VMID_SHIFT, Stage2, stage2_format
from kvm2.softkvm.stage2_fault import map_leaf
from kvm2.softkvm.stage2_format import vtcr_fields

if TYPE_CHECKING:
    from pathlib import Path

    from kvm2.softkvm.profile import Profile
    from kvm2.softkvm.stage2 import DescriptorRecord
    from kvm2.softkvm.stage2_format import Format

SCHEMA = "kvm2.replay/1"
SLOT_SIZE = 1 << 16
CODE, BLOCK, DATA, ROM = 0x40000000, 0x80000000, 0x50000000, 0x60000000
# Client memory of the rebuilt VM: nothing is ever read there, and each slot has a whole 4 GiB for itself.
CLIENT, CLIENT_STEP = 0x7000_0000_0000, 1 << 32
STRUCTURE = ("ia", "start", "index_bits", "entries", "concat", "pgd_bytes")


@dataclass(frozen=True)
class Difference:
    """One value that is not equal: where, what the real kernel had, what the software KVM has."""

    ipa_bits: int
    what: str
    recorded: str
    here: str


@dataclass(frozen=True)
class Stage2Report:
    """What a replay compared. `dumps` VMs, `compared` values in them, and every difference."""

    file: str
    host: str
    dumps: int
    compared: int
    differences: tuple[Difference, ...]
    incomplete: tuple[int, ...] = ()  # IPA sizes whose recorded guest did not get to the end of its accesses

    @property
    def equal(self) -> bool:
        """Whether something was compared and nothing differs."""
        return self.compared > 0 and not self.differences

    def as_json(self) -> dict[str, Any]:
        """The report for `--json`."""
        return {
            "schema": SCHEMA,
            "kind": "stage2",
            "file": self.file,
            "host": self.host,
            "dumps": self.dumps,
            "compared": self.compared,
            "equal": self.equal,
            "incomplete": list(self.incomplete),
            "differences": [vars(difference) for difference in self.differences],
        }


class Touch(NamedTuple):
    """An access of the recorded guest."""

    ipa: int
    execute: bool = False


class _Compare:
    """Counts comparisons and keeps what differs."""

    def __init__(self) -> None:
        self.count = 0
        self.differences: list[Difference] = []

    def __call__(self, ipa_bits: int, what: str, recorded: object, here: object) -> None:
        self.count += 1
        if recorded != here:
            self.differences.append(Difference(ipa_bits, what, str(recorded), str(here)))


def replay_stage2(dump_file: Path, profile: Profile) -> Stage2Report:
    """Rebuilds every VM of a dump file on a described host and compares. UsageError for a file that is no dump."""
    try:
        recorded = json.loads(dump_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{dump_file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{dump_file}: is not JSON: {error}") from None
    try:
        return _replay(recorded, str(dump_file), profile)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{dump_file}: is not a stage-2 dump ({type(error).__name__}: {error})") from None


def _replay(recorded: dict[str, Any], file: str, profile: Profile) -> Stage2Report:
    dumps, compare = recorded["dumps"], _Compare()
    compare(0, "page", recorded["page"], 1 << profile.page_shift)
    for asked, answer in recorded["create"].items():
        compare(int(asked), "created", not answer.startswith("-1"), _has_format(profile, int(asked)))
    # The recorded machine made these VMs one after the other: VMID 1, 2, ...
    for vmid, dump in enumerate(dumps, 1):
        _compare_dump(compare, dump, profile, vmid)
    incomplete = tuple(dump["ipa"] or 40 for dump in dumps if _missed(dump))
    return Stage2Report(file, profile.name, len(dumps), compare.count, tuple(compare.differences), incomplete)


def touches(page_size: int, ipa_bits: int) -> dict[str, Touch]:
    """What the recorded guest did, in its order, by the names in a dump's `touched`."""
    return {
        "code": Touch(CODE, execute=True),
        "x1": Touch((1 << ipa_bits) - SLOT_SIZE + 0x1238),
        "x2": Touch(BLOCK + 0x5008),
        "x3": Touch(DATA + page_size + 16),
        "x4": Touch(ROM + 24),
        "stack": Touch(CODE + 0x2000),
    }


def rebuild(profile: Profile, ipa_bits: int, vmid: int = 1, without: frozenset[str] = frozenset()) -> Stage2:
    """The recorded VM: its five slots, and its tables after the guest's faults, but those `without`. To be closed by
    the caller."""
    format = stage2_format(profile, ipa_bits)
    slots, stage2 = MemSlots(profile, ipa_bits), Stage2(format, profile, vmid)
    top = (1 << ipa_bits) - SLOT_SIZE
    layout = ((CODE, SLOT_SIZE, 0), (top, SLOT_SIZE, 0), (BLOCK, format.block_size, 0), (DATA, SLOT_SIZE, 0))
    for number, (gpa, size, flags) in enumerate((*layout, (ROM, SLOT_SIZE, KVM_MEM_READONLY))):
        slots.set(UserspaceMemoryRegion(number, flags, gpa, size, CLIENT + number * CLIENT_STEP))
    for name, touch in touches(format.page_size, ipa_bits).items():
        slot = slots.find(touch.ipa >> profile.page_shift)
        if slot is None:
            raise ValueError(f"the recorded guest touched {touch.ipa:#x}, which is in no slot")
        if name not in without:
            # Memory that the client may write is mapped writable at the first access, whatever that is.
            map_leaf(stage2, slot, touch.ipa, writable=not slot.readonly, execute=touch.execute, blocks=True)
    return stage2


def _missed(dump: dict[str, Any]) -> frozenset[str]:
    # A guest that never got past its first instruction (16K pages at 52 bits: the recording QEMU cannot complete such a
    # walk) left a record of what it did not touch; then it did not get to its last store either.
    missed = {name for name, touched in dump["touched"].items() if touched["pa"] is None}
    return frozenset(missed | {"stack"} if missed else missed)


def _has_format(profile: Profile, asked: int) -> bool:
    try:
        stage2_format(profile, asked or 40)
    except KvmError:
        return False
    return True


def _compare_dump(compare: _Compare, dump: dict[str, Any], profile: Profile, vmid: int) -> None:
    bits = dump["ipa"] or 40
    try:
        stage2 = rebuild(profile, bits, vmid, _missed(dump))
    except KvmError as error:
        compare(bits, "created", "yes", str(error))
        return
    format = stage2.format
    recorded, here = int(dump["vtcr"], 16), stage2.vtcr
    compare(bits, "VTCR_EL2", hex(recorded), hex(here))
    for name, value in vtcr_fields(recorded).items():
        compare(bits, f"VTCR_EL2.{name}", value, format.fields()[name])
    values = [format.ipa_bits, format.start_level, format.index_bits]
    values += [format.entries, format.concatenated, format.pgd_bytes]
    for name, value in zip(STRUCTURE, values, strict=True):
        compare(bits, name, dump[name], value)
    _compare_base(compare, dump, stage2)
    _compare_descriptors(compare, bits, dump["descs"], stage2)
    stage2.close()


def _compare_base(compare: _Compare, dump: dict[str, Any], stage2: Stage2) -> None:
    bits, size = stage2.format.ipa_bits, stage2.format.concatenated * stage2.format.page_size
    recorded, here = int(dump["vttbr"], 16), stage2.vttbr
    compare(bits, "VTTBR_EL2.VMID", recorded >> VMID_SHIFT, here >> VMID_SHIFT)
    compare(bits, "VTTBR_EL2.CnP", recorded & CNP, here & CNP)
    compare(bits, "base alignment", int(dump["base"], 16) % size, stage2.base % size)


def _compare_descriptors(compare: _Compare, bits: int, recorded: list[DescriptorRecord], stage2: Stage2) -> None:
    places = {_place(record): record for record in recorded}
    here = {_place(record): record for record in stage2.dump()}
    compare(bits, "descriptors", [_named(place) for place in places], [_named(place) for place in here])
    for place, record in places.items():
        mine = here.get(place)
        if mine is None:
            continue
        compare(bits, f"{_named(place)} kind", record["kind"], mine["kind"])
        compare(bits, f"{_named(place)} size", record.get("size"), mine.get("size"))
        theirs, ours = _attributes(stage2.format, record), _attributes(stage2.format, mine)
        compare(bits, f"{_named(place)} attributes", hex(theirs), hex(ours))


def _place(record: DescriptorRecord) -> tuple[int, int, int]:
    return int(record["level"]), int(record["i"]), int(str(record["ipa"]), 16)


def _named(place: tuple[int, int, int]) -> str:
    level, index, ipa = place
    return f"level {level} entry {index} (IPA {ipa:#x})"


def _attributes(format: Format, record: DescriptorRecord) -> int:
    # A descriptor without its address: what is left is kind, permissions, memory type, shareability.
    descriptor = int(str(record["desc"]), 16)
    return descriptor & ~format.encode_address(format.decode_address(descriptor))
