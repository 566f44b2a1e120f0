"""The registry against a real kernel's headers: structures, offsets, numbers, and that nothing is missing."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvm2.abi import caps, exits, ioctls
from kvm2.abi.gen.mainline import check, structures

Compile = Callable[..., subprocess.CompletedProcess[str]]

ARCHES = {"arm64": ("aarch64-linux-gnu-gcc", "arm64"), "x86_64": ("gcc", "x86")}

CHECKS = ("kvm_vm_ioctl_check_extension", "kvm_vm_ioctl_check_extension_generic")

# KVMIO ioctls of linux/kvm.h that neither architecture has.
OF_OTHERS = {
    "KVM_S390_": "s390",
    "KVM_PPC_": "powerpc",
    "KVM_CREATE_SPAPR_TCE": "powerpc",
    "KVM_ALLOCATE_RMA": "powerpc, and gone since 3.20",
    "KVM_DIRTY_TLB": "powerpc (KVM_CAP_SW_TLB)",
    "KVM_GET_NR_MMU_PAGES": "was x86's; no 6.12 kernel handles it any more",
}
# Structures of the two headers that are no payload, or another architecture's.
NO_PAYLOAD = {
    "kvm_config_tlb": "powerpc",
    "kvm_dirty_tlb": "powerpc",
    "kvm_vfio_spapr_tce": "powerpc",
    "kvm_fpu": "empty on arm64",
    "kvm_sregs": "empty on arm64",
    "kvm_vmx_nested_state_data": "two pages of bytes behind kvm_nested_state",
    "kvm_svm_nested_state_data": "a page of bytes behind kvm_nested_state",
    "kvm_run": "in abi.exits",
    "kvm_hyperv_exit": "in abi.exits",
    "kvm_xen_exit": "in abi.exits",
}


def compile_check(compile_c: Compile, kernel: Path, arch: str, source: Path) -> tuple[int, str]:
    compiler, name = ARCHES[arch]
    includes = (f"arch/{name}/include/uapi", f"stub_{name}", "include/uapi")
    flags = ["-nostdinc", "-D__user=", "-D__EXPORTED_HEADERS__", "-fsyntax-only", "-Werror"]
    flags += [f"-I{kernel / directory}" for directory in includes]
    done = compile_c(compiler, *flags, source)
    return done.returncode, done.stderr


@pytest.mark.parametrize("arch", ARCHES)
def test_structures_and_numbers(compile_c: Compile, kernel: Path, tmp_path: Path, arch: str) -> None:
    source = tmp_path / "check.c"
    source.write_text(check(arch))
    assert compile_check(compile_c, kernel, arch, source) == (0, "")


@pytest.mark.parametrize("arch", ARCHES)
def test_the_comparison_bites(compile_c: Compile, kernel: Path, tmp_path: Path, arch: str) -> None:
    text = check(arch)
    assert text.count("SAME(") > 1000
    for right, wrong in (
        ("SAME(sizeof(struct kvm_irqfd), 32)", "SAME(sizeof(struct kvm_irqfd), 40)"),
        ("SAME(KVM_EXIT_MMIO, 0x6ULL)", "SAME(KVM_EXIT_MMIO, 0x7ULL)"),
        ("SAME(KVM_RUN, 0xae80U)", "SAME(KVM_RUN, 0xae81U)"),
    ):
        assert right in text
        source = tmp_path / "wrong.c"
        source.write_text(text.replace(right, wrong))
        code, said = compile_check(compile_c, kernel, arch, source)
        assert code != 0
        assert said.count("error:") == 1


def headers(kernel: Path, *names: str) -> str:
    text = "".join((kernel / name).read_text() for name in names)
    return text.replace("\\\n", " ")


def test_every_ioctl_is_there(kernel: Path) -> None:
    text = headers(kernel, "include/uapi/linux/kvm.h", *(f"arch/{a}/include/uapi/asm/kvm.h" for a in ("arm64", "x86")))
    theirs = set(re.findall(r"#\s*define\s+(KVM_\w+)\s+_IO[RW]*\(\s*KVMIO", text))
    assert len(theirs) > 140
    excluded = {name for name in theirs if name.startswith(tuple(OF_OTHERS))}
    assert all(any(name.startswith(prefix) for name in excluded) for prefix in OF_OTHERS)
    ours = {row.name for row in ioctls.ioctls() if row.cap != "KVM_CAP_CREATE_VM2"}
    assert ours == theirs - excluded


def test_every_capability_and_exit_is_there(kernel: Path) -> None:
    text = headers(kernel, "include/uapi/linux/kvm.h")
    theirs = {name: int(value) for name, value in re.findall(r"#define (KVM_CAP_\w+)\s+(\d+)", text)}
    assert theirs == {name: value for name, value in caps.CAPABILITIES.items() if name != "KVM_CAP_CREATE_VM2"}
    start = text.index("#define KVM_EXIT_UNKNOWN")
    block = text[start : text.index("/* For KVM_EXIT_INTERNAL_ERROR */")]
    reasons = {name: int(value) for name, value in re.findall(r"#define (KVM_EXIT_\w+)\s+(\d+)", block)}
    assert reasons == {row.name: row.number for row in exits.EXITS.values()}


def test_the_capabilities_that_arm64_answers_are_explained(kernel: Path) -> None:
    sources = (kernel / "arch/arm64/kvm/arm.c").read_text(), (kernel / "virt/kvm/kvm_main.c").read_text()
    first, second = (
        text[text.index(f"{start}(struct kvm *kvm, long ") :] for text, start in zip(sources, CHECKS, strict=True)
    )
    asked = re.findall(r"case (KVM_CAP_\w+):", first[: first.index("\n}")] + second[: second.index("\n}")])
    assert len(asked) > 60
    others = {"KVM_CAP_MULTI_ADDRESS_SPACE", "KVM_CAP_MEMORY_ATTRIBUTES", "KVM_CAP_GUEST_MEMFD"}  # configured away
    explained = {caps.name_of(number) for number in caps.MEANINGS} - {"KVM_CAP_CREATE_VM2", "KVM_CAP_VM_TYPES"}
    assert explained == set(asked) - others


@pytest.mark.parametrize("arch", ARCHES)
def test_every_structure_is_there(kernel: Path, arch: str) -> None:
    text = headers(kernel, "include/uapi/linux/kvm.h", f"arch/{ARCHES[arch][1]}/include/uapi/asm/kvm.h")
    theirs = set(re.findall(r"^struct (\w+) \{", text, re.M))
    # x86's structures in linux/kvm.h itself: declared with x86's.
    ours = {cls.LAYOUT.c_name for one in ARCHES for cls in structures(one)}
    here = {cls.LAYOUT.c_name for cls in structures(arch)}
    assert theirs - ours - set(NO_PAYLOAD) == set()
    assert here - theirs - {"user_pt_regs", "user_fpsimd_state"} == set()


@pytest.mark.parametrize("arch", ARCHES)
def test_payloads_have_the_size_in_the_number(arch: str) -> None:
    from kvm2.abi.layout import extent

    for row in ioctls.ioctls(arch):
        assert row.number & 0xFF == row.nr
        if row.direction:
            assert row.payload is not None
            assert row.size == extent(row.payload)[0]
        else:
            assert row.size == 0
