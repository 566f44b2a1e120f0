"""The device attributes of the virtual GIC: groups, attributes, and how an attribute says what it is about.

From asm/kvm.h and Documentation/virt/kvm/devices/arm-vgic.rst, arm-vgic-v3.rst.
"""

from __future__ import annotations

from typing import Final

from kvm2.abi.gic_registers import GICC, GICD_V2, GICD_V3, GICR, SIZE_4K, SIZE_64K

KVM_DEV_ARM_VGIC_GRP_ADDR: Final = 0
KVM_DEV_ARM_VGIC_GRP_DIST_REGS: Final = 1
KVM_DEV_ARM_VGIC_GRP_CPU_REGS: Final = 2
KVM_DEV_ARM_VGIC_GRP_NR_IRQS: Final = 3
KVM_DEV_ARM_VGIC_GRP_CTRL: Final = 4
KVM_DEV_ARM_VGIC_GRP_REDIST_REGS: Final = 5
KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS: Final = 6
KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO: Final = 7
KVM_DEV_ARM_VGIC_GRP_ITS_REGS: Final = 8

# Of group ADDR; each value is 8 bytes.
KVM_VGIC_V2_ADDR_TYPE_DIST: Final = 0
KVM_VGIC_V2_ADDR_TYPE_CPU: Final = 1
KVM_VGIC_V3_ADDR_TYPE_DIST: Final = 2
KVM_VGIC_V3_ADDR_TYPE_REDIST: Final = 3
KVM_VGIC_ITS_ADDR_TYPE: Final = 4
KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION: Final = 5

VGIC_ADDR_UNDEF: Final = (1 << 64) - 1  # an address that was not set
KVM_VGIC_V2_DIST_SIZE: Final = GICD_V2.size
KVM_VGIC_V2_CPU_SIZE: Final = GICC.size
KVM_VGIC_V3_DIST_SIZE: Final = GICD_V3.size
KVM_VGIC_V3_REDIST_SIZE: Final = GICR.size
V2_ALIGNMENT, V3_ALIGNMENT = SIZE_4K, SIZE_64K

# The value of a redistributor region: count 63:52, base 51:16, flags 15:12, index 11:0.
RDIST_COUNT_SHIFT, RDIST_COUNT_MASK = 52, 0xFFF
RDIST_BASE_MASK: Final = (1 << 52) - (1 << 16)
RDIST_FLAGS_SHIFT, RDIST_FLAGS_MASK = 12, 0xF
RDIST_INDEX_MASK: Final = 0xFF  # a u8 in the kernel, whatever the field is

# Of group CTRL.
KVM_DEV_ARM_VGIC_CTRL_INIT: Final = 0
KVM_DEV_ARM_ITS_SAVE_TABLES: Final = 1
KVM_DEV_ARM_ITS_RESTORE_TABLES: Final = 2
KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES: Final = 3
KVM_DEV_ARM_ITS_CTRL_RESET: Final = 4

# Register groups: the offset in the low word, the vCPU in the high one (v2: id 39:32; v3: affinity 63:32).
OFFSET_MASK: Final = 0xFFFFFFFF
VCPU_SHIFT: Final = 32
V2_CPUID_MASK: Final = 0xFF
V3_MPIDR_MASK: Final = 0xFFFFFFFF
SYSREG_MASK: Final = 0xFFFF  # Op0 15:14, Op1 13:11, CRn 10:7, CRm 6:3, Op2 2:0

# Group LEVEL_INFO: what 31:10, first interrupt 9:0.
LINE_LEVEL_INFO_SHIFT, LINE_LEVEL_INFO_MASK = 10, 0x3FFFFF
LINE_LEVEL_INTID_MASK: Final = 0x3FF
VGIC_LEVEL_INFO_LINE_LEVEL: Final = 0

VGIC_V2_MAX_CPUS: Final = 8
VGIC_NR_PRIVATE_IRQS: Final = 32
VGIC_MIN_IRQS, VGIC_MAX_RESERVED, VGIC_IRQS_STEP = 64, 1023, 32  # of NR_IRQS: 64 to 992
