"""Structures of the commands of KVM_MEMORY_ENCRYPT_OP on AMD's SEV (asm/kvm.h). No ioctl number depends on them.

>>> SevCmd.SIZE, SevSnpLaunchFinish.SIZE
(24, 88)
"""

from __future__ import annotations

from typing import Annotated, Final

from kvm2.abi.layout import U8, U32, U64, Array, Structure, field, u8, u16, u32, u64

Pad4 = Annotated[tuple[int, ...], Array(U64, 4)]


class SevCmd(Structure, c_name="kvm_sev_cmd"):
    """A command."""

    id: u32 = field(default=0, doc="KVM_SEV_*")
    pad0: u32 = 0
    data: u64 = field(default=0, doc="-> the command's structure")
    error: u32 = field(default=0, doc="out: the firmware's error")
    sev_fd: u32 = field(default=0, doc="/dev/sev")


class SevInit(Structure, c_name="kvm_sev_init"):
    """KVM_SEV_INIT2."""

    vmsa_features: u64 = 0
    flags: u32 = 0
    ghcb_version: u16 = 0
    pad1: u16 = 0
    pad2: Annotated[tuple[int, ...], Array(U32, 8)] = (0,) * 8


class SevLaunchStart(Structure, c_name="kvm_sev_launch_start"):
    """KVM_SEV_LAUNCH_START."""

    handle: u32 = 0
    policy: u32 = 0
    dh_uaddr: u64 = 0
    dh_len: u32 = 0
    pad0: u32 = 0
    session_uaddr: u64 = 0
    session_len: u32 = 0
    pad1: u32 = 0


class SevLaunchUpdateData(Structure, c_name="kvm_sev_launch_update_data"):
    """KVM_SEV_LAUNCH_UPDATE_DATA."""

    uaddr: u64 = 0
    len: u32 = 0
    pad0: u32 = 0


class SevLaunchSecret(Structure, c_name="kvm_sev_launch_secret"):
    """KVM_SEV_LAUNCH_SECRET."""

    hdr_uaddr: u64 = 0
    hdr_len: u32 = 0
    pad0: u32 = 0
    guest_uaddr: u64 = 0
    guest_len: u32 = 0
    pad1: u32 = 0
    trans_uaddr: u64 = 0
    trans_len: u32 = 0
    pad2: u32 = 0


class SevLaunchMeasure(Structure, c_name="kvm_sev_launch_measure"):
    """KVM_SEV_LAUNCH_MEASURE."""

    uaddr: u64 = 0
    len: u32 = 0
    pad0: u32 = 0


class SevGuestStatus(Structure, c_name="kvm_sev_guest_status"):
    """KVM_SEV_GUEST_STATUS."""

    handle: u32 = 0
    policy: u32 = 0
    state: u32 = 0


class SevDbg(Structure, c_name="kvm_sev_dbg"):
    """KVM_SEV_DBG_DECRYPT, KVM_SEV_DBG_ENCRYPT."""

    src_uaddr: u64 = 0
    dst_uaddr: u64 = 0
    len: u32 = 0
    pad0: u32 = 0


class SevAttestationReport(Structure, c_name="kvm_sev_attestation_report"):
    """KVM_SEV_GET_ATTESTATION_REPORT."""

    mnonce: Annotated[bytes, Array(U8, 16)] = bytes(16)
    uaddr: u64 = 0
    len: u32 = 0
    pad0: u32 = 0


class SevSendStart(Structure, c_name="kvm_sev_send_start"):
    """KVM_SEV_SEND_START."""

    policy: u32 = 0
    pad0: u32 = 0
    pdh_cert_uaddr: u64 = 0
    pdh_cert_len: u32 = 0
    pad1: u32 = 0
    plat_certs_uaddr: u64 = 0
    plat_certs_len: u32 = 0
    pad2: u32 = 0
    amd_certs_uaddr: u64 = 0
    amd_certs_len: u32 = 0
    pad3: u32 = 0
    session_uaddr: u64 = 0
    session_len: u32 = 0
    pad4: u32 = 0


class SevSendUpdateData(Structure, c_name="kvm_sev_send_update_data"):
    """KVM_SEV_SEND_UPDATE_DATA."""

    hdr_uaddr: u64 = 0
    hdr_len: u32 = 0
    pad0: u32 = 0
    guest_uaddr: u64 = 0
    guest_len: u32 = 0
    pad1: u32 = 0
    trans_uaddr: u64 = 0
    trans_len: u32 = 0
    pad2: u32 = 0


class SevReceiveStart(Structure, c_name="kvm_sev_receive_start"):
    """KVM_SEV_RECEIVE_START."""

    handle: u32 = 0
    policy: u32 = 0
    pdh_uaddr: u64 = 0
    pdh_len: u32 = 0
    pad0: u32 = 0
    session_uaddr: u64 = 0
    session_len: u32 = 0
    pad1: u32 = 0


class SevReceiveUpdateData(Structure, c_name="kvm_sev_receive_update_data"):
    """KVM_SEV_RECEIVE_UPDATE_DATA."""

    hdr_uaddr: u64 = 0
    hdr_len: u32 = 0
    pad0: u32 = 0
    guest_uaddr: u64 = 0
    guest_len: u32 = 0
    pad1: u32 = 0
    trans_uaddr: u64 = 0
    trans_len: u32 = 0
    pad2: u32 = 0


class SevSnpLaunchStart(Structure, c_name="kvm_sev_snp_launch_start"):
    """KVM_SEV_SNP_LAUNCH_START."""

    policy: u64 = 0
    gosvw: Annotated[bytes, Array(U8, 16)] = bytes(16)
    flags: u16 = 0
    pad0: Annotated[bytes, Array(U8, 6)] = bytes(6)
    pad1: Pad4 = (0,) * 4


class SevSnpLaunchUpdate(Structure, c_name="kvm_sev_snp_launch_update"):
    """KVM_SEV_SNP_LAUNCH_UPDATE."""

    gfn_start: u64 = 0
    uaddr: u64 = 0
    len: u64 = 0
    type: u8 = field(default=0, doc="KVM_SEV_SNP_PAGE_TYPE_*")
    pad0: u8 = 0
    flags: u16 = 0
    pad1: u32 = 0
    pad2: Pad4 = (0,) * 4


class SevSnpLaunchFinish(Structure, c_name="kvm_sev_snp_launch_finish"):
    """KVM_SEV_SNP_LAUNCH_FINISH."""

    id_block_uaddr: u64 = 0
    id_auth_uaddr: u64 = 0
    id_block_en: u8 = 0
    auth_key_en: u8 = 0
    vcek_disabled: u8 = 0
    host_data: Annotated[bytes, Array(U8, 32)] = bytes(32)
    pad0: Annotated[bytes, Array(U8, 3)] = bytes(3)
    flags: u16 = 0
    pad1: Pad4 = (0,) * 4


COMMANDS: Final[dict[int, tuple[str, type[Structure] | None]]] = {
    0: ("KVM_SEV_INIT", None),
    1: ("KVM_SEV_ES_INIT", None),
    2: ("KVM_SEV_LAUNCH_START", SevLaunchStart),
    3: ("KVM_SEV_LAUNCH_UPDATE_DATA", SevLaunchUpdateData),
    4: ("KVM_SEV_LAUNCH_UPDATE_VMSA", None),
    5: ("KVM_SEV_LAUNCH_SECRET", SevLaunchSecret),
    6: ("KVM_SEV_LAUNCH_MEASURE", SevLaunchMeasure),
    7: ("KVM_SEV_LAUNCH_FINISH", None),
    8: ("KVM_SEV_SEND_START", SevSendStart),
    9: ("KVM_SEV_SEND_UPDATE_DATA", SevSendUpdateData),
    10: ("KVM_SEV_SEND_UPDATE_VMSA", None),
    11: ("KVM_SEV_SEND_FINISH", None),
    12: ("KVM_SEV_RECEIVE_START", SevReceiveStart),
    13: ("KVM_SEV_RECEIVE_UPDATE_DATA", SevReceiveUpdateData),
    14: ("KVM_SEV_RECEIVE_UPDATE_VMSA", None),
    15: ("KVM_SEV_RECEIVE_FINISH", None),
    16: ("KVM_SEV_GUEST_STATUS", SevGuestStatus),
    17: ("KVM_SEV_DBG_DECRYPT", SevDbg),
    18: ("KVM_SEV_DBG_ENCRYPT", SevDbg),
    19: ("KVM_SEV_CERT_EXPORT", None),
    20: ("KVM_SEV_GET_ATTESTATION_REPORT", SevAttestationReport),
    21: ("KVM_SEV_SEND_CANCEL", None),
    22: ("KVM_SEV_INIT2", SevInit),
    100: ("KVM_SEV_SNP_LAUNCH_START", SevSnpLaunchStart),
    101: ("KVM_SEV_SNP_LAUNCH_UPDATE", SevSnpLaunchUpdate),
    102: ("KVM_SEV_SNP_LAUNCH_FINISH", SevSnpLaunchFinish),
}
"""Every command by number, with what its `data` points to."""
