import itertools
import threading

import pytest

from kvm2.board.pl011 import (
    CR,
    DR,
    FR,
    FR_RXFE,
    FR_RXFF,
    FR_TXFE,
    IBRD,
    ICR,
    IFLS,
    IMSC,
    LCR_H,
    LCR_H_FEN,
    MIS,
    RIS,
    RIS_RT,
    RIS_RX,
    RIS_TX,
    Pl011,
)

ENABLED = 0x301  # CR: UARTEN, TXE, RXE


@pytest.fixture
def sent():
    return []


@pytest.fixture
def uart(sent):
    return Pl011(sent.append)


@pytest.fixture
def levels():
    return []


@pytest.fixture
def wired(sent, levels):
    """A UART with its interrupt connected, enabled, with its FIFO on."""
    uart = Pl011(sent.append, levels.append)
    uart.write(CR, 4, ENABLED)
    uart.write(LCR_H, 4, LCR_H_FEN)
    return uart


def test_data_goes_out_at_once_and_the_fifo_is_never_full(uart, sent):
    for byte in b"Hi\xff":
        assert uart.read(FR, 4) == FR_TXFE | FR_RXFE
        uart.write(DR, 4, byte | 0x4100)
    assert sent == list(b"Hi\xff")


def test_fed_bytes_are_read_in_order(uart):
    uart.feed(b"ok")
    assert uart.read(FR, 4) & FR_RXFE == 0 and uart.read(RIS, 4) & RIS_RX
    assert [uart.read(DR, 4), uart.read(DR, 4), uart.read(DR, 4)] == [ord("o"), ord("k"), 0]
    assert uart.read(FR, 4) == FR_TXFE | FR_RXFE


def test_identification_is_a_pl011(uart):
    words = [uart.read(offset, 4) for offset in range(0xFE0, 0x1000, 4)]
    assert words[0] | (words[1] & 15) << 8 == 0x011  # part number
    assert words[1] >> 4 | (words[2] & 15) << 4 == 0x41  # designer: Arm
    assert words[4:] == [0x0D, 0xF0, 0x05, 0xB1]  # PrimeCell
    assert uart.read(0xFE1, 1) == 0


def test_registers_keep_what_fits_and_reset_as_documented(uart):
    assert uart.read(CR, 4) == 0x300
    uart.write(IBRD, 4, 0x12345)
    uart.write(IMSC, 4, 0xFFFFFFFF)
    assert (uart.read(IBRD, 4), uart.read(IMSC, 4), uart.read(MIS, 4)) == (0x2345, 0x7FF, 0)
    uart.write(FR, 4, 0)
    uart.write(0xFE0, 4, 0)
    assert uart.read(FR, 4) == FR_TXFE | FR_RXFE and uart.read(0xFE0, 4) == 0x11 and uart.read(0x900, 4) == 0


def test_nothing_is_wanted_and_nothing_received_before_the_guest_enables_it(sent, levels):
    uart = Pl011(sent.append, levels.append)
    uart.feed(b"a")
    assert uart.read(FR, 4) & FR_RXFE and uart.read(RIS, 4) == 0 and uart.waiting == 1
    uart.write(CR, 4, ENABLED)
    assert uart.read(FR, 4) & FR_RXFE == 0 and levels == []


def test_one_byte_raises_the_timeout_and_not_the_level_interrupt(wired, levels):
    wired.write(IMSC, 4, RIS_RX | RIS_RT)
    wired.feed(b"x")
    assert (wired.read(RIS, 4), wired.read(MIS, 4), levels) == (RIS_RT, RIS_RT, [True])
    assert wired.read(DR, 4) == ord("x")
    assert (wired.read(MIS, 4), levels) == (0, [True, False])


@pytest.mark.parametrize(("field", "level"), [(0, 2), (1, 4), (2, 8), (3, 12), (4, 14)])
def test_the_receive_interrupt_comes_at_the_chosen_level(wired, levels, field, level):
    wired.write(IFLS, 4, field << 3)
    wired.write(IMSC, 4, RIS_RX)
    wired.feed(bytes(level - 1))
    assert levels == []
    wired.feed(b"!")
    assert levels == [True] and wired.read(MIS, 4) == RIS_RX
    wired.read(DR, 4)  # below the level again
    assert levels == [True, False]


def test_without_fifos_one_byte_is_the_level(wired, levels):
    wired.write(LCR_H, 4, 0)
    wired.write(IMSC, 4, RIS_RX)
    wired.feed(b"ab")
    assert levels == [True] and wired.read(FR, 4) & FR_RXFF
    assert wired.read(DR, 4) == ord("a") and wired.read(DR, 4) == ord("b")
    assert levels[-1] is False and wired.read(FR, 4) & FR_RXFE


def test_more_than_a_fifo_waits_on_the_line_and_none_is_lost(wired, levels):
    text = bytes(range(100))
    wired.write(IMSC, 4, RIS_RX | RIS_RT)
    wired.feed(text)
    assert wired.read(FR, 4) & FR_RXFF and wired.waiting == 100
    got = bytearray()
    while not wired.read(FR, 4) & FR_RXFE:
        got.append(wired.read(DR, 4))
    assert got == text and levels == [True, False] and wired.waiting == 0


def test_interrupts_are_cleared_by_name_and_come_again_with_new_data(wired, levels):
    wired.write(IMSC, 4, RIS_RT)
    wired.feed(b"a")
    wired.write(ICR, 4, RIS_RT)
    assert levels == [True, False] and wired.read(RIS, 4) & RIS_RT == 0
    wired.feed(b"b")
    assert levels == [True, False, True]


def test_the_transmit_interrupt_follows_a_byte_and_its_mask(wired, levels, sent):
    wired.write(IMSC, 4, RIS_TX)
    assert levels == []  # it says that the FIFO has become empty, not that it is
    wired.write(DR, 1, 65)
    assert levels == [True] and wired.read(MIS, 4) == RIS_TX
    wired.write(ICR, 4, RIS_TX)
    wired.write(DR, 1, 66)
    assert levels == [True, False, True]
    wired.write(IMSC, 4, 0)
    assert levels[-1] is False and wired.read(RIS, 4) & RIS_TX and sent == [65, 66]


def start_as_a_driver(uart):
    """What pl011_startup of drivers/tty/serial/amba-pl011.c does, with what it throws away."""
    uart.write(CR, 4, ENABLED)
    uart.write(ICR, 4, RIS_RT | RIS_RX)
    dropped = 0
    for _ in range(32):
        if uart.read(FR, 4) & FR_RXFE:
            break
        uart.read(DR, 4)
        dropped += 1
    uart.write(IMSC, 4, RIS_RX | RIS_RT)
    return dropped


def test_what_is_typed_ahead_survives_the_start_of_the_driver(wired, levels):
    wired.type_ahead(b"poweroff -f; true longer than a FIFO\n")
    for _ in range(1000):  # the boot console
        wired.read(FR, 4)
        wired.write(DR, 1, 46)
    assert start_as_a_driver(wired) == 0 and levels == [True]
    got = bytes(iter(lambda: wired.read(DR, 4) if not wired.read(FR, 4) & FR_RXFE else None, None))
    assert got == b"poweroff -f; true longer than a FIFO\n"


def test_what_a_driver_that_stops_has_not_got_waits_for_the_next(wired):
    start_as_a_driver(wired)
    wired.type_ahead(bytes(range(40)))
    wired.write(IMSC, 4, 0)
    assert start_as_a_driver(wired) == 16  # the FIFO's contents, as everywhere
    assert wired.read(DR, 4) == 16 and wired.waiting == 23


def test_a_guest_that_only_polls_gets_what_is_typed(wired):
    wired.type_ahead(b"q")
    for _ in range(20):
        if not wired.read(FR, 4) & FR_RXFE:
            break
    assert wired.read(DR, 4) == ord("q")


def test_state_goes_to_another_uart(wired, sent):
    wired.write(IMSC, 4, RIS_RT)
    wired.write(IBRD, 4, 13)
    wired.feed(bytes(range(20)))
    told = []
    other = Pl011(sent.append, told.append)
    other.restore(wired.state())
    assert told == [True] and other.state() == wired.state() and other.read(IBRD, 4) == 13
    assert [other.read(DR, 4) for _ in range(20)] == list(range(20)) and told == [True, False]


def test_levels_are_told_in_order_whoever_changes_them(sent):
    """Two threads, one that feeds and one that reads: the last level told is the one that is."""
    told = []
    uart = Pl011(sent.append, told.append)
    uart.write(CR, 4, ENABLED)
    uart.write(LCR_H, 4, LCR_H_FEN)
    uart.write(IMSC, 4, RIS_RX | RIS_RT)
    count = 2000
    feeder = threading.Thread(target=lambda: [uart.feed(b"z") for _ in range(count)])
    feeder.start()
    got = 0
    while got < count:
        if not uart.read(FR, 4) & FR_RXFE:
            got += uart.read(DR, 4) == ord("z")
    feeder.join()
    assert told[-1] is False and all(a is not b for a, b in itertools.pairwise(told))
