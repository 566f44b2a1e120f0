"""Two things that an Apple M1 has not (shown in docs/pytest.md; it fails, on purpose)."""

import pytest


@pytest.mark.kvm_hosts("apple-m1")
def test_many_vcpus(kvm):
    kvm.create_vm2(max_vcpus=9999)
