"""Battery P3: the life of a vCPU. Every order of calls, against a model written from the published table of errnos."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from kvm2.abi import onereg
from kvm2.softkvm import profile

# The client of tests/softkvm; with --import-mode=importlib a sibling directory's module is loaded by its file.
_PATH = Path(__file__).parents[1] / "softkvm" / "vcpus.py"
_SPEC = importlib.util.spec_from_file_location("kvm2_test_vcpus", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
vcpus = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = vcpus
_SPEC.loader.exec_module(vcpus)

VLS, Z0, P0, X0 = onereg.KVM_REG_ARM64_SVE_VLS, onereg.sve_z(0), onereg.sve_p(0), 0x6030000000100000
HOSTS = ("max-4k-6.12", "a64fx-4k", "max-4k-vl128", "cortex-a57-4k", "max-4k-6.1")
# How the VM was made: the old call; KVM_CREATE_VM2 with neither SVE attribute, with the opt-in, with a set.
MODES = ("old", "neither", "needs-set", "set")
OPERATIONS = (
    *("init sve", "init plain", "vls smallest", "vls host", "vls empty", "read vls"),
    *("finalize", "read z0", "write p0", "read x0", "list", "run"),
)


class Model:
    """What the table says, for one vCPU."""

    def __init__(self, vqs: tuple[int, ...], mode: str) -> None:
        self.vqs, self.mode = vqs, mode
        self.kind = ""  # "", "plain", "sve"
        self.final = self.written = False
        self.top = 0

    def host(self, top: int) -> int:
        return sum(1 << vq - 1 for vq in self.vqs if vq <= top)

    def init(self, kind: str) -> str:
        if kind == "sve" and (not self.vqs or self.mode == "neither"):
            return "EINVAL"
        if self.kind not in ("", kind):
            return "EINVAL"
        self.kind = kind
        if kind == "sve" and not self.final:
            self.top, self.written = max(self.vqs), False
            if self.mode == "set":
                self.top, self.final = min(self.vqs), True
        return ""

    def set_vls(self, value: int) -> str:
        if self.kind != "sve":
            return "ENOENT"
        if self.final:
            return "EPERM"
        if not value or value != self.host(value.bit_length()):
            return "EINVAL"
        self.top, self.written = value.bit_length(), True
        return ""

    def finalize(self) -> str:
        if self.kind != "sve":
            return "EINVAL"
        if self.final or (self.mode == "needs-set" and not self.written):
            return "EPERM"
        self.final = True
        return ""

    def open_or_final(self) -> str:
        return "EPERM" if self.kind == "sve" and not self.final else ""

    def sve_register(self) -> str:
        return "ENOENT" if self.kind != "sve" else self.open_or_final()

    def expect(self, operation: str) -> str:
        if operation.startswith("init"):
            return self.init(operation[5:])
        if not self.kind:
            return "ENOEXEC"
        smallest = self.host(min(self.vqs, default=1))
        writes = {"vls smallest": smallest, "vls host": self.host(max(self.vqs, default=1)), "vls empty": 0}
        if operation in writes:
            return self.set_vls(writes[operation] or 0)
        if operation == "finalize":
            return self.finalize()
        if operation in ("read z0", "write p0"):
            return self.sve_register()
        if operation == "read vls":
            return "" if self.kind == "sve" else "ENOENT"
        return "" if operation == "read x0" else self.open_or_final()


def make(host: str, mode: str):
    vqs = profile.load(host).sve_vqs
    config: dict[str, object] = {"made_by_vm2": mode != "old", "sve_allowed": mode != "neither"}
    if mode == "needs-set":
        config["needs_set_sve_vls"] = True
    if mode == "set":
        config["sve_vls"] = (1 << min(vqs, default=1) - 1,) + (0,) * 7
    return vcpus.Client(vcpus.make_vm(host, **config)), Model(vqs, mode)


def perform(client, operation: str) -> str:
    vqs = client.vm.profile.sve_vqs

    def host(top: int) -> int:
        return sum(1 << vq - 1 for vq in vqs if vq <= top)

    calls = {
        "init sve": lambda: client.init(vcpus.PSCI | vcpus.SVE),
        "init plain": lambda: client.init(vcpus.PSCI),
        "vls smallest": lambda: client.set(VLS, host(min(vqs, default=1))),
        "vls host": lambda: client.set(VLS, host(max(vqs, default=1))),
        "vls empty": lambda: client.set(VLS, 0),
        "read vls": lambda: client.get(VLS),
        "finalize": client.finalize,
        "read z0": lambda: client.get_bytes(Z0),
        "write p0": lambda: client.set(P0, 1),
        "read x0": lambda: client.get(X0),
        "list": client.reg_list,
        "run": client.vcpu.check_runnable,
    }
    return vcpus.name_of(calls[operation])


def play(host: str, mode: str, sequence: tuple[str, ...]) -> None:
    client, model = make(host, mode)
    for position, operation in enumerate(sequence):
        expected, got = model.expect(operation), perform(client, operation)
        assert got == expected, (
            f"{host}, {mode}: {sequence[: position + 1]}: {got or 'works'}, not {expected or 'works'}"
        )
    if model.kind == "sve":
        assert client.get(VLS) == model.host(model.top), sequence


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("host", HOSTS)
def test_every_order_of_two_calls_after_an_init(host, mode):
    for first in ("init sve", "init plain"):
        for rest in itertools.product(OPERATIONS, repeat=2):
            play(host, mode, (first, *rest))


@pytest.mark.parametrize("host", HOSTS)
def test_every_order_of_two_calls_from_the_start(host):
    for sequence in itertools.product(OPERATIONS, repeat=2):
        play(host, "old", sequence)


@pytest.mark.parametrize("mode", MODES)
def test_the_sve_calls_in_every_order_of_five(mode):
    for sequence in itertools.product(("init sve", "vls smallest", "finalize", "run"), repeat=5):
        play("a64fx-4k", mode, sequence)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("host", HOSTS)
def test_every_order_of_three_calls(host, mode):
    for sequence in itertools.product(OPERATIONS, repeat=3):
        play(host, mode, sequence)


def test_every_host_takes_exactly_its_own_sets():
    for host in ("max-4k-6.12", "a64fx-4k", "max-4k-vl128", "max-4k-pow2vl"):
        vqs = profile.load(host).sve_vqs
        client = vcpus.Client(vcpus.make_vm(host))
        client.init(vcpus.PSCI | vcpus.SVE)
        allowed = {sum(1 << vq - 1 for vq in vqs if vq <= top) for top in vqs}
        for mask in (*range(1 << min(max(vqs) + 1, 10)), 1 << 511, (1 << 16) - 1, 1 << 64, max(allowed) | 1 << 70):
            assert (vcpus.name_of(client.set, VLS, mask) == "") == (mask in allowed), (host, hex(mask))
