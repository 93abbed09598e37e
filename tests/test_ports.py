"""The port allocator."""

import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import astuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from phones.ports import PortAllocator, PortsExhausted, port_is_free
from phones.runtime import PortTriple

LOOPBACK = "127.0.0.1"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A program that is not ours, listening with SO_REUSEADDR as servers do."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((LOOPBACK, 0))
        server.listen()
        yield server


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def small(clock: Clock | None = None, count: int = 3) -> PortAllocator:
    """An allocator of `count` triples on an address of this test's own, where nobody listens."""
    return PortAllocator(
        adb=(20000, 19999 + count),
        webrtc=(22000, 21999 + count),
        scrcpy=(24000, 23999 + count),
        bind_address="127.45.67.89",
        clock=clock or Clock(),
    )


def test_all_triples_differ_and_lie_in_their_ranges() -> None:
    ports = small()
    taken = [ports.take() for _ in range(3)]
    assert sorted(port for triple in taken for port in astuple(triple)) == [
        *range(20000, 20003), *range(22000, 22003), *range(24000, 24003),
    ]  # fmt: skip
    assert all(20000 <= t.adb < 22000 <= t.webrtc < 24000 <= t.scrcpy for t in taken)


def test_a_spent_range_says_which_and_loses_nothing() -> None:
    ports = PortAllocator(
        adb=(20000, 20009), webrtc=(22000, 22000), scrcpy=(24000, 24009), bind_address="127.45.67.89"
    )
    held = ports.take()
    with pytest.raises(PortsExhausted) as refusal:
        ports.take()
    assert refusal.value.range_name == "webrtc"
    assert ports.free_counts() == {"adb": 9, "webrtc": 0, "scrcpy": 9}
    ports.free(held)
    assert ports.free_counts() == {"adb": 10, "webrtc": 1, "scrcpy": 10}


def test_a_port_somebody_listens_on_is_skipped(listener: socket.socket) -> None:
    foreign = listener.getsockname()[1]
    ports = PortAllocator(
        adb=(foreign, foreign), webrtc=(1024, 1030), scrcpy=(2000, 2010), bind_address=LOOPBACK
    )
    with pytest.raises(PortsExhausted, match="adb"):
        ports.take()


def test_a_foreign_port_comes_back_after_its_time() -> None:
    clock = Clock()
    ports = small(clock, count=1)
    ports.mark_foreign(20000, for_s=60)
    with pytest.raises(PortsExhausted):
        ports.take()
    clock.now = 59
    ports.mark_foreign(20000, for_s=60)
    clock.now = 61
    with pytest.raises(PortsExhausted):
        ports.take()
    clock.now = 119
    assert ports.take() == PortTriple(20000, 22000, 24000)


def test_a_held_port_found_foreign_is_not_given_out_when_freed() -> None:
    clock = Clock()
    ports = small(clock, count=1)
    triple = ports.take()
    ports.mark_foreign(triple.adb, for_s=60)
    ports.free(triple)
    assert ports.free_counts() == {"adb": 0, "webrtc": 1, "scrcpy": 1}
    clock.now = 60
    assert ports.take() == triple


def test_lingering_connections_do_not_make_a_port_taken(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    client = socket.create_connection((LOOPBACK, port))
    server, _ = listener.accept()
    assert not port_is_free(LOOPBACK, port)
    # Whoever closes first keeps the connection in TIME_WAIT.
    server.close()
    client.close()
    listener.close()
    with closing(socket.socket()) as plain, pytest.raises(OSError):
        plain.bind((LOOPBACK, port))
    assert port_is_free(LOOPBACK, port)


def test_a_freed_port_is_given_out_last() -> None:
    ports = small()
    first = ports.take()
    ports.free(first)
    assert [ports.take() for _ in range(3)][-1] == first


def test_freeing_late_does_not_take_the_ports_of_the_next_phone() -> None:
    ports = small(count=1)
    first = ports.take()
    ports.free(first)
    mixed = PortTriple(first.adb, 40000, 40001)
    ports.hold(mixed)
    ports.free(first)
    with pytest.raises(PortsExhausted):
        ports.take()


def test_a_port_cannot_be_held_twice() -> None:
    ports = small()
    ports.hold(PortTriple(20000, 22000, 24000))
    ports.hold(PortTriple(20000, 22000, 24000))
    with pytest.raises(ValueError, match="22000"):
        ports.hold(PortTriple(20001, 22000, 24001))
    assert ports.take() == PortTriple(20001, 22001, 24001)


@pytest.mark.parametrize(
    ("adb", "webrtc", "scrcpy", "complaint"),
    [
        ((1, 10), (10, 20), (30, 40), "adb ports and the webrtc ports overlap"),
        ((1, 99), (50, 60), (100, 110), "overlap"),
        ((10, 9), (20, 30), (40, 50), "adb ports 10-9"),
        ((0, 9), (20, 30), (40, 50), "no range"),
        ((1, 9), (20, 30), (40, 65536), "scrcpy"),
    ],
)
def test_impossible_ranges_are_refused(
    adb: tuple[int, int], webrtc: tuple[int, int], scrcpy: tuple[int, int], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        PortAllocator(adb=adb, webrtc=webrtc, scrcpy=scrcpy)


class AllocatorMachine(RuleBasedStateMachine):
    """Any sequence of calls: no port is held twice, none is lost."""

    triples: Bundle[PortTriple] = Bundle("triples")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.ports = small(self.clock, count=4)
        self.held: set[PortTriple] = set()
        self.foreign: dict[int, float] = {}

    @rule(target=triples)
    def take(self) -> PortTriple | MultipleResults[PortTriple]:
        try:
            triple = self.ports.take()
        except PortsExhausted:
            assert min(self.ports.free_counts().values()) == 0
            return multiple()
        for other in self.held:
            assert set(astuple(triple)).isdisjoint(astuple(other))
        assert all(self.foreign.get(port, 0) <= self.clock.now for port in astuple(triple))
        self.held.add(triple)
        return triple

    @rule(triple=consumes(triples), again=st.booleans())
    def free(self, triple: PortTriple, again: bool) -> None:
        self.ports.free(triple)
        if again:
            self.ports.free(triple)
        self.held.discard(triple)

    @rule(port=st.sampled_from([*range(20000, 20004), *range(24000, 24004)]), for_s=st.integers(1, 9))
    def mark_foreign(self, port: int, for_s: int) -> None:
        self.ports.mark_foreign(port, for_s)
        self.foreign[port] = self.clock.now + for_s

    @rule(passed_s=st.integers(1, 5))
    def wait(self, passed_s: int) -> None:
        self.clock.now += passed_s

    @invariant()
    def every_port_is_free_held_or_foreign(self) -> None:
        held = {port for triple in self.held for port in astuple(triple)}
        foreign = {port for port, until in self.foreign.items() if until > self.clock.now}
        unavailable = held | foreign
        expected = {
            name: sum(port not in unavailable for port in range(low, low + 4))
            for name, low in (("adb", 20000), ("webrtc", 22000), ("scrcpy", 24000))
        }
        assert self.ports.free_counts() == expected


TestAnySequence = AllocatorMachine.TestCase
TestAnySequence.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
