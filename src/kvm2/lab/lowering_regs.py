"""Operations on a vCPU's registers and state (ONE_REG, INIT, FINALIZE, MP_STATE), as ioctls with their real bytes."""

from __future__ import annotations

import errno
import struct

from kvm2.abi import ioctls as io
from kvm2.abi.structs import MpState, OneReg
from kvm2.abi.structs_arm64 import RegMaskRange, VcpuInit
from kvm2.errors import UsageError
from kvm2.lab.client import Client
from kvm2.lab.oplist import op, result, u32, u64
from kvm2.lab.scenarios import Answer, Step

BAD_POINTER = 0x10
REG_LIST_ROOM = 1000  # what reg_dump offers; more than any host has
MASKS_BYTES = 1536
WORD = struct.Struct("<Q")


def register_bytes(number: int) -> int:
    """A register's size in bytes: 1 << bits 55:52 of its id.

    >>> register_bytes(0x6030000000100040)
    8
    """
    return int(1 << (number >> 52 & 15))


@op("vcpu_init", vcpu="name", target="int", features="words")
def vcpu_init(client: Client, step: Step) -> Answer:
    features = tuple(u32(word) for word in step["features"])
    if len(features) != 7:
        raise UsageError(f"vcpu_init: features has {len(features)} words, struct kvm_vcpu_init has 7")
    data = VcpuInit(u32(step["target"]), features).pack()
    value, error, _ = client.exchange(client.number(step["vcpu"]), io.KVM_ARM_VCPU_INIT, data)
    return result(value, error)


@op("pref_target", vm="name")
def pref_target(client: Client, step: Step) -> Answer:
    value, error, after = client.exchange(client.number(step["vm"]), io.KVM_ARM_PREFERRED_TARGET, bytes(32), 32)
    return result(value, error, after.hex())


@op("finalize", vcpu="name", feature="int")
def finalize(client: Client, step: Step) -> Answer:
    data = u32(step["feature"]).to_bytes(4, "little")
    value, error, _ = client.exchange(client.number(step["vcpu"]), io.KVM_ARM_VCPU_FINALIZE, data)
    return result(value, error)


@op("mp_state", vcpu="name", verb="verb", value="int?")
def mp_state(client: Client, step: Step) -> Answer:
    fd = client.number(step["vcpu"])
    if step["verb"] == "get":
        value, error, after = client.exchange(fd, io.KVM_GET_MP_STATE, bytes(4), 4)
        return result(value, error, after.hex())
    data = MpState(u32(step.get("value", 0))).pack()
    value, error, _ = client.exchange(fd, io.KVM_SET_MP_STATE, data)
    return result(value, error)


@op("set_reg", vcpu="name", id="int", data="hex")
def set_reg(client: Client, step: Step) -> Answer:
    client.poke(client.scratch, bytes.fromhex(step["data"]) + bytes(256))
    data = OneReg(u64(step["id"]), client.scratch).pack()
    value, error, _ = client.exchange(client.number(step["vcpu"]), io.KVM_SET_ONE_REG, data)
    return result(value, error)


@op("get_reg", vcpu="name", id="int")
def get_reg(client: Client, step: Step) -> Answer:
    client.poke(client.scratch, bytes(256))
    data = OneReg(u64(step["id"]), client.scratch).pack()
    value, error, _ = client.exchange(client.number(step["vcpu"]), io.KVM_GET_ONE_REG, data)
    size = min(256, register_bytes(u64(step["id"])))
    return result(value, error, client.peek(client.scratch, size).hex() if value == 0 else None)


@op("rmw_reg", vcpu="name", id="int", mask="int", value="int")
def rmw_reg(client: Client, step: Step) -> Answer:
    """Reads a register, replaces the bits of `mask`, writes it; the value that was written, also where that failed."""
    fd, mask = client.number(step["vcpu"]), u64(step["mask"])
    client.poke(client.scratch, bytes(256))
    data = OneReg(u64(step["id"]), client.scratch).pack()
    value, error, _ = client.exchange(fd, io.KVM_GET_ONE_REG, data)
    if value < 0:
        return result(value, error)
    old = WORD.unpack(client.peek(client.scratch, 8))[0]
    new = WORD.pack(old & ~mask | u64(step["value"]) & mask)
    client.poke(client.scratch, new)
    value, error, _ = client.exchange(fd, io.KVM_SET_ONE_REG, data)
    return result(value, error, new.hex())


@op("raw_reg_bad_ptr", vcpu="name", id="int", set="bool")
def raw_reg_bad_ptr(client: Client, step: Step) -> Answer:
    request = io.KVM_SET_ONE_REG if step["set"] else io.KVM_GET_ONE_REG
    data = OneReg(u64(step["id"]), BAD_POINTER).pack()
    value, error, _ = client.exchange(client.number(step["vcpu"]), request, data)
    return result(value, error)


@op("reg_list", vcpu="name", n="int")
def reg_list(client: Client, step: Step) -> Answer:
    client.poke(client.scratch, WORD.pack(u64(step["n"])) + bytes(8192))
    value, error = client.ioctl(client.number(step["vcpu"]), io.KVM_GET_REG_LIST, client.scratch)
    if value < 0 and error != errno.E2BIG:
        return result(value, error)
    count = WORD.unpack(client.peek(client.scratch, 8))[0]
    output: dict[str, object] = {"n": count}
    if value == 0 and step["n"] >= count:
        data = client.peek(client.scratch, 8 * (count + 1))
        output["ids"] = [f"{number:#x}" for (number,) in WORD.iter_unpack(data[8:])]
    return result(value, error, output)


@op("reg_dump", vcpu="name")
def reg_dump(client: Client, step: Step) -> Answer:
    """Every register of the list: its hex bytes, or `!errno`. Where the list is refused, what the empty list gives."""
    fd = client.number(step["vcpu"])
    client.poke(client.scratch, WORD.pack(REG_LIST_ROOM) + bytes(8192))
    value, error = client.ioctl(fd, io.KVM_GET_REG_LIST, client.scratch)
    count = WORD.unpack(client.peek(client.scratch, 8))[0]
    numbers = WORD.iter_unpack(client.peek(client.scratch + 8, 8 * min(count, 1023)))
    # A refused list stays all zeros: id 0, asked for once here, as every repetition gives the same.
    distinct = dict.fromkeys(number for (number,) in numbers)
    return result(value, error, {f"{number:x}": _dumped(client, fd, number) for number in distinct})


def _dumped(client: Client, fd: int, number: int) -> str:
    """One register of a dump. Trailing zero bytes beyond the first 8 are cut, which `~` tells."""
    where = client.scratch + 16384
    client.memory.write(where, bytes(256))
    value, error, _ = client.exchange(fd, io.KVM_GET_ONE_REG, OneReg(number, where).pack())
    if value < 0:
        return f"!{error}"
    size = register_bytes(number)
    data = client.peek(where, size)
    kept = data[: max(8, len(data.rstrip(b"\0")))]
    return kept.hex() + ("~" if len(kept) < size else "")


@op("writable_masks", vm="name", range="int")
def writable_masks(client: Client, step: Step) -> Answer:
    client.poke(client.scratch, bytes(2048))
    data = RegMaskRange(addr=client.scratch, range=u32(step["range"])).pack()
    value, error, _ = client.exchange(client.number(step["vm"]), io.KVM_ARM_GET_REG_WRITABLE_MASKS, data)
    return result(value, error, client.peek(client.scratch, MASKS_BYTES).hex() if value == 0 else None)
