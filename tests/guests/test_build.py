import pytest

from kvm2.board.loader import read_image
from kvm2.errors import EnvironmentFault
from kvm2.guests import DEMO, DEMO_X86
from kvm2.guests.build import DEMOS
from kvm2.spec import MemoryRange

MEMORY = {"arm64": (MemoryRange(1 << 40, 64 << 20),), "x86_64": (MemoryRange(0, 1 << 20),)}
ENTRY = {"arm64": 1 << 40, "x86_64": 0x8000}


@pytest.fixture(params=sorted(DEMOS))
def arch(request):
    return request.param


def test_the_committed_image_is_what_the_source_gives(arch, tmp_path):
    demo = DEMOS[arch]
    version = demo.compiler_version()
    if version is None:
        pytest.skip(f"no {demo.compiler}")
    demo.build(tmp_path / "demo.elf")
    if version == demo.built_with:
        assert (tmp_path / "demo.elf").read_bytes() == demo.image.read_bytes()
    else:
        assert read_image(tmp_path / "demo.elf", MEMORY[arch], arch).entry == ENTRY[arch]


def test_the_image_is_small_and_lies_where_it_should(arch):
    image = read_image(DEMOS[arch].image, MEMORY[arch], arch)
    assert image.entry == ENTRY[arch] and len(image.segments) == 1
    assert DEMOS[arch].image.stat().st_size < 32 << 10
    assert DEMOS["arm64"].image == DEMO and DEMOS["x86_64"].image == DEMO_X86


def test_the_x86_image_leaves_the_first_pages_and_ends_below_640k():
    segment = read_image(DEMO_X86, MEMORY["x86_64"], "x86_64").segments[0]
    assert segment.address >= 0x1000 and segment.end < 0xA0000


def test_without_a_compiler(arch, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert DEMOS[arch].compiler_version() is None
    with pytest.raises(EnvironmentFault, match="not installed"):
        DEMOS[arch].build(tmp_path / "demo.elf")
