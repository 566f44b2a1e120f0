"""Whatever a guest writes to the UART and the clock: an answer that fits, no exception, no growth."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvm2.board import pl011
from kvm2.board.bus import Bus
from kvm2.board.pl011 import Pl011
from kvm2.board.pl031 import Pl031
from kvm2.exits import Mmio

UART, RTC = 0x1000, 0x2000
REGISTERS = st.sampled_from([*range(0, 0x50, 4), *range(0xFE0, 0x1000, 4)])
ACCESSES = st.tuples(
    st.sampled_from([UART, RTC]),
    REGISTERS | st.integers(0, 0xFFF),
    st.sampled_from([1, 2, 4, 8]),
    st.none() | st.sampled_from([0, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1),
    st.binary(max_size=40),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACCESSES, max_size=40))
def test_any_access_has_an_answer(accesses):
    sent, levels = [], []
    clock = Pl031(levels.append, lambda: 1_000_000.0)
    bus = Bus()
    bus.add(UART, uart := Pl011(sent.append, levels.append), "uart")
    bus.add(RTC, clock, "rtc")
    fed = 0
    try:
        for base, offset, size, value, line in accesses:
            uart.feed(line)
            fed += len(line)
            area = memoryview(bytearray(64))
            raw = b"" if value is None else value.to_bytes(8, "little")[:size]
            assert bus.answer(Mmio(base + offset, size, value is not None, raw.ljust(8, b"\0"), area))
        assert uart.waiting <= fed and len(uart._fifo) <= pl011.FIFO_DEPTH and len(sent) <= len(accesses)
        assert all(0 <= byte <= 255 for byte in sent)
        uart.restore(uart.state())
        clock.restore(clock.state())
    finally:
        clock.close()
