import pytest

from kvm2.board.pl011 import CR, DR, FR, FR_RXFE, FR_TXFE, IBRD, IMSC, MIS, RIS, Pl011


@pytest.fixture
def sent():
    return []


@pytest.fixture
def uart(sent):
    return Pl011(sent.append)


def test_data_goes_out_at_once_and_the_fifo_is_never_full(uart, sent):
    for byte in b"Hi\xff":
        assert uart.read(FR) == FR_TXFE | FR_RXFE
        uart.write(DR, byte | 0x4100)
    assert sent == list(b"Hi\xff")


def test_fed_bytes_are_read_in_order(uart):
    uart.feed(b"ok")
    assert uart.read(FR) == FR_TXFE and uart.read(RIS) & 0x10
    assert [uart.read(DR), uart.read(DR), uart.read(DR)] == [ord("o"), ord("k"), 0]
    assert uart.read(FR) == FR_TXFE | FR_RXFE


def test_identification_is_a_pl011(uart):
    words = [uart.read(offset) for offset in range(0xFE0, 0x1000, 4)]
    assert words[0] | (words[1] & 15) << 8 == 0x011  # part number
    assert words[1] >> 4 | (words[2] & 15) << 4 == 0x41  # designer: Arm
    assert words[4:] == [0x0D, 0xF0, 0x05, 0xB1]  # PrimeCell
    assert uart.read(0xFE1) == 0


def test_registers_keep_what_fits_and_reset_as_documented(uart):
    assert uart.read(CR) == 0x300
    uart.write(IBRD, 0x12345)
    uart.write(IMSC, 0xFFFFFFFF)
    assert (uart.read(IBRD), uart.read(IMSC), uart.read(MIS)) == (0x2345, 0x7FF, 0)
    uart.write(FR, 0)
    uart.write(0xFE0, 0)
    assert uart.read(FR) == FR_TXFE | FR_RXFE and uart.read(0xFE0) == 0x11 and uart.read(0x900) == 0
