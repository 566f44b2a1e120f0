"""Messages by KVM_SIGNAL_MSI and by irqfds with an MSI route, through the ITS."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvm2.abi import its as abi
from kvm2.errors import KvmError
from kvm2.irq_vm import msi_route, pin_route

from .vgic import its_guest
from .vgic.its_guest import ITS, Guest, mapc, mapd, mapti

TRANSLATER = ITS + abi.GITS_TRANSLATER
DEVICE, EVENT, LPI, GSI = 7, 3, 8200, 2000


@pytest.fixture
def guest() -> Iterator[Guest]:
    with its_guest.guest() as made:
        made.configure(LPI)
        made.start()
        made.send(mapd(DEVICE), mapc(0), mapti(DEVICE, EVENT, LPI))
        yield made


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def pending(guest: Guest) -> bool:
    """Whether the LPI is; the guest takes it."""
    guest.vm.check_extension("IRQFD")  # any ioctl: what was written to eventfds is seen
    return guest.acknowledge() == LPI


def test_a_message_of_userspace(guest: Guest) -> None:
    assert guest.vm.signal_msi(TRANSLATER, EVENT, devid=DEVICE) and pending(guest)
    assert not guest.vm.signal_msi(TRANSLATER, EVENT + 1, devid=DEVICE), "not mapped: 0, and no error"
    for address, devid in ((TRANSLATER, None), (ITS - 0x10000, DEVICE)):
        with pytest.raises(KvmError, match="EINVAL"):
            guest.vm.signal_msi(address, EVENT + 1, devid=devid)
    assert not pending(guest)
    assert guest.vm.check_extension("MSI_DEVID") == 1


def test_an_eventfd_that_is_a_message(guest: Guest, eventfd: int) -> None:
    guest.vm.set_gsi_routing([msi_route(GSI, TRANSLATER, EVENT, devid=DEVICE)])
    os.eventfd_write(eventfd, 1)
    guest.vm.irqfd(eventfd, GSI)
    assert pending(guest), "signalled before it was assigned"
    for _ in range(2):
        os.eventfd_write(eventfd, 1)
        assert pending(guest)
    guest.vm.set_gsi_routing([msi_route(GSI, TRANSLATER, EVENT + 1, devid=DEVICE)])
    os.eventfd_write(eventfd, 1)
    assert not pending(guest)
    guest.vm.set_gsi_routing([pin_route(GSI, 1)])
    os.eventfd_write(eventfd, 1)
    assert not pending(guest) and guest.vgic.spis[1].pending
