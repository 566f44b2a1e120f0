"""The numbers, against the kernel's headers where this machine has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvm2.board.virtio import blk, console, net, queue, registers, rng
from kvm2.board.virtio.registers import AT, REGISTERS

HEADERS = Path("/usr/include/linux")
# Names of the specification that the headers spell otherwise.
HEADER_NAMES = {
    "QueueDriver": "QUEUE_AVAIL",
    "QueueDevice": "QUEUE_USED",
    "DeviceID": "DEVICE_ID",
    "VendorID": "VENDOR_ID",
    "InterruptACK": "INTERRUPT_ACK",
    "SHMSel": "SHM_SEL",
    "SHMLen": "SHM_LEN",
    "SHMBase": "SHM_BASE",
}
STATUS_BITS = "ACKNOWLEDGE DRIVER DRIVER_OK FEATURES_OK NEEDS_RESET FAILED"


def defined(header: str) -> dict[str, int]:
    path = HEADERS / header
    if not path.is_file():
        pytest.skip(f"needs the kernel's headers, and there is no {path}")
    found = re.findall(r"^\s*#define\s+(\w+)\s+(0[xX][0-9a-fA-F]+|\d+)\b", path.read_text(), re.MULTILINE)
    return {name: int(value, 0) for name, value in found}


def header_name(name: str) -> str:
    for ours, theirs in HEADER_NAMES.items():
        if name.startswith(ours):
            half = name.removeprefix(ours).upper()
            return f"VIRTIO_MMIO_{theirs}{'_' if half else ''}{half}"
    return "VIRTIO_MMIO_" + re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()


def test_registers_are_the_kernels():
    numbers = defined("virtio_mmio.h")
    # RING_RESET came to MMIO after the header of 6.12.
    compared = {name: header_name(name) for name in AT if header_name(name) in numbers}
    assert set(AT) - set(compared) <= {"QueueReset"}
    for name, theirs in compared.items():
        assert numbers[theirs] == AT[name], name
    assert numbers["VIRTIO_MMIO_CONFIG"] == registers.CONFIG


def test_every_register_is_a_word_of_its_own_with_an_access():
    assert [r.offset for r in REGISTERS] == sorted({r.offset for r in REGISTERS})
    assert all(r.offset % 4 == 0 and r.offset < registers.CONFIG and r.access in ("r", "w", "rw") for r in REGISTERS)


@pytest.mark.parametrize(
    ("header", "prefix", "module", "names"),
    [
        (
            "virtio_config.h",
            "VIRTIO_CONFIG_S_",
            registers,
            STATUS_BITS,
        ),
        ("virtio_config.h", "VIRTIO_", registers, "F_VERSION_1"),
        ("virtio_ring.h", "VIRTIO_RING_", registers, "F_INDIRECT_DESC F_EVENT_IDX"),
        ("virtio_ring.h", "VRING_", queue, "DESC_F_NEXT DESC_F_WRITE DESC_F_INDIRECT AVAIL_F_NO_INTERRUPT"),
        ("virtio_ids.h", "VIRTIO_ID_", blk, "BLOCK"),
        ("virtio_ids.h", "VIRTIO_ID_", console, "CONSOLE"),
        ("virtio_ids.h", "VIRTIO_ID_", net, "NET"),
        ("virtio_ids.h", "VIRTIO_ID_", rng, "RNG"),
        ("virtio_blk.h", "VIRTIO_BLK_", blk, "F_SEG_MAX F_RO F_BLK_SIZE F_FLUSH F_TOPOLOGY F_DISCARD F_WRITE_ZEROES"),
        ("virtio_blk.h", "VIRTIO_BLK_", blk, "T_IN T_OUT T_FLUSH T_GET_ID T_DISCARD T_WRITE_ZEROES ID_BYTES"),
        ("virtio_blk.h", "VIRTIO_BLK_", blk, "S_OK S_IOERR S_UNSUPP"),
        ("virtio_console.h", "VIRTIO_CONSOLE_", console, "F_SIZE F_EMERG_WRITE"),
        ("virtio_net.h", "VIRTIO_NET_", net, "F_MAC F_STATUS S_LINK_UP HDR_F_NEEDS_CSUM"),
    ],
)
def test_constants_are_the_kernels(header, prefix, module, names):
    numbers = defined(header)
    for name in names.split():
        ours = module.ID if prefix == "VIRTIO_ID_" else getattr(module, name)
        assert ours == numbers[prefix + name], name
