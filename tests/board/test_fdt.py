import contextlib
import shutil
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm2.board.fdt import MAGIC, Fdt, read_fdt
from kvm2.errors import Kvm2Error, UsageError


def example():
    tree = Fdt(boot_cpu=3)
    root = tree.root
    root.cells("#address-cells", 2)
    root.cells("#size-cells", 2)
    root.text("compatible", "linux,dummy-virt", "second")
    clock = root.child("clock")
    clock.cells("#clock-cells", 0)
    memory = root.child("memory", 1 << 47)
    memory.wide("reg", 1 << 47, 1 << 30)
    memory.flag("hotpluggable")
    root.child("soc").child("uart", 0x9000000).cells("clocks", clock.phandle, clock.phandle)
    tree.reserved.append((0x1000, 0x2000))
    return tree


def test_what_was_made_is_read_back():
    tree = read_fdt(example().pack())
    assert tree.boot_cpu == 3 and tree.reserved == [(0x1000, 0x2000)]
    assert tree.root.texts("compatible") == ("linux,dummy-virt", "second")
    memory = tree.node("/memory@800000000000")
    assert memory.numbers("reg", 8) == (1 << 47, 1 << 30) and memory.properties["hotpluggable"] == b""
    assert tree.node("/soc/uart@9000000").numbers("clocks") == (1, 1)
    assert tree.node("/clock").numbers("phandle") == (1,)
    assert tree.pack() == example().pack()


def test_the_header_is_version_17_and_aligned():
    blob = example().pack()
    words = struct.unpack(">10I", blob[:40])
    assert words[0] == MAGIC == 0xD00DFEED and words[1] == len(blob) and words[5:7] == (17, 16)
    assert words[4] % 8 == 0 and words[2] % 4 == 0


@pytest.mark.skipif(not shutil.which("dtc"), reason="needs dtc (device-tree-compiler)")
def test_dtc_reads_it_and_makes_the_same_again():
    done = subprocess.run(
        ["dtc", "-I", "dtb", "-O", "dts", "-"], input=example().pack(), capture_output=True, check=True, timeout=20
    )
    text = done.stdout.decode()
    assert "/memreserve/\t0x0000000000001000 0x0000000000002000;" in text
    assert "reg = <0x8000 0x00 0x00 0x40000000>;" in text
    back = subprocess.run(
        ["dtc", "-q", "-I", "dts", "-O", "dtb", "-"], input=done.stdout, capture_output=True, check=True, timeout=20
    )
    again = read_fdt(back.stdout)
    for path in ("/", "/clock", "/soc/uart@9000000", "/memory@800000000000"):
        assert again.node(path).properties == example().node(path).properties


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda root: root.child("a b"), "no name of a device tree node"),
        (lambda root: root.child("x" * 32), "no name of a device tree node"),
        (lambda root: (root.child("a"), root.child("a")), "already"),
        (lambda root: root.cells("a/b", 1), "no name of a device tree property"),
        (lambda root: root.cells("reg", 1 << 32), "32 bits"),
        (lambda root: root.wide("reg", -1), "64 bits"),
        (lambda root: root.text("bootargs", "a\0b"), "NUL"),
        (lambda root: root.numbers("reg"), "no property 'reg'"),
    ],
)
def test_refusals_in_words(wrong, words):
    with pytest.raises(UsageError, match=words):
        wrong(Fdt().root)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda blob: blob[:20], "header"),
        (lambda blob: b"\x7fELF" + blob[4:], "not a device tree"),
        (lambda blob: blob[:-1], "cut off"),
        (lambda blob: blob[:20] + struct.pack(">I", 3) + blob[24:], "version 3"),
        (lambda blob: blob[:36] + struct.pack(">I", 16) + blob[40:], "without its end"),
    ],
)
def test_what_is_no_tree_is_said(cut, words):
    with pytest.raises(UsageError, match=words):
        read_fdt(cut(example().pack()))


def test_a_path_that_is_not_there_names_what_is():
    with pytest.raises(UsageError, match="soc"):
        example().node("/nothing/at")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=12))
def test_damaged_blobs_are_read_or_refused(damage):
    blob = bytearray(example().pack())
    for at, value in damage:
        blob[at % len(blob)] = value
    with contextlib.suppress(Kvm2Error):
        read_fdt(bytes(blob))
