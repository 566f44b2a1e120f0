"""One VM on several hosts."""

from __future__ import annotations

import pytest

from kvm2.abi.findings import Finding
from kvm2.errors import HostError, UsageError
from kvm2.kvm import Kvm
from kvm2.lab.hosts_asked import called, probed_of, profile_of, several
from kvm2.lab.on_hosts import on_hosts


def make(bits: int) -> object:
    def made(kvm: Kvm) -> tuple[Finding, ...]:
        with kvm.create_vm2(physaddr_bits=bits) as vm:
            return vm.notes

    return made


def test_each_host_answers_for_itself() -> None:
    answers = on_hosts(["apple-m1", "graviton3", "mainline-6.12"], make(40))  # type: ignore[arg-type]
    assert [(one.host, one.ok, one.error) for one in answers] == [
        ("apple-m1", False, "EOPNOTSUPP"),
        ("graviton3", True, ""),
        ("mainline-6.12", False, "EINVAL"),
    ]
    assert answers[0].findings[0].path == "attrs[0].physaddr_bits"
    assert "no KVM_CREATE_VM2" in answers[2].reason or answers[2].reason
    assert answers[0].to_dict()["findings"]


def test_no_such_host_is_an_error_of_the_question() -> None:
    with pytest.raises(HostError):
        on_hosts(["nosuch"], make(40))  # type: ignore[arg-type]


def test_lists_of_hosts() -> None:
    assert several(("a,b", "c")) == ["a", "b", "c"]
    with pytest.raises(UsageError, match="1 hosts"):
        several(("a",))
    with pytest.raises(UsageError, match="given twice"):
        several(("a", "b,a"))
    assert called("x/y.toml") == "y"
    with pytest.raises(UsageError, match="--mainline"):
        probed_of("apple-m1", mainline=True)
    assert profile_of("apple-m1").ipa_limit == 36
