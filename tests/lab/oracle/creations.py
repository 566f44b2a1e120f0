"""Creations, and what comes of them, as JSON: `python creations.py HOST`. For a live kernel and its description.

Run as a program (inside the machine too), so it stands alone.
"""

import itertools
import json
import sys

import kvm2
from kvm2.abi import vm2


def vls(word):
    return vm2.Arm64SveVls(vls=(word, *[0] * 7))


def lists():
    """One attribute each, and pairs; nothing about the granule, of which a kernel has one only."""
    sizes = [vm2.Arm64PhysaddrSize(physaddr_bits=bits) for bits in (0, 31, 32, 33, 36, 40, 44, 47, 48, 49, 52, 53, 64)]
    words = [vm2.ArchCapabilities(capabilities=(word,)) for word in (0, 1, 2, 3)]
    sets = [vls(word) for word in (0, 1, 3, 5, 0xB, 0xFFFF)]
    others = [vm2.MaxVcpus(max_vcpus=2), vm2.MaxVcpus(max_vcpus=1 << 20), vm2.MachineType(machine_type=1)]
    yield []
    yield from ([one] for one in (*sizes, *words, *sets, *others))
    yield from ([*pair] for pair in itertools.product(sizes[4:6], (*words[1:], *sets[1:3])))


def sve_calls(vm):
    """INIT, the set, FINALIZE: what each answers on the VM's only vCPU, and the PARange that it sees."""
    answers = []
    vcpu = vm.create_vcpu()
    for call in (
        lambda: vcpu.init(["psci_0_2", "sve"]),
        lambda: vcpu.finalize("sve"),
        lambda: vcpu.set_reg("sve_vls", (1).to_bytes(64, "little")),
        lambda: vcpu.finalize("sve"),
        lambda: len(vcpu.reg_list()),
        lambda: hex(vcpu.get_reg("ID_AA64MMFR0_EL1")),
        lambda: vm.create_vcpu(2).close(),
    ):
        try:
            answers.append(call())
        except kvm2.KvmError as error:
            answers.append(error.name)
    vcpu.close()
    return answers


def outcome(kvm, attributes):
    """The values in force and what follows from them, or errno and findings."""
    try:
        with kvm.create_vm2(attributes) as vm:
            values = [repr(vm.get_attr(kind)) for kind in (1, 2, 6, 7, 9)]
            return values, [vm.check_extension(cap) for cap in ("ARM_SVE", "MAX_VCPUS")], sve_calls(vm)
    except kvm2.KvmError as error:
        found = [(f.attr_index, f.attr_type, f.name, f.offset, f.value, f.min, f.max, f.mask) for f in error.findings]
        return error.name, found


if __name__ == "__main__":
    with kvm2.open(sys.argv[1]) as host:
        print(json.dumps([(repr(one), outcome(host, one)) for one in lists()]))
