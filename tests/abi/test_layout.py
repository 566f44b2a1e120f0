"""How structures are declared: offsets, packing, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import struct
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm2.abi.layout import U8, U16, U32, U64, U128, Array, Structure, UnionOf, field, s32, u8, u16, u32, u64
from kvm2.abi.structs import OneReg
from kvm2.abi.structs_arm64 import Regs, UserFpsimdState, VcpuInit


class Point(Structure, c_name="point"):
    """A point."""

    x: s32 = 0
    y: s32 = 0


class Shape(Structure, c_name="shape"):
    """All kinds of fields."""

    kind: u16 = field(doc="which", default=7)
    flags: u16 = 0
    count: u32 = 0
    points: Annotated[tuple[Point, ...], Array(Point, 2)] = (Point(), Point())
    words: Annotated[tuple[int, ...], Array(U16, 3)] = (0, 0, 0)
    name: Annotated[bytes, Array(U8, 10)] = bytes(10)
    u: Annotated[bytes, UnionOf(16, (("words", Array(U64, 2)),))] = bytes(16)
    end: u64 = field(default=0, c_name="__end")


def test_offsets_and_sizes() -> None:
    places = {f.name: (f.offset, f.size) for f in Shape.LAYOUT.fields}
    assert places == {
        "kind": (0, 2),
        "flags": (2, 2),
        "count": (4, 4),
        "points": (8, 16),
        "words": (24, 6),
        "name": (30, 10),
        "u": (40, 16),
        "end": (56, 8),
    }
    assert (Shape.SIZE, Shape.LAYOUT.align, Shape.LAYOUT.c_name) == (64, 8, "shape")
    assert (Shape.LAYOUT.at("end").c_name, Shape.LAYOUT["kind"].doc) == ("__end", "which")
    with pytest.raises(KeyError, match="no field nix"):
        Shape.LAYOUT.at("nix")


int32s = st.integers(-(1 << 31), (1 << 31) - 1)


@given(
    st.builds(
        Shape,
        kind=st.integers(0, 0xFFFF),
        count=st.integers(0, 0xFFFFFFFF),
        points=st.tuples(st.builds(Point, int32s, int32s), st.builds(Point, int32s, int32s)),
        words=st.tuples(*[st.integers(0, 0xFFFF)] * 3),
        name=st.binary(min_size=10, max_size=10),
        u=st.binary(min_size=16, max_size=16),
        end=st.integers(0, (1 << 64) - 1),
    )
)
def test_bytes_and_back(shape: Shape) -> None:
    data = shape.pack()
    assert len(data) == Shape.SIZE
    assert Shape.unpack(data) == shape
    assert Shape.unpack(b"xyz" + data, 3) == shape
    assert Shape.unpack(memoryview(bytearray(data))) == shape


def test_what_is_short_is_filled_and_what_is_long_refused() -> None:
    assert VcpuInit(5, (1,)).pack() == VcpuInit(5, (1, 0, 0, 0, 0, 0, 0)).pack()
    assert Shape.unpack(Shape(name=b"ab").pack()).name == b"ab" + bytes(8)
    for wrong in (
        Shape(name=bytes(11)),
        Shape(words=(1, 2, 3, 4)),
        Shape(points=(Point(),) * 3),
        Shape(u=bytes(17)),
        Shape(kind=1 << 16),
        Shape(points=(Point(1 << 31), Point())),
        Shape(end=-1),
    ):
        with pytest.raises(struct.error):
            wrong.pack()
    with pytest.raises(struct.error):
        Shape.unpack(bytes(63))


def test_128_bit_registers() -> None:
    values = tuple(bytes([n]) * 16 for n in range(32))
    state = UserFpsimdState(vregs=values, fpsr=3)
    assert UserFpsimdState.unpack(state.pack()) == state
    assert state.pack()[16:32] == b"\1" * 16
    assert UserFpsimdState(vregs=(b"x" * 16,)).pack()[:32] == b"x" * 16 + bytes(16)
    # A 16-byte boundary moves fp_regs: the one mainline structure here with padding inside.
    assert Regs.LAYOUT.at("fp_regs").offset == 336
    assert Array(U128, 2).item.size == 16


def test_implicit_padding_is_refused() -> None:
    with pytest.raises(TypeError, match="4 bytes of implicit padding before it"):

        class Hole(Structure, c_name="hole"):
            a: u32 = 0
            b: u64 = 0

    with pytest.raises(TypeError, match="7 bytes of implicit padding at its end"):

        class Tail(Structure, c_name="tail"):
            a: u64 = 0
            b: u8 = 0

    class Padded(Structure, c_name="padded", padded=True):
        a: u32 = 0
        b: u64 = 0
        c: u8 = 0

    assert (Padded.SIZE, Padded(1, 2, 3).pack().hex()) == (24, "010000000000000002000000000000000300000000000000")
    assert Padded.unpack(Padded(1, 2, 3).pack()) == Padded(1, 2, 3)


def test_it_behaves_like_a_frozen_dataclass() -> None:
    reg = OneReg(1, addr=2)
    assert reg == OneReg(id=1, addr=2) != OneReg(1)
    assert reg != (1, 2)
    assert hash(reg) == hash(OneReg(1, 2))
    assert repr(reg) == "OneReg(id=1, addr=2)"
    assert dataclasses.replace(reg, id=5) == OneReg(5, 2)
    assert dataclasses.asdict(reg) == {"id": 1, "addr": 2}
    assert copy.deepcopy(reg) == reg == pickle.loads(pickle.dumps(reg))
    with pytest.raises(dataclasses.FrozenInstanceError):
        reg.id = 3  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del reg.id
    for args, kwargs in (((1, 2, 3), {}), ((1,), {"id": 2}), ((), {"nix": 1})):
        with pytest.raises(TypeError, match="OneReg takes id, addr"):
            OneReg(*args, **kwargs)


def test_walk_names_the_leaves() -> None:
    paths = {path: leaf.offset for path, leaf in Regs.walk()}
    assert paths["regs.pc"] == 256
    assert paths["fp_regs.fpsr"] == 848
    assert "regs" not in paths
    assert U32.size == 4
