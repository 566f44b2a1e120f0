import kvm2
from kvm2.hosts import backend_of, host_names
from kvm2.hosts.soft import format_of, profile_of, stage2_format


def test_each_backend_is_a_machine_of_its_own():
    first, second = backend_of("apple-m1"), backend_of("apple-m1")
    assert first.open() in first.fds() and second.fds() == []


def test_every_described_host_opens_and_describes_itself():
    assert "apple-m1" in host_names()
    for name in host_names():
        with kvm2.open(name) as kvm:
            assert profile_of(kvm.backend).name == name
            if kvm.check_extension("CREATE_VM2") & 8:
                assert list(kvm.describe()) == sorted(kvm.describe())


def test_the_format_of_a_vm_is_that_of_the_rule():
    with kvm2.open("apple-m1") as kvm, kvm.create_vm2(physaddr_bits=36) as vm:
        assert format_of(vm.backend, vm.fd) == stage2_format(kvm.backend, 36)


def test_other_backends_show_nothing(fake):
    assert profile_of(fake) is None and format_of(fake, 3) is None and stage2_format(fake, 40) is None
