"""The registers of a virtio device behind MMIO (virtio 1.2, section 4.2.2), and the bits in them.

Offsets, names and bits are those of the specification and of `linux/virtio_mmio.h`, `virtio_config.h`.
"""

from __future__ import annotations

from typing import NamedTuple

SIZE = 0x200
"""Bytes of a device's frame: the registers, and as much configuration space again."""
CONFIG = 0x100
"""Where the device's own configuration space starts."""
REGISTER_BYTES = 4
"""The one width in which registers below `CONFIG` may be accessed."""

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR = int.from_bytes(b"kvm2", "little")


class Register(NamedTuple):
    """One register: its offset in bytes, what the driver may do with it ("r", "w" or "rw"), and what it is."""

    name: str
    offset: int
    access: str
    doc: str


REGISTERS = (
    Register("MagicValue", 0x000, "r", "the letters virt"),
    Register("Version", 0x004, "r", "2: not the legacy interface"),
    Register("DeviceID", 0x008, "r", "the kind of device"),
    Register("VendorID", 0x00C, "r", "the letters kvm2"),
    Register("DeviceFeatures", 0x010, "r", "32 of the features that the device offers"),
    Register("DeviceFeaturesSel", 0x014, "w", "which 32 features DeviceFeatures shows"),
    Register("DriverFeatures", 0x020, "w", "32 of the features that the driver accepts"),
    Register("DriverFeaturesSel", 0x024, "w", "which 32 features DriverFeatures sets"),
    Register("QueueSel", 0x030, "w", "the queue that the registers from QueueNumMax to QueueUsedHigh are about"),
    Register("QueueNumMax", 0x034, "r", "the largest size that the queue may have; 0: there is no such queue"),
    Register("QueueNum", 0x038, "w", "the queue's size in descriptors, a power of two"),
    Register("QueueReady", 0x044, "rw", "1: the device may use the queue"),
    Register("QueueNotify", 0x050, "w", "the number of a queue that has new buffers"),
    Register("InterruptStatus", 0x060, "r", "bit 0: buffers were used; bit 1: the configuration has changed"),
    Register("InterruptACK", 0x064, "w", "bits of InterruptStatus that were handled"),
    Register("Status", 0x070, "rw", "how far the driver is; 0 resets the device"),
    Register("QueueDescLow", 0x080, "w", "guest physical address of the queue's descriptor table"),
    Register("QueueDescHigh", 0x084, "w", "its upper half"),
    Register("QueueDriverLow", 0x090, "w", "guest physical address of the available ring"),
    Register("QueueDriverHigh", 0x094, "w", "its upper half"),
    Register("QueueDeviceLow", 0x0A0, "w", "guest physical address of the used ring"),
    Register("QueueDeviceHigh", 0x0A4, "w", "its upper half"),
    Register("SHMSel", 0x0AC, "w", "the shared memory region that the next four are about"),
    Register("SHMLenLow", 0x0B0, "r", "all ones: there is no such region"),
    Register("SHMLenHigh", 0x0B4, "r", "its upper half"),
    Register("SHMBaseLow", 0x0B8, "r", "all ones"),
    Register("SHMBaseHigh", 0x0BC, "r", "its upper half"),
    Register("QueueReset", 0x0C0, "rw", "0: VIRTIO_F_RING_RESET is not offered"),
    Register("ConfigGeneration", 0x0FC, "r", "another value after every change of the configuration space"),
)

AT = {register.name: register.offset for register in REGISTERS}
"""The offset of each register by its name."""

# Status (section 2.1).
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
DRIVER_STATUS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED
"""The bits that the driver may set."""

# InterruptStatus.
INT_VRING, INT_CONFIG = 1, 2

# Features of queues and transport (section 6), by number.
F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1 = 28, 29, 32
TRANSPORT_FEATURES = 1 << F_INDIRECT_DESC | 1 << F_EVENT_IDX | 1 << F_VERSION_1
"""What every device here offers besides its own."""
