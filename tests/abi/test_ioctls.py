"""Request numbers: how they are made, found, and that no two kinds of call are mixed up."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm2.abi import caps, exits, ioc, ioctls, ioctls_x86


@given(st.sampled_from(["", "w", "r", "wr"]), st.integers(0, 255), st.integers(0, (1 << 14) - 1))
def test_numbers_and_back(direction: str, nr: int, size: int) -> None:
    number = ioc.ioc(direction, nr, size)
    assert ioc.split(number) == (direction, 0xAE, nr, size)
    assert number >> 32 == 0


@pytest.mark.parametrize(("nr", "size"), [(256, 0), (-1, 0), (0, 1 << 14), (0, -1)])
def test_what_does_not_fit(nr: int, size: int) -> None:
    with pytest.raises(ValueError, match="no request number"):
        ioc.ioc("w", nr, size)


def test_a_number_of_more_than_32_bits() -> None:
    with pytest.raises(ValueError, match="more than 32 bits"):
        ioc.split(1 << 32)


@pytest.mark.parametrize("module", [ioctls, ioctls_x86])
def test_constants_have_the_name_of_their_row(module: object) -> None:
    rows = {row.name: row.number for row in module.IOCTLS}  # type: ignore[attr-defined]
    numbers = {name: value for name, value in vars(module).items() if name.startswith("KVM_")}
    assert rows == numbers
    assert len(rows) == len(module.IOCTLS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("arch", ["arm64", "x86_64"])
def test_a_number_means_one_thing_on_one_kind_of_fd(arch: str) -> None:
    pairs = [(row.number, kind) for row in ioctls.ioctls(arch) for kind in row.on]
    assert len(pairs) == len(set(pairs))
    for number, kind in pairs:
        row = ioctls.by_number(number, kind, arch)
        assert row is not None
        assert (row.number, kind in row.on, arch in row.arches) == (number, True, True)


def test_the_same_nr_with_other_sizes() -> None:
    listed, fixed = ioctls.named("KVM_CREATE_VM2")[0], ioctls.named("KVM_CREATE_VM2_FIXED")[0]
    assert (listed.nr, fixed.nr, listed.size, fixed.size) == (0x0C, 0x0C, 16, 128)
    assert ioctls.by_number(ioc.iow(0x0C, 17), "system") is None


def test_what_a_kernel_does_not_offer() -> None:
    assert ioctls.by_number(ioctls_x86.KVM_GET_REGS, "vcpu", "arm64") is None
    assert ioctls.by_number(ioctls_x86.KVM_GET_REGS, "vcpu", "x86_64") is not None
    assert ioctls.by_number(ioctls.KVM_ARM_VCPU_INIT, "vcpu", "x86_64") is None
    assert ioctls.by_number(ioctls.KVM_ENABLE_CAP, "vcpu", "arm64") is None
    assert ioctls.by_number(ioctls.KVM_ENABLE_CAP, "vcpu", "x86_64") is not None
    assert [row.arches for row in ioctls.named("KVM_SET_GUEST_DEBUG")] == [("arm64",), ("x86_64",)]
    assert ioctls.named("KVM_NIX") == ()


def test_capabilities_of_ioctls_exist() -> None:
    for row in ioctls.ioctls():
        assert row.cap is None or row.cap in caps.CAPABILITIES, row
        assert row.doc.endswith(".")
        assert set(row.on) <= {"system", "vm", "vcpu", "device"}


def test_names_of_numbers() -> None:
    assert caps.name_of(165) == "KVM_CAP_ARM_VM_IPA_SIZE"
    assert (caps.name_of(5), caps.name_of(1024)) == ("KVM_CAP_5", "KVM_CAP_CREATE_VM2")
    assert list(caps.CAPABILITIES.values()) == sorted(caps.CAPABILITIES.values())
    assert (exits.name_of(6), exits.name_of(99)) == ("KVM_EXIT_MMIO", "KVM_EXIT_99")
    debug = exits.payload_of(exits.KVM_EXIT_DEBUG, "x86_64")
    assert debug is not None
    assert (debug.SIZE, exits.Debug.SIZE, exits.payload_of(99)) == (32, 16, None)


def test_arm64_needs_no_structure_of_x86() -> None:
    code = (
        "import sys; from kvm2.abi import ioctls; ioctls.by_number(ioctls.KVM_RUN, 'vcpu');"
        "print([m for m in sys.modules if 'x86' in m or 'sev' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
