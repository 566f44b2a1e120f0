"""The operations in a VMM's words: what they ask, and the findings, notes and fields in their answers."""

from __future__ import annotations

from typing import Any

import pytest

from kvm2.abi import vm2
from kvm2.errors import UsageError
from kvm2.hosts.soft import open_soft
from kvm2.lab.engine import play
from kvm2.lab.lowering_vm2 import attributes_of
from kvm2.lab.oplist import check
from kvm2.lab.scenarios import Scenario, Step


def played(host: str, *steps: Step) -> tuple[Any, ...]:
    scenario = Scenario("test", steps)
    check(scenario)
    door = open_soft(host)
    done = play(door, scenario, {})
    assert done.faults == ()
    assert not door.fds()  # nothing stays open
    return done.answers


def test_a_refusal_has_every_finding() -> None:
    (answer,) = played("apple-m1", {"op": "create_vm2", "id": "vm", "physaddr_bits": 48, "max_vcpus": 9999})
    assert answer[:2] == [-1, "ENOTSUP"]
    found = answer[2]["findings"]
    assert [(f["path"], f["value"], f["max"]) for f in found] == [
        ("attrs[0].physaddr_bits", 48, 36), ("attrs[1].max_vcpus", 9999, 512),
    ]  # fmt: skip
    assert found[0]["hint"] == "ask for 36 or fewer, or use 'auto'"


def test_creation_by_every_way_and_what_it_gave() -> None:
    answers = played(
        "graviton3",
        {"op": "create_vm2", "id": "a", "physaddr_bits": "auto", "memory": ["1G@1T"], "sve": 128, "page_shift": 16},
        {"op": "get_attr", "vm": "a", "attr": "ARM64_PHYSADDR_SIZE"},
        {"op": "get_attr", "vm": "a", "attr": "ARM64_SVE_VLS"},
        {"op": "get_attr", "vm": "a", "attr": "ARM64_GRANULE"},
        {"op": "create_vm2_fixed", "id": "b", "physaddr_bits": 44, "sve": 256},
        {"op": "get_attr", "vm": "b", "attr": "ARM64_PHYSADDR_SIZE"},
        {"op": "create_vm2_list", "id": "c", "attributes": [{"attr": "MAX_VCPUS", "max_vcpus": 3}]},
        {"op": "check_ext", "fd": "c", "cap": 66},
        {"op": "create_vm2", "id": "d", "dry_run": True},
        {"op": "check_ext", "fd": "d", "cap": 66},
    )
    assert answers == (
        [0, 0], [0, 0, {"physaddr_bits": 41}], [0, 0, {"vls": [1, 0, 0, 0, 0, 0, 0, 0]}], [0, 0, {"page_shift": 16}],
        [0, 0], [0, 0, {"physaddr_bits": 44}], [0, 0], [3, 0], [0, 0], "skipped",
    )  # fmt: skip


def test_what_cannot_be_read_back() -> None:
    create: Step = {"op": "create_vm2", "id": "vm", "physaddr_bits": 36}
    answers = played(
        "apple-m1", create, {"op": "get_attr", "vm": "vm", "attr": "DRY_RUN"}, {"op": "describe"},
    )  # fmt: skip
    assert answers[1] == [-1, "ENOTSUP"]
    assert answers[2][2]["ARM64_PHYSADDR_SIZE"] == {"def": 40, "min": 32, "max": 36, "mask": 0x1F << 32}
    assert played("mainline-m1", {"op": "describe"}) == ([-1, "EINVAL"],)


def test_negotiation_step_by_step() -> None:
    size = {"attr": "ARM64_PHYSADDR_SIZE", "physaddr_bits": 33}
    answers = played(
        "apple-m1",
        {"op": "create_vm2", "id": "vm", "negotiate": True},
        {"op": "commit", "vm": "vm"},
        {"op": "set_attrs", "vm": "vm", "attributes": [size]},
        {"op": "commit", "vm": "vm"},
        {"op": "commit", "vm": "vm"},
        {"op": "get_attr", "vm": "vm", "attr": "ARM64_PHYSADDR_SIZE"},
    )
    assert answers[1][1] == "ENOTSUP" and answers[1][2]["findings"][0]["value"] == 40
    assert answers[2:] == ([0, 0], [0, 0], [-1, "EBUSY"], [0, 0, {"physaddr_bits": 33}])


def test_registers_and_features_by_name() -> None:
    vcpu: Step = {"op": "create_vcpu", "vm": "vm", "id": "v0", "vcpu_id": 0}
    answers = played(
        "graviton3",
        {"op": "create_vm", "id": "vm", "type": 0},
        vcpu,
        {"op": "get_register", "vcpu": "v0", "register": "pc"},
        {"op": "init", "vm": "vm", "vcpu": "v0", "features": ["psci_0_2", "sve"]},
        {"op": "set_register", "vcpu": "v0", "register": "pc", "value": 0x40000000},
        {"op": "get_register", "vcpu": "v0", "register": "pc"},
        {"op": "get_register", "vcpu": "v0", "register": "sve_vls"},
        {"op": "init", "vm": "vm", "vcpu": "v0", "features": ["has_el2"]},
    )
    assert answers[2:] == (
        [-1, "ENOEXEC"], [0, 0], [0, 0], [0, 0, 0x40000000], [0, 0, 3], [-1, "ENOENT"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"op": "create_vm2", "id": "vm", "physaddr_bits": "most"}, 'a number of bits, "auto" or "max"'),
        ({"op": "create_vm2", "id": "vm", "sve": "all"}, 'a length in bits, or "vcpu"'),
        ({"op": "create_vm2", "id": "vm", "sve": 100}, "multiples of 128"),
        ({"op": "create_vm2", "id": "vm", "memory": ["1G"]}, "1G"),
        ({"op": "create_vm2", "id": "vm", "physaddr_bits": "auto"}, "needs the memory map"),
        ({"op": "create_vm2_list", "id": "vm", "attributes": [{"attr": "NOTHING"}]}, "attr is one of"),
        ({"op": "create_vm2_list", "id": "vm", "attributes": [{"attr": "MAX_VCPUS", "n": 1}]}, "has no field 'n'"),
        ({"op": "create_vm2_list", "id": "vm", "attributes": ["MAX_VCPUS"]}, "is not attributes"),
        ({"op": "init", "vm": "kvm", "vcpu": "kvm", "features": "sve"}, "a list of names"),
        ({"op": "set_register", "vcpu": "kvm", "register": "pc", "value": 1 << 64}, "pc has 8 bytes"),
        ({"op": "get_register", "vcpu": "kvm", "register": "no_such"}, "is not a register"),
    ],
)
def test_what_is_said_wrongly(step: Step, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        played("graviton3", step)


def test_attributes_are_filled_up() -> None:
    (vls,) = attributes_of([{"attr": "ARM64_SVE_VLS", "vls": [5]}])
    assert vls == vm2.Arm64SveVls(vls=(5, 0, 0, 0, 0, 0, 0, 0))
    (caps,) = attributes_of([{"attr": "ARCH_CAPABILITIES", "capabilities": [1]}])
    assert caps == vm2.ArchCapabilities(capabilities=(1,))
