import ctypes
import errno
import struct

import pytest

from kvm2.abi import ioctls
from kvm2.board.gic import make_gic
from kvm2.errors import EnvironmentFault, KvmError, UsageError
from kvm2.kvm import Kvm


@pytest.fixture
def made():
    """What was made and set, in order."""
    return []


@pytest.fixture
def host(fake, made):
    """A VM on a host that has these devices: `host("v2", "v3")`."""
    kinds = {5: "v2", 7: "v3", 8: "its"}

    def of(*have):
        names = {}

        def create(fd, arg):
            kind, _, flags = struct.unpack("=III", ctypes.string_at(arg, 12))
            if kinds[kind] not in have:
                raise KvmError(errno.ENODEV)
            if not flags & 1:
                new = fake.new()
                names[new] = kinds[kind]
                made.append(kinds[kind])
                ctypes.memmove(arg + 4, struct.pack("=I", new), 4)
            return 0

        def set_attr(fd, arg):
            _, group, attr, address = struct.unpack("=IIQQ", ctypes.string_at(arg, 24))
            value = int.from_bytes(ctypes.string_at(address, 4 if group == 3 else 8), "little") if address else None
            made.append((names[fd], group, attr, value))
            return 0

        fake.answers[ioctls.KVM_CREATE_DEVICE] = create
        fake.answers[ioctls.KVM_SET_DEVICE_ATTR] = set_attr
        return Kvm(fake, "fake").create_vm()

    return of


def test_a_gicv3_with_its(host, made):
    gic = make_gic(host("v2", "v3", "its"), 2, 64)
    assert made == [
        "v3",
        ("v3", 0, 2, 0x0800_0000),
        ("v3", 0, 3, 0x080A_0000),
        ("v3", 3, 0, 64),
        ("v3", 4, 0, None),
        "its",
        ("its", 0, 4, 0x0808_0000),
        ("its", 4, 0, None),
    ]
    assert (gic.version, gic.irqs, gic.redistributors[0].size) == (3, 64, 0x40000) and gic.its.base == 0x0808_0000


def test_more_vcpus_than_the_first_region_holds(host, made):
    gic = make_gic(host("v3"), 200, 96)
    assert ("v3", 0, 5, 123 << 52 | 0x080A_0000) in made and ("v3", 0, 5, 77 << 52 | 0x1000_0000 | 1) in made
    assert gic.its is None and len(gic.redistributors) == 2


def test_a_host_with_a_gicv2_only(host, made):
    gic = make_gic(host("v2"), 8, 64)
    assert made == ["v2", ("v2", 0, 0, 0x0800_0000), ("v2", 0, 1, 0x0801_0000), ("v2", 3, 0, 64), ("v2", 4, 0, None)]
    assert gic.version == 2


def test_what_cannot_be(host):
    with pytest.raises(EnvironmentFault, match="makes no vGIC"):
        make_gic(host(), 1, 64)
    with pytest.raises(EnvironmentFault, match=r"makes no vGICv3.*it has vGICv2"):
        make_gic(host("v2"), 1, 64, 3)
    with pytest.raises(UsageError, match="serves 8"):
        make_gic(host("v2"), 9, 64)
    with pytest.raises(UsageError, match="GIC version 4"):
        make_gic(host("v3"), 1, 64, 4)
    with pytest.raises(UsageError, match="ITS belongs to a GICv3"):
        make_gic(host("v2", "v3", "its"), 1, 64, 2, True)
    with pytest.raises(KvmError):
        make_gic(host("v3"), 1, 64, None, True)
