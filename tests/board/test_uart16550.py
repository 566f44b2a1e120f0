from kvm2.board.uart16550 import DATA, IER, IIR_FCR, LCR, LSR, MCR, MSR, SCR, Uart16550


def made():
    sent = []
    return Uart16550(sent.append), sent


def test_a_polling_driver_sends_and_receives():
    uart, sent = made()
    for byte in b"Hi":
        assert uart.read(LSR) & 0x20
        uart.write(DATA, byte)
    assert bytes(sent) == b"Hi" and uart.read(LSR) == 0x60
    uart.feed(b"ab")
    assert uart.read(LSR) == 0x61 and (uart.read(DATA), uart.read(DATA)) == (97, 98)
    assert uart.read(LSR) == 0x60 and uart.read(DATA) == 0


def test_the_divisor_hides_the_first_two_registers():
    uart, sent = made()
    uart.write(LCR, 0x83)
    uart.write(DATA, 1)
    uart.write(IER, 2)
    assert (uart.read(DATA), uart.read(IER)) == (1, 2)
    uart.write(LCR, 0x03)
    assert sent == [] and uart.read(IER) == 0 and uart.read(LCR) == 3


def test_what_a_driver_probes():
    uart, sent = made()
    uart.write(SCR, 0x5A)
    assert uart.read(SCR) == 0x5A
    uart.write(IER, 0xFF)
    assert uart.read(IER) == 0x0F
    uart.write(MCR, 0xFF)
    assert uart.read(MCR) == 0x1F
    uart.write(MCR, 0x10 | 0x0A)  # Linux: loopback with RTS and OUT2 must show CTS and DCD
    assert uart.read(MSR) & 0xF0 == 0x90
    uart.write(DATA, 0x77)
    assert sent == [] and uart.read(LSR) & 1 and uart.read(DATA) == 0x77
    uart.write(MCR, 0)
    assert uart.read(MSR) == 0xB0


def test_the_identification_says_what_would_be_pending():
    uart, _ = made()
    assert uart.read(IIR_FCR) == 0x01
    uart.write(IIR_FCR, 0x07)
    assert uart.read(IIR_FCR) == 0xC1
    uart.write(IER, 0x02)
    assert uart.read(IIR_FCR) == 0xC2 and uart.read(IIR_FCR) == 0xC1  # reading it takes it away
    uart.write(DATA, 65)
    assert uart.read(IIR_FCR) == 0xC2
    uart.write(IER, 0x01)
    uart.feed(b"x")
    assert uart.read(IIR_FCR) == 0xC4
    uart.write(IIR_FCR, 0x03)
    assert uart.read(LSR) == 0x60 and uart.read(IIR_FCR) == 0xC1


def test_read_only_registers_ignore_writes():
    uart, _ = made()
    uart.write(LSR, 0xFF)
    uart.write(MSR, 0xFF)
    assert uart.read(LSR) == 0x60 and uart.read(MSR) == 0xB0
