"""Described hosts: the software KVM in this process, and what can be looked at behind its descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from pathlib import Path

    from kvm2.hosts.backend import Backend
    from kvm2.softkvm.door import SoftKvm
    from kvm2.softkvm.guest_ids import Lowered
    from kvm2.softkvm.profile import Profile
    from kvm2.softkvm.stage2_format import Format


def open_soft(host: str | Path, working_caps: bool = False, guest_ids: str = "profile") -> SoftKvm:
    """The software KVM of a described host; each call is a new machine. `guest_ids`: as `kvm2.open` has it."""
    from kvm2.softkvm import profile
    from kvm2.softkvm.door import SoftKvm

    described = profile.load(host)
    if working_caps:
        from kvm2.softkvm.working import working

        described = working(described)
    return SoftKvm(described, guest_ids=guest_ids)


def profile_of(backend: Backend) -> Profile | None:
    """The description behind a backend; None where it is not a described host."""
    return getattr(backend, "profile", None)


def stage2_format(backend: Backend, ipa_bits: int, page_shift: int | None = None) -> Format | None:
    """The stage-2 format that a described arm64 host gives a VM of these sizes; None on other hosts."""
    profile = profile_of(backend)
    if profile is None or profile.arch != "arm64":
        return None
    from kvm2.softkvm import stage2_format as rules

    return rules.stage2_format(profile, ipa_bits, page_shift)


def format_of(backend: Backend, fd: int) -> Format | None:
    """The stage-2 format of the VM behind a descriptor, as the software KVM made it; None where it cannot be seen."""
    inspect = getattr(backend, "inspect", None)
    if inspect is None:
        return None
    return cast("Format | None", getattr(inspect(fd), "format", None))


def lowered_for(backend: Backend, fd: int) -> list[Lowered]:
    """What the guest of the vCPU behind a descriptor is shown less of than its host has; none on other hosts, and where
    guests are shown the host's own ID registers."""
    from kvm2.softkvm.guest_ids import CORE, lowered

    profile, inspect = profile_of(backend), getattr(backend, "inspect", None)
    if profile is None or inspect is None:
        return []
    vcpu = inspect(fd)
    return lowered(profile, vcpu.vm.core_model(vcpu)) if vcpu.vm.guest_ids == CORE else []
