"""Messages between ranks: they arrive in order, a farewell is no loss, and a loss is noticed while nobody reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError

import numpy as np
import pytest

from llama31_core.inference.batch import BlockMove, ForwardInput
from llama31_core.inference.parallel_channel import Hub, Peer, connect

KEY = b"of these ranks"


class Pair:
    """Rank 0's end and rank 1's, and who was missed by each."""

    def __init__(self) -> None:
        self.missed_by_hub: list[str] = []
        self.missed_by_rank: list[str] = []
        self.noticed = threading.Event()
        self.hub = Hub("127.0.0.1", KEY)
        made: list[Peer] = []
        joining = threading.Thread(
            target=lambda: made.append(connect("127.0.0.1", self.hub.port, KEY, 1, self.noting(self.missed_by_rank)))
        )
        joining.start()
        self.hub.accept([1], self.noting(self.missed_by_hub))
        joining.join()
        self.rank = made[0]

    def noting(self, where: list[str]) -> Callable[[str], None]:
        def note(name: str) -> None:
            where.append(name)
            self.noticed.set()

        return note


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.rank.close()


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    batch = ForwardInput([[1, 2]], [0], [[3]], [1])
    pair.hub.peers[1].send((batch, None))
    pair.hub.peers[1].send([BlockMove("copy", 1, 2)])
    assert pair.rank.receive() == (batch, None)
    assert pair.rank.receive() == [BlockMove("copy", 1, 2)]
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    pair.rank.send(logits)
    assert (pair.hub.peers[1].receive() == logits).all()


def test_a_farewell_is_no_loss(pair: Pair) -> None:
    pair.hub.close()
    assert pair.rank.receive() is None
    pair.rank.close()
    assert not pair.noticed.wait(0.3)


def test_a_rank_that_ends_is_missed_while_nobody_reads(pair: Pair) -> None:
    pair.rank.close()
    assert pair.noticed.wait(10)
    assert pair.missed_by_hub == ["rank 1"]
    with pytest.raises(EOFError, match="rank 1 has ended"):
        pair.hub.peers[1].receive()


def test_who_does_not_know_the_key_is_turned_away() -> None:
    hub = Hub("127.0.0.1", KEY)
    told: list[BaseException] = []

    def intrude() -> None:
        try:
            connect("127.0.0.1", hub.port, b"another", 1)
        except (AuthenticationError, OSError, EOFError) as error:
            told.append(error)

    accepting = threading.Thread(target=hub.accept, args=([1],))
    accepting.start()
    intrude()
    assert told
    peer = connect("127.0.0.1", hub.port, KEY, 1)
    accepting.join()
    hub.peers[1].send("welcome")
    assert peer.receive() == "welcome"
    hub.close()
    assert peer.receive() is None


def stages() -> tuple[Hub, dict[int, Peer], list[str]]:
    """Rank 0, the other ends of ranks 1 and 2, of which the first's messages go on to the second, and who is missed."""
    hub, missed = Hub("127.0.0.1", KEY), list[str]()
    made: dict[int, Peer] = {}

    def join(rank: int) -> None:
        made[rank] = connect("127.0.0.1", hub.port, KEY, rank, missed.append)

    joining = [threading.Thread(target=join, args=(rank,)) for rank in (1, 2)]
    for thread in joining:
        thread.start()
    hub.accept([1, 2], missed.append)
    for thread in joining:
        thread.join()
    hub.peers[1].pass_on([hub.peers[2]])
    return hub, made, missed


def test_what_a_stage_sends_on_goes_to_the_next_one_and_so_does_its_end() -> None:
    hub, made, missed = stages()
    made[1].send("hidden states")
    assert made[2].receive() == "hidden states"
    made[1].close()
    for peer in (hub.peers[1], hub.peers[2], hub.peers[2], made[2]):  # an end is told as often as it is asked for
        with pytest.raises(EOFError, match="has ended"):
            peer.receive()
    assert missed == ["rank 1", "rank 0"]


def test_a_stage_that_was_told_to_end_leaves_the_next_one_its_own_farewell() -> None:
    hub, made, missed = stages()
    before = threading.active_count()
    hub.peers[1].send(None)
    assert made[1].receive() is None
    made[1].close()
    deadline_s = time.monotonic() + 30  # until both threads that read between rank 0 and rank 1 have ended
    while threading.active_count() > before - 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    hub.peers[2].send(None)
    assert made[2].receive() is None
    assert missed == []
