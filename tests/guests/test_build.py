import pytest

from kvm2.board.loader import read_image
from kvm2.errors import EnvironmentFault
from kvm2.guests import DEMO, build
from kvm2.spec import MemoryRange

MEMORY = (MemoryRange(1 << 40, 64 << 20),)


@pytest.mark.skipif(build.compiler_version() is None, reason=f"no {build.COMPILER}")
def test_the_committed_image_is_what_the_source_gives(tmp_path):
    build.build(tmp_path / "demo.elf")
    if build.compiler_version() == build.BUILT_WITH:
        assert (tmp_path / "demo.elf").read_bytes() == DEMO.read_bytes()
    else:
        made = read_image(tmp_path / "demo.elf", MEMORY)
        assert made.entry == 1 << 40


def test_the_image_is_small_and_runs_anywhere():
    image = read_image(DEMO, MEMORY)
    assert image.entry == 1 << 40 and len(image.segments) == 1
    assert DEMO.stat().st_size < 32 << 10


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compiler_version() is None
    with pytest.raises(EnvironmentFault, match="not installed"):
        build.build(tmp_path / "demo.elf")
