"""A kernel's bare errnos in words: nearly every refusal of the recorded scenarios gets a reason, and the right one."""

import pytest

from kvm2.abi import ioctls as io
from kvm2.errors import KvmError
from kvm2.hosts.soft import open_soft
from kvm2.kvm import Kvm
from kvm2.lab import bundled
from kvm2.lab.engine import play

from .soft_kernel import lowered

HOST = "max-4k-6.12"
WAITING = ("run/", "ipa/", "vgic/", "irq/")


class Listening:
    """A backend that remembers refusals: (ioctl, errno, whether there was a reason)."""

    def __init__(self, backend):
        self._backend, self.refused = backend, []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def ioctl(self, fd, request, arg=0):
        try:
            return self._backend.ioctl(fd, request, arg)
        except KvmError as error:
            row = next((row.name for row in io.ioctls(None) if row.number == request), hex(request))
            self.refused.append((row, error.name, bool(error.reason or error.findings)))
            raise


def test_the_refusals_of_the_recorded_scenarios_are_explained():
    backend = Listening(lowered(HOST))
    scenarios = [s for s in bundled.scenarios(4096) if not s.name.startswith(WAITING)]
    for scenario in scenarios:
        play(backend, scenario, bundled.guests())
    refused = [one for one in backend.refused if one[1] != "EINTR"]
    silent = sorted({one[:2] for one in refused if not one[2]})
    assert len(refused) > 500
    assert not silent


@pytest.mark.parametrize("name", ("apple-m1", "cortex-a57-4k", "max-4k-6.12"))
def test_the_type_word(name):
    kvm, native = Kvm(lowered(name), "/dev/kvm"), Kvm(open_soft(name), name)
    for word in (0, 1, 31, 32, 40, 45, 53, 255, 256, 0x128, 1 << 31):
        try:
            native.create_vm(word).close()
            continue
        except KvmError as error:
            expected = error.errno
        with pytest.raises(KvmError) as caught:
            kvm.create_vm(word)
        assert caught.value.errno == expected
        limit = str(native.check_extension("ARM_VM_IPA_SIZE"))
        assert limit in caught.value.reason or "bits [7:0]" in caught.value.reason
    if name == "apple-m1":
        with pytest.raises(KvmError, match="the default of 40 IPA bits, this host has 36"):
            kvm.create_vm()


def test_slots_and_vcpus():
    kvm = Kvm(lowered("neoverse-n1-4k"), "/dev/kvm")
    vm = kvm.create_vm(36)
    vm.map(0x10000, 0x2000)
    for call, words in (
        (lambda: vm.map(0x11000, 0x2000), "overlap"),
        (lambda: vm.map((1 << 36) - 0x1000, 0x2000), "IPA space of 36 bits"),
        (lambda: vm.create_vcpu(600), "this kernel takes 0..511"),
    ):
        with pytest.raises(KvmError, match=words):
            call()
    vcpu = vm.create_vcpu(0)
    with pytest.raises(KvmError, match="exists already"):
        vm.create_vcpu(0)
    with pytest.raises(KvmError, match="KVM_ARM_VCPU_INIT comes first"):
        vcpu.run_once()


def test_a_reason_that_is_there_already_stays():
    backend = lowered("neoverse-n1-4k")
    error = KvmError(22, "said before")
    assert backend.reasons.explained(error, 3, io.KVM_CREATE_VM, 0) is error
