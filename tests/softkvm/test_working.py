"""A host that announces only what the software KVM executes."""

import errno

import pytest

import kvm2
from kvm2.abi import caps
from kvm2.errors import KvmError
from kvm2.softkvm import profile, vm_fd
from kvm2.softkvm.working import NOT_WORKING, working

HOSTS = ("max-4k-6.12", "max-4k-mte", "cortex-a57-4k", "max-4k-6.1")


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_is_announced_that_ends_in_a_refusal(name):
    host = profile.load(name)
    assert any(host.caps.get(cap, 0) for cap in NOT_WORKING)
    with kvm2.open(name, working_caps=True) as kvm, kvm.create_vm2() as vm:
        for cap in NOT_WORKING:
            assert kvm.check_extension(cap) == vm.check_extension(cap) == 0
        for cap in (caps.KVM_CAP_USER_MEMORY, caps.KVM_CAP_ONE_REG, caps.KVM_CAP_IRQCHIP):
            assert kvm.check_extension(cap) == 1
        with pytest.raises(KvmError) as refusal:
            vm.create_vcpu().init(("psci_0_2", "pmu_v3"))
        assert refusal.value.errno == errno.EINVAL
        assert vm.create_device("vgic-v3") is not None


def test_every_call_that_comes_later_has_a_capability_that_is_not_announced():
    from kvm2.abi.ioctls import by_number

    announced = working(profile.load("max-4k-6.12")).caps
    for request in vm_fd.LATER:
        row = by_number(request, "vm")
        assert row is not None
        assert row.cap and announced.get(caps.CAPABILITIES[row.cap], 0) == 0, row.name


def test_limits_and_creation_are_those_of_the_host():
    host = profile.load("graviton3")
    same = working(host)
    assert (same.ipa_limit, same.sve_vqs, same.max_vcpus, same.registers) == (
        host.ipa_limit,
        host.sve_vqs,
        host.max_vcpus,
        host.registers,
    )
