"""F1: hostile bytes for KVM_CREATE_VM2. The normal run is short; the whole battery is a program:

    python tests/batteries/test_f1_create_vm2.py [COUNT [SEED]]

What must hold for any bytes: nothing but KvmError; the same errno and offsets when asked again; no byte read beyond
what the caller declared; a refusal says why. What is well-formed comes back as the same objects.
"""

import errno
import multiprocessing
import os
import random
import struct
import sys
import time

import pytest

from kvm2.abi import vm2
from kvm2.abi.wire import Buffer, decode, encode
from kvm2.errors import KvmError
from kvm2.softkvm import creation, profile
from kvm2.softkvm.vmconfig import Configuring, VmConfig

BASE = 0x7F00_0000_1000
RECORDS = 0x10
HOSTS = ("max-4k-6.12", "apple-m1", "a64fx-4k", "max-4k-protected", "armv9-64k-52", "x86-64", "vm2-list-only")
HEADER = struct.Struct("=IHH")

PLAIN = (
    vm2.ArchCapabilities(capabilities=(2,)),
    vm2.Arm64PhysaddrSize(physaddr_bits=36),
    vm2.MachineType(),
    vm2.Arm64SveVls(vls=(1,) + (0,) * 7),
    vm2.Arm64Granule(page_shift=12),
    vm2.MaxVcpus(max_vcpus=2),
)
SHAPES = (
    (),
    PLAIN[:2],
    PLAIN,
    (vm2.Report(records=RECORDS, capacity=4), *PLAIN[1:]),
    (vm2.DryRun(), PLAIN[1]),
    (PLAIN[5], vm2.Negotiate(), vm2.Report()),
    (PLAIN[1], PLAIN[1], vm2.AttrHdr(type=99, flags=1), vm2.AttrHdr(type=99)),
)


class Guard(Buffer):
    """The client's buffer. Reads of an attribute are held against the size that its own header declares."""

    def __init__(self, base, data):
        super().__init__(base, data)
        self.seen = []
        self.written = 0

    def read(self, address, size):
        data = super().read(address, size)
        self.seen.append((address, size, data))
        return data

    def write(self, address, data):
        start = address - self.base
        if not (start >= 0 and start + len(data) <= len(self.data)):
            raise KvmError(errno.EFAULT, "outside")
        self.written += len(data)

    def check(self):
        """None beyond an attribute's declared size; not more reads than a list has parts. (Parts may overlap.)"""
        declared = {}
        for number, (address, size, data) in enumerate(self.seen):
            if number < 2:
                continue
            if size == 8:
                kind, length, _ = HEADER.unpack(data)
                declared[address + 8] = max(declared.get(address + 8, 24), 8 + length // 8 if kind == 1 else length)
            elif address in declared:
                assert size + 8 <= declared[address], "read beyond the declared size"
        assert len(self.seen) <= 2 + 3 * vm2.KVM_CREATE_VM2_MAX_ATTRS + 1


def outcome(described, memory, call):
    """What came of it: ("error", errno, places) or the kind of result."""
    try:
        made = call(described, memory, BASE)
    except KvmError as error:
        assert error.findings, "a refusal without a finding"
        assert error.errno in (f.error for f in error.findings)
        if error.errno != errno.EFAULT:
            assert error.errno == next(f.error for f in error.findings if f.error)
        return "error", error.errno, tuple((f.attr_index, f.attr_type, f.error, f.offset) for f in error.findings)
    assert isinstance(made, VmConfig | Configuring) or made == 0
    return "made", type(made).__name__, made if isinstance(made, VmConfig) else None


def throw(data, described, again, call=creation.create_vm2):
    """Throws bytes at a host and checks everything that must hold."""
    memory = Guard(BASE, data)
    first = outcome(described, memory, call)
    memory.check()
    if again:
        assert outcome(described, Guard(BASE, data), call) == first
    return first


# ---- what is thrown


def flips(data):
    """Every single byte changed, in three ways."""
    for at in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            yield data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]


def sizes(data):
    """Every length from nothing to twice the buffer, the rest zero or not."""
    for size in range(len(data)):
        yield data[:size]
    for more in range(len(data) + 1):
        yield data + bytes(more)
        yield data + b"\xff" * more


def moved(attributes, by):
    """The same list with its attributes moved by `by` bytes, so that they are not aligned."""
    data = encode(attributes, BASE)
    count = len(attributes)
    head = 16 + 8 * count
    pointers = [p + by for p in struct.unpack_from(f"={count}Q", data, 16)]
    return data[:16] + struct.pack(f"={count}Q", *pointers) + bytes(by) + data[head:]


def one_attribute(header, payload):
    """A list of one raw attribute."""
    return struct.pack("=IHHQQ", 0, 1, 0, BASE + 16, BASE + 24) + header + payload


def mutate(rng, data):
    """A few random changes: bits, bytes, words of interest, pieces copied or cut, pointers bent."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at, how = rng.randrange(len(out) or 1), rng.randrange(7)
        if not out:
            return bytes(out)
        if how == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            out[at] = rng.randrange(256)
        elif how == 2:
            word = rng.choice((0, 1, 8, 32, 40, 64, 0x7FFF_FFFF, 0xFFFF_FFFF, rng.getrandbits(32)))
            out[at : at + 4] = struct.pack("=I", word)
        elif how == 3:
            other = rng.randrange(len(out))
            out[at : at + 8] = out[other : other + 8]
        elif how == 4:
            at &= ~7
            out[at : at + 8] = struct.pack("=Q", BASE + rng.randrange(len(out) + 16))
        elif how == 5:
            del out[at : at + rng.randrange(1, 9)]
        else:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(out)


def random_lists(rng):
    """Lists made of random attributes, mostly valid."""
    while True:
        attributes = [
            vm2.ArchCapabilities(capabilities=(rng.choice((0, 1, 2, 3, 4)),)),
            vm2.Arm64PhysaddrSize(physaddr_bits=rng.choice((0, 1, 32, 36, 40, 48, 52, 64, 65))),
            vm2.Report(records=rng.choice((0, BASE, BASE + 1)), capacity=rng.randrange(3)),
            vm2.DryRun(flags=rng.choice((0, 0, 1))),
            vm2.Negotiate(),
            vm2.MachineType(machine_type=rng.choice((0, 1, 2, 1 << 63))),
            vm2.Arm64SveVls(vls=(rng.choice((0, 1, 3, 0xB, 0xFFFF)),) + (0,) * 7, flags=rng.choice((0, 2))),
            vm2.Arm64Granule(page_shift=rng.choice((0, 12, 13, 14, 16)), flags=rng.choice((0, 2))),
            vm2.MaxVcpus(max_vcpus=rng.choice((0, 1, 512, 513)), pad=rng.choice((0, 0, 1))),
            vm2.AttrHdr(type=rng.randrange(300), size=rng.choice((0, 8, 16)), flags=rng.randrange(4)),
        ]
        rng.shuffle(attributes)
        yield encode(attributes[: rng.randrange(len(attributes) + 1)], BASE, terminated=rng.random() < 0.2)


def expected(kind, size):
    """The first finding about a lone attribute of zeros, on a host that has everything: an independent formula."""
    if kind == 0 or kind > 9:
        return errno.ENOENT, 0
    if kind == 2:
        if 1 <= size <= 31:
            return errno.EINVAL, 4
        return (errno.EOPNOTSUPP, 4) if size > 52 else None
    if kind == 1:
        return None if size == 64 else (errno.EINVAL, 4)
    least = {3: 24, 4: 8, 5: 8, 6: 16, 7: 72, 8: 16, 9: 16}[kind]
    if size % 8 or size < least:
        return errno.EINVAL, 4
    return None


def battery(count, seed=1, shapes=SHAPES):
    """Runs `count` cases, the systematic ones of the shapes first. Returns how many there were."""
    rng = random.Random(seed)
    hosts = [profile.load(name) for name in HOSTS]
    done = 0
    systematic = (
        data for shape in shapes for source in (flips, sizes) for data in source(encode(shape, BASE)) if done < count
    )
    for data in systematic:
        throw(data, hosts[done % len(hosts)], again=done % 16 == 0)
        done += 1
    fuzz = random_lists(rng)
    while done < count:
        data = next(fuzz)
        for mutant in (data, mutate(rng, data), mutate(rng, data), mutate(rng, data)):
            throw(mutant, hosts[rng.randrange(len(hosts))], again=done % 16 == 0)
            done += 1
    return done


# ---- the short versions


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("source", [flips, sizes])
def test_systematic(shape, source):
    hosts = [profile.load(name) for name in HOSTS[:2]]
    for number, data in enumerate(source(encode(SHAPES[shape], BASE))):
        throw(data, hosts[number % 2], again=number % 8 == 0)


@pytest.mark.parametrize("by", range(1, 14))
def test_misaligned(by):
    for shape in SHAPES:
        attributes = decode(Buffer(BASE, encode(shape, BASE)), BASE).attributes
        assert decode(Buffer(BASE, moved(shape, by)), BASE).attributes == attributes
        throw(moved(shape, by), profile.load(HOSTS[0]), again=True)


def test_every_type_and_size():
    described = profile.load(HOSTS[0])
    for kind in range(256):
        for size in range(65):
            data = one_attribute(HEADER.pack(kind, size, 0), bytes(64))
            result = throw(data, described, again=False)
            want = expected(kind, size)
            if want is None:
                assert result[0] == "made", (kind, size, result)
            else:
                assert (result[1], result[2][0][3]) == want, (kind, size, result)


@pytest.mark.parametrize("seed", range(3))
def test_random(seed):
    rng = random.Random(seed)
    hosts = [profile.load(name) for name in HOSTS]
    fuzz = random_lists(rng)
    for number in range(1500):
        data = next(fuzz)
        throw(data if number % 3 == 0 else mutate(rng, data), hosts[number % len(hosts)], again=number % 4 == 0)


def test_random_fixed_structures():
    rng = random.Random(7)
    hosts = [profile.load(name) for name in HOSTS[:6]]
    start = struct.pack("=QQHB", 0, 3, 128, 36) + bytes(109)
    for number, data in enumerate([*flips(start), *sizes(start), *(mutate(rng, start) for _ in range(1000))]):
        throw(data, hosts[number % 6], again=number % 4 == 0, call=creation.create_vm2_fixed)


def test_what_is_well_formed_comes_back():
    rng = random.Random(3)
    for _ in range(300):
        attributes = tuple(rng.sample(PLAIN, rng.randrange(len(PLAIN) + 1)))
        assert decode(Buffer(BASE, encode(attributes, BASE)), BASE).attributes == attributes


def main(words):
    count, seed = int(words[0]) if words else 1_000_000, int(words[1]) if len(words) > 1 else 1
    jobs = os.cpu_count() or 1
    start = time.monotonic()
    with multiprocessing.Pool(jobs) as pool:
        shares = [(count // jobs, seed * 1000 + job, SHAPES if job == 0 else ()) for job in range(jobs)]
        done = sum(pool.starmap(battery, shares))
    print(f"F1: {done} cases (seed {seed}, {jobs} processes), all made or refused: {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
