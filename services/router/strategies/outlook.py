"""What serving a request one way or another would take, by how fast each engine was measured to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvmesh.strategy import Engine

# The largest share of its time that an engine is thought to prefill.
MOST_BUSY = 0.9
# Engines that may prefill for another, of those looked at: the cheapest.
HELPERS = 3
# Parts of what is missing that may be prefilled elsewhere.
SPLITS = (0.25, 0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way: `decoder` generates; if there is a `prefiller`, it sends the KV up to `end`.

    `own`: seconds until the request is over; `others`: seconds that all others together lose by it.
    """

    decoder: Engine
    prefiller: Engine | None
    end: int
    own: float
    others: float

    @property
    def cost(self) -> float:
        """What is to be least: the sum over all requests, this one among them."""
        return self.own + self.others


class Outlook:
    """One engine as it will be in the next moment. `cached`: tokens of the prompt that it has."""

    def __init__(self, engine: Engine, cached: int) -> None:
        load, pace = engine.load, engine.pace
        self.engine, self.cached = engine, cached
        self.prefill, self.send, self.step, self.busy = pace.prefill, pace.send, pace.step, pace.busy
        # Seconds of prefill that wait there.
        self.queue = self.prefill.each * load.queued_tokens
        # A send that is being prefilled runs, and decodes nothing.
        self.decoding = max(0, load.running - min(load.sending, 2))
        self.running = load.running + load.waiting + load.tickets + load.credit_requests
        # What has come or will come to decode there; sends only prefill.
        self.coming = self.running - load.sending
        self._tickets = load.tickets
        self._typical = max(self.prefill.at(pace.prompt), 1e-6)

    def lost(self, seconds: float) -> float:
        """What others lose when it prefills for so long: those who decode stand still, those who come wait."""
        # Who comes while the queue is being worked off waits so much longer. Those who see that, and go elsewhere, lose
        # as much at most.
        held_up = self.busy / self._typical * (self.queue + seconds / 2)
        arriving = min(self._tickets, seconds / self._typical) / 2
        return seconds * (self.decoding + arriving + held_up)

    def decode(self, tokens: int) -> float:
        """Seconds to decode so many tokens, among those that are there and between the prefills that go on there."""
        return tokens * self.step.at(self.running + 1) / (1 - self.busy)

    def crowded(self, tokens: int) -> float:
        """What those who decode there lose by one more."""
        return tokens * self.decoding * self.step.each


def foresee(engines: Sequence[Outlook]) -> None:
    """Sets `busy` to what is to be expected: prefills go to those who decode least, to each as much as it can take.

    So a mesh falls into roles by itself: who has more to decode is spared prefills, and is then the better to decode.
    """
    left = sum(e.busy for e in engines)
    for e in sorted(engines, key=lambda e: e.coming):
        e.busy = min(left, MOST_BUSY)
        left -= e.busy


def plans(engines: Sequence[Outlook], n: int, new_tokens: int) -> Iterator[Plan]:
    """Every way worth a thought to serve a prompt of `n` tokens; first the simplest."""

    def price(p: Outlook) -> float:
        computing = p.prefill.at(max(0, n - 1 - p.cached))
        return p.queue + computing + p.lost(computing)

    helpers = sorted(engines, key=price)[: HELPERS + 1]
    for d in engines:
        decode, crowded = d.decode(new_tokens), d.crowded(new_tokens)
        held = d.cached
        alone = d.prefill.at(n - held)
        yield Plan(d.engine, None, held, d.queue + alone + decode, crowded + d.lost(alone))
        ends = [end for share in SPLITS if (end := held + round((n - 1 - held) * share)) > held]
        for p in helpers:
            if p is d:
                continue
            for end in ends:
                computing, rest = p.prefill.at(max(0, end - p.cached)), d.prefill.at(n - end)
                arrival = p.queue + computing + p.send.at(end - held)
                own = max(arrival, d.queue) + rest + decode
                yield Plan(d.engine, p.engine, end, own, crowded + p.lost(computing) + d.lost(rest))
