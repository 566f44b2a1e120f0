"""docs/api.rst: well-formed, whole, and every errno in it is one that a described host really gives."""

from __future__ import annotations

import ctypes
import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm2.abi import ioctls, vm2, wire
from kvm2.abi.gen import api_text
from kvm2.abi.gen.api import api, table
from kvm2.abi.gen.cdecl import struct_text
from kvm2.abi.gen.header import constants, new_ioctls
from kvm2.abi.layout import Structure
from kvm2.errors import KvmError
from kvm2.handle import Buffer
from kvm2.softkvm import profile
from kvm2.softkvm.door import SoftKvm

from ..memory_image import Fenced

PROJECT = Path(__file__).parents[2]
BIG, M1 = "max-4k-6.12", "apple-m1"


def test_is_valid_restructured_text() -> None:
    core = pytest.importorskip("docutils.core", reason="docutils is not installed")
    problems: list[str] = []

    class Told:
        def write(self, text: str) -> None:
            problems.append(text)

    settings = {"report_level": 1, "halt_level": 5, "warning_stream": Told()}
    html = core.publish_string(api(), writer="html5", settings_overrides=settings).decode()
    assert problems == []
    titles = re.findall(r"<h[2-4]>([\d.]+ [^<]+)", html)
    assert len(titles) == 6 + len(new_ioctls()) + len(vm2.ATTRIBUTES) + 1
    assert html.count("<table") == len(new_ioctls()) + 7


def test_has_every_call_attribute_structure_and_constant() -> None:
    text = api()
    assert set(api_text.CALLS) == set(api_text.ERRORS) == {row.name for row in new_ioctls()}
    assert set(api_text.ATTRIBUTES) == {row.macro for row in vm2.ATTRIBUTES.values()}
    assert all(f":Number: {row.number:#010x}, " in text for row in new_ioctls())
    # The form that every attribute begins with has two structures; the shorter one is for compilers.
    shown = [cls for cls in vm2.STRUCTURES if cls is not vm2.AttrAny]
    for cls in shown:
        literal = "".join(f"  {line}\n" if line else "\n" for line in struct_text(cls).expandtabs(8).splitlines())
        assert literal in text and f"``struct {cls.LAYOUT.c_name}``, {cls.SIZE} bytes" in text
    words = set(re.findall(r"\w+", text))
    assert set(constants()) <= words, set(constants()) - words


def test_a_table_is_as_wide_as_it_says() -> None:
    lines = table([("A", "word " * 40), ("LONGER", "x")]).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == lines[-2] if not lines[-1] else lines[0] == lines[-1]
    assert lines[1].startswith("  A       word") and lines[2].startswith("          word")


# -- every errno


class Client:
    """A C program's view of a described host: descriptors, and memory that stays where it is."""

    def __init__(self, host: str) -> None:
        self.kept: list[Buffer] = []
        self.door = SoftKvm(profile.load(host), Fenced(self.kept))
        self.kvm = self.door.open()

    def place(self, data: bytes) -> int:
        self.kept.append(Buffer(data))
        return self.kept[-1].address

    def attributes(
        self, *attributes: Structure | bytes, count: int | None = None, pad: int = 0, version: int = 0
    ) -> int:
        where = [self.place(one if isinstance(one, bytes) else one.pack()) for one in attributes]
        array = self.place(b"".join(address.to_bytes(8, "little") for address in where))
        number = len(where) if count is None else count
        return self.place(vm2.CreateVm2(version, number, pad, array if number else 0).pack())

    def vm(self, *attributes: Structure) -> int:
        return self.door.ioctl(self.kvm, ioctls.KVM_CREATE_VM2, self.attributes(*attributes))


def size(bits: int) -> vm2.Arm64PhysaddrSize:
    return vm2.Arm64PhysaddrSize(physaddr_bits=bits)


def lists(first: Callable[[Client], int], request: int) -> dict[str, Callable[[], None]]:
    """Provocations of what the three calls with a list have in common."""

    def on(host: str, argument: Callable[[Client], int]) -> Callable[[], None]:
        def call() -> None:
            client = Client(host)
            client.door.ioctl(first(client), request, argument(client))

        return call

    return {
        "EFAULT": on(BIG, lambda c: 16),
        "EINVAL": on(BIG, lambda c: c.attributes(size(20))),
        "E2BIG": on(BIG, lambda c: c.attributes(*[vm2.MaxVcpus()] * 65)),
        "EEXIST": on(BIG, lambda c: c.attributes(size(40), size(40))),
        "ENOENT": on(BIG, lambda c: c.attributes(vm2.AttrHdr(type=99, size=8))),
        "EOPNOTSUPP": on(M1, lambda c: c.attributes(size(48))),
    }


def fixed(data: bytes) -> Callable[[], None]:
    def call() -> None:
        client = Client(BIG)
        address = client.place(data.ljust(vm2.CreateVm2Fixed.SIZE, b"\0")) if data else 16
        client.door.ioctl(client.kvm, ioctls.KVM_CREATE_VM2_FIXED, address)

    return call


def words(arm64: vm2.CreateVm2FixedArm64, version: int = 0) -> bytes:
    return version.to_bytes(8, "little") + arm64.pack()


def describe(asked: vm2.DescribeVm2 | None) -> Callable[[], None]:
    def call() -> None:
        client = Client(BIG)
        client.door.ioctl(client.kvm, ioctls.KVM_DESCRIBE_VM2, client.place(asked.pack()) if asked else 16)

    return call


def get(type: int, room: int, bad: bool = False) -> Callable[[], None]:
    def call() -> None:
        client = Client(BIG)
        where = 16 if bad else client.place(bytes(room or 8))
        client.door.ioctl(client.vm(), ioctls.KVM_VM2_GET_ATTR, client.place(vm2.Vm2Attr(type, room, where).pack()))

    return call


def on_committed(request: int) -> Callable[[], None]:
    def call() -> None:
        client = Client(BIG)
        client.door.ioctl(client.vm(), request, client.attributes())

    return call


def configuring(client: Client) -> int:
    return client.vm(vm2.Negotiate())


SELECT = vm2.CreateVm2FixedArm64(vm2.KVM_ARM_SELECT_IPA, 0, 20)
PROVOCATIONS: dict[str, dict[str, Callable[[], None]]] = {
    "KVM_CREATE_VM2": lists(lambda client: client.kvm, ioctls.KVM_CREATE_VM2),
    "KVM_CREATE_VM2_FIXED": {
        "EFAULT": fixed(b""),
        "EINVAL": fixed(words(SELECT)),
        "E2BIG": fixed(words(vm2.CreateVm2FixedArm64(pad=b"\1" * 5))),
        "EOPNOTSUPP": fixed(words(vm2.CreateVm2FixedArm64(), version=1)),
    },
    "KVM_DESCRIBE_VM2": {
        "EFAULT": describe(None),
        "E2BIG": describe(vm2.DescribeVm2()),
        "EOPNOTSUPP": describe(vm2.DescribeVm2(version=1)),
    },
    "KVM_VM2_SET_ATTRS": lists(configuring, ioctls.KVM_VM2_SET_ATTRS)
    | {"EBUSY": on_committed(ioctls.KVM_VM2_SET_ATTRS)},
    "KVM_VM2_GET_ATTR": {
        "EFAULT": get(2, 8, bad=True),
        "E2BIG": get(9, 8),
        "ENOENT": get(99, 8),
        "EOPNOTSUPP": get(vm2.KVM_CREATE_VM_ATTR_REPORT, 24),
    },
    "KVM_VM2_COMMIT": lists(configuring, ioctls.KVM_VM2_COMMIT) | {"EBUSY": on_committed(ioctls.KVM_VM2_COMMIT)},
}


@pytest.mark.parametrize(
    ("call", "name"), [(call, name) for call, errors in api_text.ERRORS.items() for name in errors]
)
def test_the_errno_is_really_given(call: str, name: str) -> None:
    with pytest.raises(KvmError) as refused:
        PROVOCATIONS[call][name]()
    assert refused.value.name == name


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        ("KVM_CREATE_VM2", lambda c: c.attributes(size(40), pad=1)),
        ("KVM_CREATE_VM2", lambda c: c.attributes(vm2.DryRun(), vm2.Negotiate())),
        ("KVM_CREATE_VM2", lambda c: c.attributes(vm2.MaxVcpus(flags=4))),
        ("KVM_VM2_SET_ATTRS", lambda c: c.attributes(vm2.Negotiate())),
        ("KVM_VM2_COMMIT", lambda c: c.attributes(vm2.Negotiate())),
    ],
)
def test_what_is_said_to_be_malformed_is_einval(call: str, argument: Callable[[Client], int]) -> None:
    client = Client(BIG)
    fd = client.kvm if call == "KVM_CREATE_VM2" else configuring(client)
    with pytest.raises(KvmError) as refused:
        client.door.ioctl(fd, getattr(ioctls, call), argument(client))
    assert refused.value.errno == errno.EINVAL


def test_other_calls_wait_for_the_commit() -> None:
    client = Client(BIG)
    fd = configuring(client)
    with pytest.raises(KvmError) as refused:
        client.door.ioctl(fd, ioctls.KVM_CREATE_VCPU, 0)
    assert refused.value.errno == errno.ENOEXEC
    assert client.door.ioctl(fd, ioctls.KVM_CHECK_EXTENSION, 9) > 0


def test_no_errno_is_missing() -> None:
    """What single wrong bytes in good arguments give is in the tables."""
    listed = {name: {getattr(errno, one) for one in found} for name, found in api_text.ERRORS.items()}
    good = wire.encode([size(40), vm2.MaxVcpus(max_vcpus=4), vm2.ArchCapabilities()], 0)
    seen: dict[str, set[int]] = {name: set() for name in listed}
    for request, base in (("KVM_CREATE_VM2", good), ("KVM_VM2_SET_ATTRS", good), ("KVM_VM2_COMMIT", good)):
        for at in range(len(base)):
            client = Client(BIG)
            fd = client.kvm if request == "KVM_CREATE_VM2" else configuring(client)
            buffer = Buffer(len(base))
            client.kept.append(buffer)
            data = bytearray(wire.encode([size(40), vm2.MaxVcpus(max_vcpus=4), vm2.ArchCapabilities()], buffer.address))
            data[at] ^= 0xFF
            ctypes.memmove(buffer.address, bytes(data), len(data))
            try:
                client.door.ioctl(fd, getattr(ioctls, request), buffer.address)
            except KvmError as error:
                seen[request].add(error.errno or 0)
    for at in range(vm2.CreateVm2Fixed.SIZE):
        data = bytearray(vm2.CreateVm2Fixed.SIZE)
        data[at] = 0xFF
        client = Client(BIG)
        try:
            client.door.ioctl(client.kvm, ioctls.KVM_CREATE_VM2_FIXED, client.place(bytes(data)))
        except KvmError as error:
            seen["KVM_CREATE_VM2_FIXED"].add(error.errno or 0)
    for kind in range(12):
        for room in range(0, 90, 4):
            try:
                get(kind, room)()
            except KvmError as error:
                seen["KVM_VM2_GET_ATTR"].add(error.errno or 0)
    for name, found in seen.items():
        assert found <= listed[name], (name, {errno.errorcode[one] for one in found - listed[name]})
    assert all(len(seen[name]) >= 3 for name in ("KVM_CREATE_VM2", "KVM_CREATE_VM2_FIXED", "KVM_VM2_COMMIT"))
