"""The machines that can be had: which emulated processor, which kernel, and what is said on its command line.

The first nineteen are those whose answers are published (`lab/data/results`), under the same names.

>>> shape("max-16k-6.12").page, shape("a57-4k-6.1").cpu
(16384, 'cortex-a57')
"""

from __future__ import annotations

from dataclasses import dataclass

from kvm2.errors import HostError
from kvm2.lab.packages import FLAVOURS


@dataclass(frozen=True, slots=True)
class Shape:
    """A host to be: `cpu` is QEMU's -cpu, `kernel` a name of FLAVOURS, `machine` more of -M, `append` more words for
    the kernel. `published` tells whether there are published answers of it."""

    name: str
    cpu: str
    kernel: str = "6.12-4k"
    machine: str = ""
    append: str = ""
    published: bool = True

    @property
    def page(self) -> int:
        """The host's page size in bytes."""
        return FLAVOURS[self.kernel].page

    @property
    def sve(self) -> bool:
        """Whether the emulated processor has SVE."""
        model, *options = self.cpu.split(",")
        return model in ("max", "a64fx") and "sve=off" not in options


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("max-4k-6.12", "max"),
        Shape("max-16k-6.12", "max", "6.12-16k"),
        Shape("max-4k-6.1", "max", "6.1-4k"),
        Shape("max-4k-nolpa2", "max,lpa2=off"),
        Shape("max-4k-nosve", "max,sve=off"),
        Shape("max-4k-vl128", "max,sve128=on"),
        Shape("max-4k-pow2vl", "max,sve256=on,sve512=on"),
        Shape("max-4k-nvhe", "max", append="kvm-arm.mode=nvhe"),
        Shape("max-4k-protected", "max", append="kvm-arm.mode=protected"),
        Shape("max-4k-gicv2", "max", machine="gic-version=2"),
        Shape("max-4k-mte", "max", machine="mte=on"),
        Shape("neoverse-n1-4k", "neoverse-n1"),
        Shape("cortex-a35-4k", "cortex-a35"),
        Shape("cortex-a53-4k", "cortex-a53"),
        Shape("cortex-a57-4k", "cortex-a57"),
        Shape("cortex-a72-4k", "cortex-a72"),
        Shape("a57-4k-6.1", "cortex-a57", "6.1-4k"),
        Shape("a64fx-4k", "a64fx"),
        Shape("a64fx-4k-6.1", "a64fx", "6.1-4k"),
        Shape("cortex-a76-4k", "cortex-a76", published=False),
        Shape("neoverse-n1-16k", "neoverse-n1", "6.12-16k", published=False),
        Shape("max-16k-nolpa2", "max,lpa2=off", "6.12-16k", published=False),
        Shape("max-4k-nopauth", "max,pauth=off", published=False),
    )
}
DEFAULT = "max-4k-6.12"


def shape(name: str) -> Shape:
    """The shape of a name; HostError, with the nearest names, where there is none."""
    found = SHAPES.get(name)
    if found is None:
        import difflib

        near = difflib.get_close_matches(name, SHAPES, 3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise HostError(f"oracle {name!r}: there is no such shape; {hint}`kvm2 oracle list` lists them")
    return found
