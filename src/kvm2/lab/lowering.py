"""Operations on descriptors, client memory, memory slots, devices and KVM_RUN, as ioctls with their real bytes."""

from __future__ import annotations

from kvm2.abi import ioctls as io
from kvm2.abi.structs import (
    ClearDirtyLog,
    CreateDevice,
    DeviceAttr,
    DirtyLog,
    EnableCap,
    UserspaceMemoryRegion,
    UserspaceMemoryRegion2,
)
from kvm2.errors import UsageError
from kvm2.lab.client import Client
from kvm2.lab.oplist import op, result, u32, u64
from kvm2.lab.run_answer import AREA_BYTES, describe
from kvm2.lab.scenarios import Answer, Step

BAD_POINTER = 0x10
GUEST_BYTES = 0x3000
RUN_TIMEOUT_MS = 1500
DEV_ATTR = {"set": io.KVM_SET_DEVICE_ATTR, "get": io.KVM_GET_DEVICE_ATTR, "has": io.KVM_HAS_DEVICE_ATTR}


def _new_fd(value: int) -> int:
    """Descriptor numbers are nobody's business: 0 stands for a new one."""
    return 0 if value > 2 else value


@op("create_vm", id="name", type="int")
def create_vm(client: Client, step: Step) -> Answer:
    value, error = client.ioctl(client.number("kvm"), io.KVM_CREATE_VM, step["type"])
    if value >= 0:
        client.name_fd(step["id"], value)
    client.expect_fd(step["id"])
    return result(_new_fd(value), error)


@op("create_vcpu", vm="name", id="name", vcpu_id="int")
def create_vcpu(client: Client, step: Step) -> Answer:
    client.expect_fd(step["id"])
    value, error = client.ioctl(client.number(step["vm"]), io.KVM_CREATE_VCPU, step["vcpu_id"])
    if value >= 0:
        client.name_fd(step["id"], value)
    client.map_run(step["id"])
    return result(_new_fd(value), error)


@op("create_device", vm="name", id="name", type="int", flags="int")
def create_device(client: Client, step: Step) -> Answer:
    data = CreateDevice(type=u32(step["type"]), flags=u32(step["flags"])).pack()
    if not step["flags"]:
        client.expect_fd(step["id"])
    value, error, after = client.exchange(client.number(step["vm"]), io.KVM_CREATE_DEVICE, data, len(data))
    if value >= 0 and not step["flags"]:
        client.name_fd(step["id"], CreateDevice.unpack(after).fd)
    return result(min(value, 0), error)


@op("close", id="name")
def close(client: Client, step: Step) -> Answer:
    error = client.close(step["id"])
    return result(-1 if error else 0, error)


@op("check_ext", fd="name", cap="int")
def check_ext(client: Client, step: Step) -> Answer:
    return result(*client.ioctl(client.number(step["fd"]), io.KVM_CHECK_EXTENSION, step["cap"]))


@op("enable_cap", fd="name", cap="int", flags="int", args="words")
def enable_cap(client: Client, step: Step) -> Answer:
    args = tuple(u64(word) for word in (step["args"] + [0] * 4)[:4])
    data = EnableCap(cap=u32(step["cap"]), flags=u32(step["flags"]), args=args).pack()
    value, error, _ = client.exchange(client.number(step["fd"]), io.KVM_ENABLE_CAP, data)
    return result(value, error)


@op("raw", fd="name", nr="size", arg="int")
def raw(client: Client, step: Step) -> Answer:
    return result(*client.ioctl(client.number(step["fd"]), step["nr"], step["arg"]))


@op("raw_buf", fd="name", nr="size", n="small", data="hex?")
def raw_buf(client: Client, step: Step) -> Answer:
    data = bytes.fromhex(step.get("data", "")) or bytes(step["n"])
    value, error, after = client.exchange(client.number(step["fd"]), step["nr"], data, step["n"])
    return result(value, error, after.hex() or None)


@op("raw_bad_ptr", fd="name", nr="size")
def raw_bad_ptr(client: Client, step: Step) -> Answer:
    return result(*client.ioctl(client.number(step["fd"]), step["nr"], BAD_POINTER))


@op("mem", id="name", size="size", prot="protection?")
def mem(client: Client, step: Step) -> Answer:
    error = client.map(step["id"], step["size"], step.get("prot", ""))
    return result(-1 if error else 0, error)


@op("close_mem", id="name")
def close_mem(client: Client, step: Step) -> Answer:
    error = client.unmap(step["id"])
    return result(-1 if error else 0, error)


@op("poke", mem="name", off="int", data="hex")
def poke(client: Client, step: Step) -> Answer:
    client.poke(client.number(step["mem"]) + step["off"], bytes.fromhex(step["data"]))
    return result(0, 0)


@op("peek", mem="name", off="int", len="size")
def peek(client: Client, step: Step) -> Answer:
    return result(0, 0, client.peek(client.number(step["mem"]) + step["off"], step["len"]).hex() or None)


@op("guest", mem="name", off="int", name="name")
def guest(client: Client, step: Step) -> Answer:
    image = client.guests.get(step["name"])
    if image is None:
        names = ", ".join(sorted(client.guests)) or "nothing (is guests.json beside the scenarios?)"
        raise UsageError(f"no guest program {step['name']!r}; the file of guests has: {names}")
    client.poke(client.number(step["mem"]) + step["off"], image.ljust(GUEST_BYTES, b"\0"))
    return result(0, 0)


def _hva(client: Client, step: Step) -> int:
    """`hva` is an offset into the client memory `mem`, or an address where `mem` is null."""
    return u64((client.number(step["mem"]) if step["mem"] else 0) + step["hva"])


@op("memslot", vm="name", slot="int", flags="int", gpa="int", size="int", mem="name or null", hva="int")
def memslot(client: Client, step: Step) -> Answer:
    slot, flags = u32(step["slot"]), u32(step["flags"])
    region = UserspaceMemoryRegion(slot, flags, u64(step["gpa"]), u64(step["size"]), _hva(client, step))
    value, error, _ = client.exchange(client.number(step["vm"]), io.KVM_SET_USER_MEMORY_REGION, region.pack())
    return result(value, error)


@op("memslot2", vm="name", slot="int", flags="int", gpa="int", size="int", mem="name or null", hva="int", pad="int")
def memslot2(client: Client, step: Step) -> Answer:
    slot, flags, pads = u32(step["slot"]), u32(step["flags"]), (u64(step["pad"]), *[0] * 13)
    where = (u64(step["gpa"]), u64(step["size"]), _hva(client, step))
    region = UserspaceMemoryRegion2(slot, flags, *where, pad2=pads)
    value, error, _ = client.exchange(client.number(step["vm"]), io.KVM_SET_USER_MEMORY_REGION2, region.pack())
    return result(value, error)


@op("dirty_log", vm="name", slot="int", bytes="small")
def dirty_log(client: Client, step: Step) -> Answer:
    client.poke(client.scratch, bytes(step["bytes"]))
    data = DirtyLog(slot=u32(step["slot"]), dirty_bitmap=client.scratch).pack()
    value, error, _ = client.exchange(client.number(step["vm"]), io.KVM_GET_DIRTY_LOG, data)
    return result(value, error, client.peek(client.scratch, step["bytes"]).hex() if value == 0 else None)


@op("clear_dirty", vm="name", slot="int", first="int", n="int", bytes="small")
def clear_dirty(client: Client, step: Step) -> Answer:
    client.poke(client.scratch, b"\xff" * step["bytes"])
    data = ClearDirtyLog(u32(step["slot"]), u32(step["n"]), u64(step["first"]), client.scratch).pack()
    value, error, _ = client.exchange(client.number(step["vm"]), io.KVM_CLEAR_DIRTY_LOG, data)
    return result(value, error)


@op("dev_attr", verb="verb", dev="name", group="int", attr="int", data="hex")
def dev_attr(client: Client, step: Step) -> Answer:
    client.poke(client.scratch, bytes.fromhex(step["data"]) + bytes(64))
    data = DeviceAttr(0, u32(step["group"]), u64(step["attr"]), client.scratch).pack()
    value, error, _ = client.exchange(client.number(step["dev"]), DEV_ATTR[step["verb"]], data)
    output = client.peek(client.scratch, 8).hex() if step["verb"] == "get" and value == 0 else None
    return result(value, error, output)


@op("run", vcpu="name", timeout_ms="time?")
def run(client: Client, step: Step) -> Answer:
    value, error = client.run(client.number(step["vcpu"]), step.get("timeout_ms", RUN_TIMEOUT_MS))
    area = bytes(client.area(step["vcpu"])[:AREA_BYTES])
    return result(value, error, describe(area, failed=value < 0))


@op("immediate_exit", vcpu="name", value="int")
def immediate_exit(client: Client, step: Step) -> Answer:
    client.area(step["vcpu"])[1] = step["value"] & 0xFF
    return result(0, 0)


@op("mmio_data", vcpu="name", data="hex")
def mmio_data(client: Client, step: Step) -> Answer:
    data = bytes.fromhex(step["data"])
    client.area(step["vcpu"])[40 : 40 + len(data)] = data
    return result(0, 0)
