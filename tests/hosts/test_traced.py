"""A traced backend answers as the one inside does, and tells of everything, however a call ends."""

from __future__ import annotations

import errno
import threading

import pytest

import kvm2
from kvm2.abi import ioctls, show
from kvm2.abi.vm2 import Arm64PhysaddrSize, MaxVcpus, Negotiate
from kvm2.errors import KvmError
from kvm2.hosts import backend_of, watched
from kvm2.hosts.soft import open_soft, profile_of
from kvm2.hosts.traced import Call, Traced, Tracer
from kvm2.kvm import Kvm

# mov w0, #1; str w0, [x0]; ldr w1, [x0]; PSCI SYSTEM_OFF
PROGRAM = bytes.fromhex("20008052 000000b9 010040b9 00018052 0080b072 020000d4")


class Told(list[Call]):
    """A sink that keeps what it is told."""

    def __call__(self, call: Call) -> None:
        self.append(call)

    def names(self) -> list[str]:
        return [f"{call.on} {call.name}".strip() for call in self]

    def of(self, name: str) -> Call:
        return next(call for call in self if call.name == name)


@pytest.fixture
def told() -> Told:
    return Told()


def traced(told: Told, host: str = "apple-m1") -> Kvm:
    with watched(Tracer(told).wrap):
        return kvm2.open(host)


def test_a_guest_from_open_to_close(told: Told) -> None:
    with traced(told) as kvm, kvm.create_vm2(physaddr_bits=36) as vm:
        vm.map(0x4000_0000, 1 << 16).write(0, PROGRAM)
        with vm.create_vcpu(0) as vcpu:
            vcpu.init()
            vcpu.set_reg("pc", 0x4000_0000)
            seen = []
            for exit in vcpu.run():
                seen.append(exit.kind)
                if isinstance(exit, kvm2.Mmio) and not exit.is_write:
                    exit.reply(0x1234)
    assert seen == ["mmio", "mmio", "system_event"]
    assert told.names() == [
        "open",
        "kvm#1 KVM_CREATE_VM2",
        "vm#1 KVM_SET_USER_MEMORY_REGION",
        "vm#1 KVM_CREATE_VCPU",
        "vm#1 KVM_ARM_PREFERRED_TARGET",
        "vcpu#1.0 KVM_ARM_VCPU_INIT",
        "vcpu#1.0 KVM_SET_ONE_REG",
        *["vcpu#1.0 KVM_RUN"] * 3,
        "vcpu#1.0 close",
        "vm#1 close",
        "kvm#1 close",
    ]
    runs = [call for call in told if call.name == "KVM_RUN"]
    assert [show.text(call.exit) for call in runs] == [
        "KVM_EXIT_MMIO{phys_addr=1, data=01000000, len=4, is_write=1}",
        "KVM_EXIT_MMIO{phys_addr=1, len=4, is_write=0}",
        "KVM_EXIT_SYSTEM_EVENT{type=KVM_SYSTEM_EVENT_SHUTDOWN, data=[0]}",
    ]
    assert [call.argument for call in runs] == [None, None, bytes.fromhex("34120000")]
    assert all(call.result is not None and call.error is None and call.seconds >= 0 for call in told)
    assert told.of("KVM_CREATE_VM2").made == "vm#1" and told.of("KVM_CREATE_VCPU").made == "vcpu#1.0"
    assert show.text(told.of("KVM_SET_ONE_REG").argument) == "{id=regs.pc, value=0x40000000}"


def test_a_refusal_with_its_findings(told: Told) -> None:
    with traced(told) as kvm, pytest.raises(KvmError) as refused:
        kvm.create_vm2(max_vcpus=9999)
    call = told.of("KVM_CREATE_VM2")
    assert call.result is None and call.made == "" and call.error is not None and call.error.errno == errno.EOPNOTSUPP
    assert [finding.path for finding in call.findings] == [one.path for one in refused.value.findings]
    assert len(call.findings) == 2


def test_a_refusal_without_findings_has_its_reason(told: Told) -> None:
    with traced(told) as kvm, kvm.create_vm(36) as vm, pytest.raises(KvmError):
        vm.create_vcpu(9999)
    error = told.of("KVM_CREATE_VCPU").error
    assert error is not None and error.reason


def test_notes_of_a_success(told: Told) -> None:
    with traced(told) as kvm:
        kvm.create_vm2([Arm64PhysaddrSize(physaddr_bits=36), MaxVcpus(max_vcpus=9999, flags=2)]).close()
    assert [finding.name for finding in told.of("KVM_CREATE_VM2").findings] == ["note"]


def test_what_makes_no_descriptor_gets_no_name(told: Told) -> None:
    with traced(told) as kvm:
        kvm.dry_run(physaddr_bits=36)
        vm = kvm.create_vm2([Negotiate(), Arm64PhysaddrSize(physaddr_bits=36)])
        vm.commit()
        vm.close()
    dry, made = (call for call in told if call.name == "KVM_CREATE_VM2")
    assert (dry.result, dry.made) == (0, "") and made.made == "vm#1"
    assert "vm#1 KVM_VM2_COMMIT" in told.names()


def test_devices_and_many_of_a_kind(told: Told) -> None:
    with traced(told, "max-4k-gicv2") as kvm, kvm2.open("max-4k-6.12") as unseen:
        with kvm.create_vm() as one, kvm.create_vm() as two:
            two.create_vcpu(3).close()
            one.create_vcpu(1).close()
            one.create_device("vgic-v2", test=True)
            device = one.create_device("vgic-v2")
            assert device is not None
        unseen.api_version()
    assert [call.made for call in told if call.made] == ["kvm#1", "vm#1", "vm#2", "vcpu#2.3", "vcpu#1.1", "device#1"]
    assert "KVM_GET_API_VERSION" not in told.names()


def test_what_is_unknown_is_shown_as_it_is(told: Told) -> None:
    backend = Tracer(told).wrap(open_soft("apple-m1"))
    fd = backend.open()
    for request, arg in ((0x4010AE55, 16), (0xAE99, 5)):
        with pytest.raises(KvmError):
            backend.ioctl(fd, request, arg)
    with pytest.raises(KvmError) as closed:
        backend.ioctl(77, ioctls.KVM_RUN)
    assert closed.value.errno == errno.EBADF
    assert told.names()[1:] == ["kvm#1 _IOW(0xae, 0x55, 16)", "kvm#1 _IO(0xae, 0x99)", "fd 77 _IO(0xae, 0x80)"]
    assert [call.argument for call in told[1:]] == [16, 5, 0]


@pytest.mark.parametrize("address", [0, 16, (1 << 64) - 16, 1 << 63])
def test_bad_addresses_are_the_hosts_business(told: Told, address: int) -> None:
    plain, backend = open_soft("max-4k-6.12"), Tracer(told).wrap(open_soft("max-4k-6.12"))
    for kind in (plain, backend):
        kind.vm = kind.ioctl(kind.open(), ioctls.KVM_CREATE_VM)  # type: ignore[attr-defined]
    tried = 0
    for row in ioctls.ioctls("arm64"):
        if row.direction and "vm" in row.on:
            answers = []
            for kind in (plain, backend):
                try:
                    answers.append(kind.ioctl(kind.vm, row.number, address))  # type: ignore[attr-defined]
                except KvmError as error:
                    answers.append(-(error.errno or 0))
            assert answers[0] == answers[1], row.name
            tried += 1
    assert tried > 10 and len(told) == tried + 2


def test_other_things_of_the_backend_are_reached(told: Told) -> None:
    backend = Tracer(told).wrap(open_soft("apple-m1"))
    assert profile_of(backend) is not None and backend.arch == "arm64"
    assert backend.inspect(backend.open()) is not None
    with pytest.raises(AttributeError):
        _ = backend.no_such_thing


def test_two_layers_with_one_tracer(told: Told) -> None:
    """What is done for a call is inside of it, and descriptors have one name in both."""

    class Lowering(Traced):
        """Asks something before it makes a VM."""

        def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
            if request == ioctls.KVM_CREATE_VM:
                self._inner.ioctl(fd, ioctls.KVM_CHECK_EXTENSION, 165)
            return self._inner.ioctl(fd, request, arg)

        def close(self, fd: int) -> None:
            self._inner.close(fd)

        def open(self) -> int:
            return self._inner.open()

    tracer = Tracer(told)
    backend = tracer.wrap(Lowering(tracer.wrap(open_soft("apple-m1")), tracer))
    vm = backend.ioctl(backend.open(), ioctls.KVM_CREATE_VM, 36)
    backend.ioctl(vm, ioctls.KVM_CREATE_VCPU, 9)
    backend.close(vm)
    assert told.names() == ["open", "kvm#1 KVM_CREATE_VM", "vm#1 KVM_CREATE_VCPU", "vm#1 close"]
    assert [f"{call.on} {call.name}" for call in told[1].inner] == ["kvm#1 KVM_CHECK_EXTENSION", "kvm#1 KVM_CREATE_VM"]
    assert told[1].made == told[1].inner[1].made == "vm#1"
    assert told[2].made == told[2].inner[0].made == "vcpu#1.9"


def test_a_call_that_does_not_come_back_is_told(told: Told) -> None:
    class Stopped:
        arch = "arm64"

        def open(self) -> int:
            return 3

        def ioctl(self, fd: int, request: int, arg: int = 0) -> int:
            raise KeyboardInterrupt

    backend = Tracer(told).wrap(Stopped())  # type: ignore[arg-type]
    fd = backend.open()
    with pytest.raises(KeyboardInterrupt):
        backend.ioctl(fd, ioctls.KVM_CHECK_EXTENSION, 165)
    assert told[-1].stopped == "KeyboardInterrupt" and told[-1].result is None
    assert show.text(told[-1].argument) == "KVM_CAP_ARM_VM_IPA_SIZE"


def test_threads_do_not_mix(told: Told) -> None:
    kvm = traced(told, "max-4k-6.12")

    def ask(number: int) -> None:
        for _ in range(50):
            kvm.check_extension(number)

    threads = [threading.Thread(target=ask, args=(number,), name=f"asker {number}") for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kvm.close()
    asked = [call for call in told if call.name == "KVM_CHECK_EXTENSION"]
    assert len(asked) == 200 and not any(call.inner for call in asked)
    assert all(call.thread == f"asker {call.arg}" for call in asked)
    assert told[0].thread == ""


def test_a_kick_and_an_interrupted_run(told: Told) -> None:
    with traced(told) as kvm, kvm.create_vm2(physaddr_bits=36) as vm, vm.create_vcpu(0) as vcpu:
        vcpu.init()
        vcpu.kick()
        assert isinstance(vcpu.run_once(), kvm2.Interrupted)
    run = told.of("KVM_RUN")
    assert "vcpu#1.0 kick" in told.names()
    assert run.error is not None and run.error.errno == errno.EINTR and run.exit is None


def test_the_short_way_into_kvm_run_is_traced_too(told: Told) -> None:
    backend = Tracer(told).wrap(open_soft("apple-m1"))
    vm = backend.ioctl(backend.open(), ioctls.KVM_CREATE_VM, 36)
    vcpu = backend.ioctl(vm, ioctls.KVM_CREATE_VCPU, 0)

    def explained(error: KvmError) -> KvmError:
        return KvmError(error.errno or 0, "explained")

    with pytest.raises(KvmError, match="explained"):
        backend.runner(vcpu, explained).ioctl(vcpu, ioctls.KVM_RUN)
    assert told[-1].name == "KVM_RUN" and told[-1].error is not None


def test_nothing_is_wrapped_outside_of_the_block(told: Told) -> None:
    with watched(Tracer(told).wrap):
        inside = backend_of("apple-m1")
    assert isinstance(inside, Traced) and not isinstance(backend_of("apple-m1"), Traced)
    with pytest.raises(RuntimeError), watched(Tracer(told).wrap):
        raise RuntimeError
    assert not isinstance(backend_of("apple-m1"), Traced)


def test_a_register_that_is_read(told: Told) -> None:
    with traced(told) as kvm, kvm.create_vm(36) as vm, vm.create_vcpu(0) as vcpu:
        vcpu.init()
        value = vcpu.get_reg("MPIDR_EL1")
    call = told.of("KVM_GET_ONE_REG")
    assert show.text(call.argument) == "{id=MPIDR_EL1}" and call.output == value


def test_a_sink_that_makes_calls_itself() -> None:
    """As when a forgotten handle is collected while a line is written."""
    seen: list[str] = []

    def sink(call: Call) -> None:
        seen.append(f"begin {call.name}")
        if call.name == "KVM_GET_API_VERSION":
            backend.close(fd)
        seen.append(f"end {call.name}")

    backend = Tracer(sink).wrap(open_soft("apple-m1"))
    fd = backend.open()
    backend.ioctl(fd, ioctls.KVM_GET_API_VERSION)
    assert seen[2:] == ["begin KVM_GET_API_VERSION", "end KVM_GET_API_VERSION", "begin close", "end close"]
