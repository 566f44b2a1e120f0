"""The network card, its sockets, and QEMU at their other end."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import threading
import time

import pytest

from kvm2.board.virtio import Net, VirtioMmio, parse_link
from kvm2.board.virtio import link as link_module
from kvm2.board.virtio.link import MAX_FRAME, DatagramLink, Link, StreamLink
from kvm2.board.virtio.net import MAX_BACKLOG, mac_address
from kvm2.errors import UsageError

from .driver import NEEDS_RESET, FakeMemory, Line

ID, F_MAC, F_STATUS, PATIENCE = 1, 1 << 5, 1 << 16, 20.0
MAC = "52:54:00:aa:bb:cc"
HEADER = bytes(12)
FRAME = bytes(range(14)) + b"payload"


def until(true):
    """Wait for another thread's work; the deadline is only for a test that fails."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


class Wire(Link):
    """A link without a socket: what was sent is kept, what is received is given by hand."""

    def __init__(self, up=True):
        self.up, self.sent, self.woken, self.takes = up, [], 0, True

    def start(self, deliver, ready, changed):
        self.deliver, self.ready, self.changed = deliver, ready, changed

    def send(self, frame):
        self.sent.append(frame)
        return self.takes

    def wake(self):
        self.woken += 1

    def close(self):
        self.up = False


class Guest:
    def __init__(self, driver):
        self.driver = driver
        driver.probe(ID, F_MAC | F_STATUS)
        self.rx, self.tx = driver.setup_queue(0, 64), driver.setup_queue(1, 64)
        driver.ready()
        self.buffers = {}

    def offer(self, count=1, size=1526):
        """try_fill_recv(): buffers for header and frame."""
        for _ in range(count):
            at = self.driver.allocate(size)
            self.buffers[self.driver.add(self.rx, (), [(at, 12), (at + 12, size - 12)])] = at
        self.driver.kick(self.rx)

    def received(self):
        frames = []
        while (done := self.driver.get(self.rx)) is not None:
            data = self.driver.memory.read(self.buffers.pop(done[0]), done[1])
            assert data[:12] == bytes(10) + b"\1\0", "struct virtio_net_hdr_v1 with num_buffers = 1"
            frames.append(data[12:])
        return frames

    def send(self, frame, header=HEADER):
        self.driver.add(self.tx, [(self.driver.place(header + frame), 12 + len(frame))])
        self.driver.kick(self.tx)
        while self.driver.get(self.tx) is not None:
            pass


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def guest(attach, wire):
    return Guest(attach(Net(wire, mac=MAC), size=8 << 20))


def test_configuration(guest):
    assert bytes(guest.driver.config(n, 1) for n in range(6)).hex(":") == MAC
    assert guest.driver.config(6, 2) == 1
    assert guest.driver.features & F_MAC and guest.driver.features & F_STATUS


def test_frames_both_ways(guest, wire):
    guest.send(FRAME)
    assert wire.sent == [FRAME]
    guest.offer(3)
    wire.deliver([FRAME, FRAME[::-1]])
    assert guest.driver.interrupt() == 1
    assert guest.received() == [FRAME, FRAME[::-1]]


def test_frames_wait_for_buffers_and_the_socket_for_frames(guest, wire):
    wire.woken = 0  # resets wake it up
    wire.deliver([b"%14d" % n for n in range(MAX_BACKLOG)])
    assert not wire.ready() and wire.woken == 0
    guest.offer(2)
    assert guest.received() == [b"%14d" % n for n in range(2)]
    assert wire.ready() and wire.woken == 1
    guest.offer(1)
    assert wire.woken == 1, "it was reading already"


def test_frames_without_a_driver_are_lost(attach, wire):
    net = Net(wire)
    driver = attach(net)
    wire.deliver([FRAME])
    assert net.dropped == 1
    guest = Guest(driver)
    guest.offer()
    assert guest.received() == []
    wire.deliver([FRAME])
    driver.writel("Status", 0)
    wire.deliver([FRAME])
    assert net.dropped == 2


def test_a_frame_that_is_too_large_is_lost_and_its_buffer_is_not(guest, wire):
    guest.offer(1)
    wire.deliver([bytes(1515), FRAME])
    assert guest.received() == [FRAME] and guest.driver.frame.device.dropped == 1


@pytest.mark.parametrize("header", [b"\1" + bytes(11), b"\0\1" + bytes(10)])
def test_offloads_that_were_not_offered_lose_the_frame(guest, wire, header):
    guest.send(FRAME, header)
    assert wire.sent == [] and guest.driver.frame.device.dropped == 1


def test_the_largest_frame_and_one_more(guest, wire):
    for size in (MAX_FRAME, MAX_FRAME + 1, 0):
        guest.send(bytes(size))
    assert [len(frame) for frame in wire.sent] == [MAX_FRAME] and guest.driver.frame.device.dropped == 2
    wire.takes = False
    guest.send(FRAME)
    assert guest.driver.frame.device.dropped == 3


@pytest.mark.parametrize("wrong", ["short", "direction", "receive"])
def test_broken_requests_need_a_reset(guest, wire, wrong):
    at = guest.driver.allocate(64)
    queue, parts = {
        "short": (guest.tx, ([(at, 11)],)),
        "direction": (guest.tx, ([(at, 12)], [(at, 4)])),
        "receive": (guest.rx, ([(at, 64)],)),
    }[wrong]
    guest.driver.add(queue, *parts)
    guest.driver.kick(queue)
    wire.deliver([FRAME])
    assert guest.driver.readl("Status") & NEEDS_RESET and "virtio-net" in guest.driver.frame.fault


def test_the_link_goes_down_and_comes_up(guest, wire):
    for up in (False, True):
        wire.up = up
        wire.changed()
        assert guest.driver.interrupt() == 2 and guest.driver.config(6, 2) == int(up)


def test_addresses():
    assert Net(Wire()).mac[:3] == b"\x52\x54\x00" and Net(Wire()).mac != Net(Wire()).mac
    for wrong in ("", "52:54:00:00:00", "52-54-00-00-00-01", "53:54:00:00:00:01", "00:00:00:00:00:00", "x" * 17):
        with pytest.raises(UsageError, match="MAC address"):
            mac_address(wrong)


def test_frames_wait_while_the_device_is_held(guest, wire):
    guest.offer(1)
    with guest.driver.frame.held():
        thread = threading.Thread(target=wire.deliver, args=([FRAME],), daemon=True)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and guest.received() == [] and guest.driver.frame.state()["interrupts"] == 0
    thread.join(PATIENCE)
    assert guest.received() == [FRAME]


def test_a_snapshot_keeps_the_address(guest, wire):
    saved = guest.driver.frame.state()
    other = VirtioMmio(Net(Wire(up=False)), FakeMemory(), Line())
    other.restore(saved)
    assert other.device.mac == mac_address(MAC) and other.read(0x106, 2) == 0
    assert other.read(0x60, 4) == 2, "the link is down now: the driver is told"
    same = VirtioMmio(Net(Wire()), FakeMemory(), Line())
    same.restore(saved)
    assert same.read(0x106, 2) == 1 and same.read(0x60, 4) == 0


# -- sockets


class Ears:
    """Collects what a link delivers."""

    def __init__(self, link):
        self.frames, self.changes, self.open = [], [], True
        link.start(self.frames.extend, lambda: self.open, lambda: self.changes.append(link.up))


@pytest.fixture
def link_of():
    """parse_link, closed afterwards."""
    links = []

    def make(text):
        links.append(parse_link(text))
        return links[-1], Ears(links[-1])

    yield make
    for link in links:
        link.close()
        assert link._thread is not None and not link._thread.is_alive()


def test_two_ends_of_a_unix_stream(link_of, tmp_path):
    path = tmp_path / "s"
    server, heard = link_of(f"unix:{path},server")
    assert not server.up and not server.send(FRAME)
    client, answered = link_of(f"unix:{path}")
    until(lambda: server.up)
    assert client.up and heard.changes == [True]
    assert server.send(FRAME) and client.send(FRAME[::-1]) and client.send(bytes(MAX_FRAME))
    until(lambda: answered.frames and len(heard.frames) == 2)
    assert answered.frames == [FRAME] and heard.frames == [FRAME[::-1], bytes(MAX_FRAME)]
    client.close()
    until(lambda: heard.changes == [True, False])
    assert not server.send(FRAME)
    again, _ = link_of(f"unix:{path}")  # the next one may come
    until(lambda: server.up)
    server.close()
    assert not path.exists()
    until(lambda: not again.up)


def test_tcp(link_of):
    server, heard = link_of("tcp:127.0.0.1:0,server")
    host, port = server.address
    client, _ = link_of(f"tcp:{host}:{port}")
    client.send(FRAME)
    until(lambda: heard.frames == [FRAME])


def test_the_framing_is_qemus(link_of, tmp_path):
    server, heard = link_of(f"unix:{tmp_path / 's'},server")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE)
        peer.connect(str(tmp_path / "s"))
        for byte in struct.pack(">I", len(FRAME)) + FRAME + struct.pack(">I", 0) + struct.pack(">I", 3) + b"abc":
            peer.send(bytes([byte]))
        until(lambda: heard.frames == [FRAME, b"abc"])
        server.send(FRAME)
        assert peer.recv(100) == struct.pack(">I", len(FRAME)) + FRAME


def test_a_length_that_cannot_be_ends_the_connection(link_of, tmp_path):
    server, heard = link_of(f"unix:{tmp_path / 's'},server")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE)
        peer.connect(str(tmp_path / "s"))
        peer.send(struct.pack(">I", 2) + b"ok" + struct.pack(">I", MAX_FRAME + 1) + bytes(100))
        assert peer.recv(1) == b""
    until(lambda: not server.up)
    assert heard.frames == [b"ok"]


def test_a_peer_that_does_not_read_loses_frames_and_holds_nobody_up(link_of, tmp_path):
    server, _ = link_of(f"unix:{tmp_path / 's'},server")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(PATIENCE)
        peer.connect(str(tmp_path / "s"))
        until(lambda: server.up)
        sent = 0
        while server.send(bytes(60000)):
            sent += 1
            assert sent < 1000
        assert len(server._queued) <= link_module.MAX_QUEUED
        # What was taken arrives whole once it is read.
        data = bytearray()
        while len(data) < sent * 60004:
            data += peer.recv(1 << 20)
        assert bytes(data) == (struct.pack(">I", 60000) + bytes(60000)) * sent
        until(lambda: not server._queued)
        assert server.send(FRAME)


def test_a_guest_that_takes_nothing_stops_the_reading(link_of, tmp_path):
    server, heard = link_of(f"unix:{tmp_path / 's'},server")
    heard.open = False
    client, _ = link_of(f"unix:{tmp_path / 's'}")
    until(lambda: server.up)
    client.send(FRAME)
    client.send(FRAME)
    server.wake()
    assert heard.frames == []
    heard.open = True
    server.wake()
    until(lambda: heard.frames == [FRAME, FRAME])


def test_datagrams(link_of, tmp_path):
    one, heard_one = link_of(f"dgram:{tmp_path / 'a'},{tmp_path / 'b'}")
    assert one.up and not one.send(FRAME), "nobody is there yet"
    two, heard_two = link_of(f"dgram:{tmp_path / 'b'},{tmp_path / 'a'}")
    assert one.send(FRAME) and two.send(FRAME[::-1])
    until(lambda: heard_one.frames and heard_two.frames)
    assert (heard_one.frames, heard_two.frames) == ([FRAME[::-1]], [FRAME])
    two.close()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "text", ["", "tap0", "unix:", "unix:,server", "tcp:1234", "tcp::1", "tcp:h:", "tcp:h:x", "tcp:h:65536", "dgram:a"]
)
def test_names_that_are_no_links(text):
    with pytest.raises(UsageError, match="allowed are unix:PATH"):
        parse_link(text)


def test_links_that_cannot_be_had(tmp_path):
    with pytest.raises(UsageError, match="start the other end first"):
        StreamLink(str(tmp_path / "nobody"))
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(UsageError, match=f"remove {taken}"):
        StreamLink(str(taken), server=True)
    with pytest.raises(UsageError, match="cannot be made"):
        DatagramLink(str(taken), str(tmp_path / "x"))
    with pytest.raises(UsageError, match="cannot be listened at"):
        StreamLink("/" + "x" * 200, server=True)
    assert taken.exists()


def test_two_machines_on_one_cable(attach, tmp_path):
    server = parse_link(f"unix:{tmp_path / 's'},server")
    one = Guest(attach(Net(server), size=8 << 20))
    assert one.driver.config(6, 2) == 0
    two = Guest(attach(Net(parse_link(f"unix:{tmp_path / 's'}")), size=8 << 20))
    until(lambda: one.driver.line.level)
    assert one.driver.interrupt() == 2 and one.driver.config(6, 2) == 1
    one.offer(32)
    frames = [bytes([n]) * (60 + n) for n in range(32)]
    for frame in frames:
        two.send(frame)
    got = []
    until(lambda: got.extend(one.received()) or len(got) == 32)
    assert got == frames
    threads = {thread.name for thread in threading.enumerate()}
    two.driver.frame.close()
    until(lambda: one.driver.config(6, 2) == 0)
    assert any(name.startswith("virtio-net") for name in threads)


# -- QEMU at the other end


def dhcp_discover(mac):
    """An Ethernet frame with a DHCPDISCOVER (RFC 2131)."""
    bootp = struct.pack(">BBBBIHHIIII", 1, 1, 6, 0, 0x1234, 0, 0x8000, 0, 0, 0, 0) + mac.ljust(16, b"\0") + bytes(192)
    bootp += bytes.fromhex("63825363 350101 ff")
    udp = struct.pack(">HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    check = sum(struct.unpack(">10H", head))
    check = ~((check & 0xFFFF) + (check >> 16)) & 0xFFFF
    return b"\xff" * 6 + mac + b"\x08\x00" + head[:10] + struct.pack(">H", check) + head[12:] + udp


def has_user_network(qemu):
    done = subprocess.run([qemu, "-M", "none", "-netdev", "help"], capture_output=True, text=True, check=False)
    return {"user", "stream", "hubport"} <= set(done.stdout.split())


@pytest.mark.parametrize("kind", ["stream", "dgram"])
def test_qemus_user_network_answers(attach, tmp_path, kind):
    qemu = shutil.which("qemu-system-aarch64") or shutil.which("qemu-system-x86_64")
    if qemu is None or not has_user_network(qemu):
        pytest.skip("needs a QEMU with -netdev user and stream (7.2 or newer)")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    if kind == "stream":
        link = parse_link(f"unix:{ours},server")
        there = f"stream,id=s,server=off,addr.type=unix,addr.path={ours}"
    else:
        link = parse_link(f"dgram:{ours},{theirs}")
        there = f"dgram,id=s,local.type=unix,local.path={theirs},remote.type=unix,remote.path={ours}"
    guest = Guest(attach(Net(link, mac=MAC), size=8 << 20))
    guest.offer(16)
    command = [qemu, "-M", "none", "-display", "none", "-monitor", "none", "-serial", "none"]
    command += ["-netdev", "user,id=u", "-netdev", there]
    command += [word for i, n in enumerate("us") for word in ("-netdev", f"hubport,id=h{i},hubid=0,netdev={n}")]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            until(lambda: link.up and (kind == "stream" or theirs.exists()))
            guest.send(dhcp_discover(mac_address(MAC)))
            got = []
            until(lambda: got.extend(guest.received()) or got)
        finally:
            process.kill()
    offer = got[0]
    assert offer[12:14] == b"\x08\x00" and offer[14 + 20 + 8] == 2, "a BOOTREPLY"
    assert b"\x63\x82\x53\x63\x35\x01\x02" in offer and offer[14 + 20 + 8 + 16 :][:4] == bytes([10, 0, 2, 15])
    if kind == "stream":
        until(lambda: guest.driver.config(6, 2) == 0)
