"""Operations on KVM_CREATE_VM2 and its relatives in a VMM's words, with findings in the answers; names for numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvm2.abi import ioctls as io
from kvm2.abi import vm2
from kvm2.abi.structs import OneReg
from kvm2.abi.structs_arm64 import VcpuInit
from kvm2.errors import KvmError, UsageError
from kvm2.lab.oplist import op, result
from kvm2.lab.scenarios import Answer, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvm2.abi.findings import Finding
    from kvm2.abi.layout import Structure
    from kvm2.kvm import Kvm
    from kvm2.lab.client import Client
    from kvm2.spec import VmSpec

WORDS = ("physaddr_bits", "sve", "page_shift", "max_vcpus", "machine_type", "parange_follows_ipa", "negotiate")
SPEC = {
    "physaddr_bits": "bits?",
    "sve": "sve?",
    "page_shift": "size?",
    "max_vcpus": "size?",
    "machine_type": "size?",
    "parange_follows_ipa": "bool?",
    "negotiate": "bool?",
    "memory": "names?",
}


def _spec(step: Step) -> VmSpec:
    from kvm2.memorymap import parse_memory
    from kvm2.spec import VmSpec

    words = {name: step[name] for name in WORDS if name in step}
    return VmSpec(memory=tuple(map(parse_memory, step.get("memory", ()))), **words)


def _handle(client: Client) -> Kvm:
    from kvm2.kvm import Kvm

    return Kvm(client.backend, "the host of this scenario")


def attributes_of(rows: Iterable[dict[str, Any]]) -> list[Structure]:
    """Attributes from `[{"attr": "ARM64_SVE_VLS", "vls": [5]}, ...]`; lists are filled up with zeros."""
    by_name = {row.macro: row for row in vm2.ATTRIBUTES.values()}
    found = []
    for fields in rows:
        values = dict(fields)
        row = by_name.get(str(values.pop("attr", "")))
        if row is None:
            raise UsageError(f"{fields!r}: attr is one of {', '.join(by_name)}")
        known = {field.name: field for field in row.cls.LAYOUT.fields}
        for name, value in values.items():
            if name not in known:
                raise UsageError(f"{row.macro} has no field {name!r}; it has {', '.join(known)}")
            if isinstance(value, list):
                values[name] = tuple(value) + (0,) * (known[name].size // 8 - len(value))
        found.append(row.cls(**values))
    return found


def _finding(finding: Finding) -> dict[str, object]:
    keys = ("path", "value", "min", "max", "mask", "message", "hint")
    return {"error": finding.name, **{key: getattr(finding, key) for key in keys}}


def _asked(call: Callable[[], tuple[int, Iterable[Finding]]]) -> Answer:
    """The answer of a call with findings: of a refusal all of them, else the notes."""
    try:
        value, notes = call()
    except KvmError as error:
        found = [_finding(finding) for finding in error.findings]
        return result(-1, error.errno or 0, {"findings": found} if found else None)
    shown = [_finding(note) for note in notes]
    return result(0 if value > 2 else value, 0, {"notes": shown} if shown else None)


def _create(client: Client, step: Step, attributes: Callable[[Kvm], list[Structure]]) -> Answer:
    from kvm2.negotiation import send

    def call() -> tuple[int, Iterable[Finding]]:
        with _handle(client) as kvm:
            dry = bool(step.get("dry_run"))
            fd, notes = send(kvm, io.KVM_CREATE_VM2, attributes(kvm), dry_run=dry)
        if not dry:
            client.name_fd(step["id"], fd)
        return fd, notes

    client.expect_fd(step["id"])
    return _asked(call)


@op("create_vm2", id="name", dry_run="bool?", **SPEC)
def create_vm2(client: Client, step: Step) -> Answer:
    """KVM_CREATE_VM2 from the words of VmSpec."""
    spec = _spec(step)
    return _create(client, step, lambda kvm: spec.attributes(kvm.known_of(spec)))


@op("create_vm2_list", id="name", attributes="attributes", dry_run="bool?")
def create_vm2_list(client: Client, step: Step) -> Answer:
    """KVM_CREATE_VM2 with exactly these attributes."""
    return _create(client, step, lambda kvm: attributes_of(step["attributes"]))


@op("create_vm2_fixed", id="name", physaddr_bits="bits?", sve="sve?")
def create_vm2_fixed(client: Client, step: Step) -> Answer:
    """KVM_CREATE_VM2_FIXED from the words of VmSpec."""
    with _handle(client) as kvm:
        spec = _spec(step)
        data = spec.fixed(kvm.known_of(spec)).pack()
    value, error, _ = client.exchange(client.number("kvm"), io.KVM_CREATE_VM2_FIXED, data)
    client.expect_fd(step["id"])
    if value >= 0:
        client.name_fd(step["id"], value)
    return result(0 if value > 2 else value, error)


@op("describe")
def describe(client: Client, step: Step) -> Answer:
    """KVM_DESCRIBE_VM2: {attribute: {"def", "min", "max", "mask"}}."""
    try:
        with _handle(client) as kvm:
            rows = kvm.describe()
    except KvmError as error:
        return result(-1, error.errno or 0)
    output = {
        vm2.ATTRIBUTES[number].macro: {"def": row.default, "min": row.min, "max": row.max, "mask": row.mask}
        for number, row in rows.items()
        if number in vm2.ATTRIBUTES
    }
    return result(0, 0, output)


@op("get_attr", vm="name", attr="name")
def get_attr(client: Client, step: Step) -> Answer:
    """KVM_VM2_GET_ATTR: the attribute's own fields."""
    (empty,) = attributes_of([{"attr": step["attr"]}])
    client.memory.write(client.scratch, bytes(empty.SIZE))
    number: int = empty.type  # type: ignore[attr-defined]
    asked = vm2.Vm2Attr(type=number, size=empty.SIZE, attr=client.scratch).pack()
    value, error, _ = client.exchange(client.number(step["vm"]), io.KVM_VM2_GET_ATTR, asked)
    if value < 0:
        return result(value, error)
    got = type(empty).unpack(client.peek(client.scratch, empty.SIZE))
    fields = [field.name for field in got.LAYOUT.fields if field.name not in ("type", "size", "flags", "pad")]
    values = {name: getattr(got, name) for name in fields}
    return result(0, 0, {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()})


def _negotiate(client: Client, step: Step, request: int) -> Answer:
    from kvm2.negotiation import list_of

    fd = client.number(step["vm"])
    asked = list_of(attributes_of(step.get("attributes", ())))

    def call() -> tuple[int, Iterable[Finding]]:
        try:
            return client.backend.ioctl(fd, request, asked.address), asked.findings()
        except KvmError as error:
            raise KvmError(error.errno or 0, error.reason, asked.findings()) from None

    return _asked(call)


@op("set_attrs", vm="name", attributes="attributes?")
def set_attrs(client: Client, step: Step) -> Answer:
    """KVM_VM2_SET_ATTRS."""
    return _negotiate(client, step, io.KVM_VM2_SET_ATTRS)


@op("commit", vm="name", attributes="attributes?")
def commit(client: Client, step: Step) -> Answer:
    """KVM_VM2_COMMIT."""
    return _negotiate(client, step, io.KVM_VM2_COMMIT)


@op("init", vm="name", vcpu="name", features="names")
def init(client: Client, step: Step) -> Answer:
    """KVM_ARM_VCPU_INIT with the preferred target and vCPU features by name."""
    from kvm2.names import feature_bits

    value, error, after = client.exchange(client.number(step["vm"]), io.KVM_ARM_PREFERRED_TARGET, bytes(32), 32)
    if value < 0:
        return result(value, error)
    data = VcpuInit(VcpuInit.unpack(after).target, feature_bits(step["features"])).pack()
    value, error, _ = client.exchange(client.number(step["vcpu"]), io.KVM_ARM_VCPU_INIT, data)
    return result(value, error)


def _register(step: Step) -> tuple[int, int]:
    from kvm2.abi.onereg import size_of
    from kvm2.registers import register_id

    number = register_id(step["register"])
    return number, size_of(number)


@op("get_register", vcpu="name", register="name")
def get_register(client: Client, step: Step) -> Answer:
    """KVM_GET_ONE_REG by name; the output is the value, as a number."""
    number, size = _register(step)
    client.poke(client.scratch, bytes(size))
    value, error, _ = client.exchange(
        client.number(step["vcpu"]), io.KVM_GET_ONE_REG, OneReg(number, client.scratch).pack()
    )
    if value < 0:
        return result(value, error)
    return [0, 0, int.from_bytes(client.peek(client.scratch, size), "little")]


@op("set_register", vcpu="name", register="name", value="size")
def set_register(client: Client, step: Step) -> Answer:
    """KVM_SET_ONE_REG by name, of a number."""
    number, size = _register(step)
    if step["value"] >> 8 * size:
        raise UsageError(f"{step['register']} has {size} bytes: {step['value']:#x} does not fit")
    client.poke(client.scratch, step["value"].to_bytes(size, "little"))
    value, error, _ = client.exchange(
        client.number(step["vcpu"]), io.KVM_SET_ONE_REG, OneReg(number, client.scratch).pack()
    )
    return result(value, error)
