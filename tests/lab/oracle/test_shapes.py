"""The shapes, against what the published answers say of the machines that they are from."""

from __future__ import annotations

import re

import pytest

from kvm2.errors import HostError
from kvm2.lab import bundled
from kvm2.lab.oracle import shapes


def test_the_published_machines_are_all_there() -> None:
    published = sorted(shape.name for shape in shapes.SHAPES.values() if shape.published)
    assert published == list(bundled.recorded_hosts())


@pytest.mark.parametrize("name", bundled.recorded_hosts())
def test_a_shape_is_the_machine_that_was_recorded(name: str) -> None:
    header, shape = bundled.header_of(name), shapes.shape(name)
    kernel = re.search(r"kernel=(\S+)", header["hello"])
    assert kernel is not None
    assert (shape.cpu, shape.page) == (header["cpu"], header["page"])
    release = kernel[1].replace("+", r"\+")
    package = f"linux-image-{kernel[1]}-unsigned"
    assert re.fullmatch(shapes.FLAVOURS[shape.kernel].package, package), release
    said = "\n".join(header["dmesg"])
    for word in shape.append.split():
        assert word in said
    assert ("Hyp mode" in said or "nVHE" in said) or "kvm-arm.mode=nvhe" not in shape.append
    assert ("GICv3" in said) == ("gic-version=2" not in shape.machine)


def test_every_shape_has_a_kernel_and_scenarios() -> None:
    for shape in shapes.SHAPES.values():
        assert shape.kernel in shapes.FLAVOURS
        assert bundled.scenario_file(shape.page) is not None
    assert shapes.DEFAULT in shapes.SHAPES


def test_a_name_that_is_wrong() -> None:
    with pytest.raises(HostError, match=r"did you mean max-16k-6\.12"):
        shapes.shape("max-16k-6.13")
