"""Which replica a request goes to, by hand: 8 ids per completion, a prompt id is 1/8 of one."""

from __future__ import annotations

import pytest

from rayrl.cluster.serving.replica_selector import PROBE_S, InFlightRequest, ReplicaSelector
from rayrl.types import Request, Sampling


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Client:
    """A selector for two replicas, and its clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.selector = ReplicaSelector(2, self.clock)

    def send(self, session: str, prompt: int = 8) -> InFlightRequest:
        sampling = Sampling(max_tokens=8)
        return self.selector.select(Request(session, tuple(range(prompt)), sampling))

    def answer(self, sent: InFlightRequest, after_s: float, cached: int = 0) -> None:
        self.clock.now += after_s
        self.selector.completed(sent, 8, cached)

    def paces(self, *of: float, prompt: int = 8) -> list[str]:
        """Give each replica a pace; returns a conversation that is at each."""
        in_flight = [self.send(name, prompt) for name in "ab"]
        in_flight.sort(key=lambda sent: sent.replica)
        assert [sent.replica for sent in in_flight] == [0, 1]
        began = self.clock.now
        for sent, pace in sorted(zip(in_flight, of, strict=True), key=lambda pair: pair[1]):
            self.clock.now = began + pace * (8 + prompt / 8)
            self.selector.completed(sent, 8, 0)
        return [sent.request.session for sent in in_flight]


@pytest.fixture
def client() -> Client:
    return Client()


def test_replicas_of_one_pace_get_the_same(client: Client) -> None:
    first = [client.send(f"s{k}").replica for k in range(20)]
    assert first.count(0) == 10
    assert [client.send(f"s{k}", 80).replica for k in range(20)] == first, "where its KV is"


def test_new_conversations_go_to_a_slow_replica_in_proportion(client: Client) -> None:
    client.paces(10.25, 1.0)
    replicas = [client.send(f"s{k}").replica for k in range(22)]
    assert replicas == [1] * 10 + [0] + [1] * 10 + [0], "10.25 × 1 < 1 × 11, 10.25 × 2 < 1 × 21"


def test_a_conversation_moves_when_waiting_costs_more_than_its_prompt(client: Client) -> None:
    slow, fast = client.paces(1.0, 0.1, prompt=80)
    # stays: 1 × (8 + (160 - 88) / 8) = 17; moves: 0.1 × (8 + 160 / 8) = 2.8
    sent = client.send(slow, 160)
    assert (sent.replica, sent.moved_from) == (1, 0)
    sent = client.send(slow, 176)
    assert (sent.replica, sent.moved_from) == (1, None), "and stays there"
    assert client.selector.release(slow) == 1
    assert client.selector.release(slow) is None
    assert client.send(fast, 160).replica == 1


def test_a_long_prompt_is_not_computed_again(client: Client) -> None:
    slow, _ = client.paces(1.0, 0.1, prompt=800)
    # stays: 1 × (8 + 8 / 8) = 9; moves: 0.1 × (8 + 816 / 8) = 11
    sent = client.send(slow, 816)
    assert (sent.replica, sent.moved_from) == (0, None)


def test_what_saves_little_is_not_worth_it(client: Client) -> None:
    slow, _ = client.paces(0.01, 0.001)
    assert client.send(slow, 24).replica == 0, "0.01 × 9 s is less than 0.5 s"


def test_a_replica_that_does_not_answer_is_slow(client: Client) -> None:
    stuck, other = client.paces(0.1, 0.1)
    sent = client.send("c")
    hung = client.send("d")
    if sent.replica == 1:
        sent, hung = hung, sent
    client.answer(hung, 0.9)
    assert client.send(stuck, 24).replica == 0, "the pace it had"
    client.clock.now += 10  # 10.9 s for 9 units at most: 1.2 s each
    assert client.send(other, 24).replica == 1
    assert [client.send(f"e{k}").replica for k in range(6)] == [1] * 6
    client.selector.timed_out(sent)
    assert [client.send(f"f{k}").replica for k in range(6)] == [1] * 6, "it counts as measured"


def test_a_replica_that_recovers_is_noticed(client: Client) -> None:
    client.paces(10.0, 0.1)
    assert client.send("c").replica == 1
    client.clock.now += PROBE_S + 0.1
    probe = client.send("d")
    assert probe.replica == 0
    client.clock.now += PROBE_S + 0.1
    assert client.send("e").replica == 1, "one at a time"
    assert client.selector.release("d") == 0
    client.selector.discard(probe)
    assert client.send("f").replica == 1, "not at once"
    client.clock.now += PROBE_S + 0.1
    assert client.send("g").replica == 0


def test_a_probe_that_is_answered_soon_counts_for_more_than_what_was_long_ago(
    client: Client,
) -> None:
    client.paces(10.0, 0.1)
    client.clock.now += 20
    probe = client.send("c")
    assert probe.replica == 0
    client.answer(probe, 0.9)  # 0.1 s per unit; the 10 s before have a weight of e^-(20.9 / 5)
    replicas = [client.send(f"s{k}").replica for k in range(12)]
    assert replicas == [1, 0] * 6, "10^0.0153 × 0.1^0.9847 = 0.107 s per unit, and 0.1"


def test_one_answer_that_is_far_off_does_not_last(client: Client) -> None:
    client.paces(10.0, 0.1)
    state = client.selector._replicas[0]
    for _ in range(3):
        sent = InFlightRequest(
            Request("d", (), Sampling(max_tokens=8)), 0, None, client.clock.now, 8.0, 8.0
        )
        client.answer(sent, 0.8)
    assert state.pace == pytest.approx(10 ** (2 * 0.8**3 - 1)), "0.1 s, a fifth nearer each time"
