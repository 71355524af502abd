"""The ticket book by itself: every state, every refusal, and random walks against a model."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from engine_harness import until

from kvmesh.endpoint import tickets
from kvmesh.endpoint.base import Reservation
from kvmesh.endpoint.tickets import REMEMBERED, TicketBook, Writer
from kvmesh.errors import FailedPrecondition, InvalidArgument, MeshError, NotFound
from kvmesh.v1.common_pb2 import Endpoint
from kvmesh.v1.common_pb2 import Ticket as TicketMessage

ME = Endpoint(name="d", address="127.0.0.1:1", incarnation="a" * 32)


class Life:
    """Stands in for a ProcessRef."""

    def __init__(self) -> None:
        self.living = True

    def alive(self) -> bool:
        return self.living


class Freed:
    """The runtime's side: what was given back."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, reservation: int) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.order.append(reservation)


@pytest.fixture
def freed() -> Freed:
    return Freed()


@pytest.fixture
async def book(freed, monkeypatch):
    monkeypatch.setattr(tickets, "LOOK_S", 0.005)
    made = TicketBook(ME, "f" * 32, freed)
    yield made
    await made.close()


def opened(book: TicketBook, reservation: int = 7, matched: int = 2, end: int = 10, ttl: float = 60) -> TicketMessage:
    return book.open(Reservation(reservation, matched, np.arange(matched, end)), end, "owner", ttl)


def writer(number: int = 1, *lives: Life, name: str = "p") -> Writer:
    return Writer(("p" * 32, number), name, tuple(lives))  # type: ignore[arg-type]


async def freed_are(freed: Freed, *reservations: int) -> None:
    await until(lambda: len(freed.order) >= len(reservations))
    await asyncio.sleep(0)
    assert freed.order == list(reservations)


# Opening and finding


async def test_a_ticket_says_all_that_others_need(book):
    before = time.time()
    message = opened(book, ttl=30)
    assert (message.receiver, message.layout_fingerprint) == (ME, "f" * 32)
    assert (message.id, message.matched, message.end) == (1, 2, 10)
    assert 1000 * (before + 30) - 1 <= message.expires_unix_ms <= 1000 * (time.time() + 30)
    ticket = book.get(message)
    assert (ticket.reservation, ticket.filled, ticket.owner, ticket.writer) == (7, 2, "owner", None)
    assert book.count == 1 and book.quarantined == 0
    assert opened(book).id == 2


async def test_tickets_of_a_former_life_are_refused(book):
    message = opened(book)
    message.receiver.incarnation = "b" * 32
    for call in (book.get, book.release):
        with pytest.raises(FailedPrecondition, match=r"ticket.receiver = d bbbbbbbb is not this life of d, aaaaaaaa"):
            call(message)
    assert book.count == 1


async def test_unknown_tickets_are_not_found_and_released_in_vain(book):
    message = opened(book)
    message.id = 99
    with pytest.raises(NotFound, match=r"ticket.id = 99 is unknown"):
        book.get(message)
    assert book.release(message) is False
    assert book.count == 1


# The ends of a ticket


async def test_released_once(book, freed):
    message = opened(book)
    assert book.release(message) is True
    assert book.count == 0
    with pytest.raises(NotFound, match=r"ticket.id = 1 was released"):
        book.get(message)
    assert book.release(message) is False
    await freed_are(freed, 7)


async def test_expired(book, freed):
    message = opened(book, ttl=0.02)
    await freed_are(freed, 7)
    with pytest.raises(NotFound, match=r"ticket.id = 1 has expired"):
        book.get(message)
    assert book.release(message) is False and book.count == 0


async def test_used_once_and_not_given_back(book, freed):
    message = opened(book, ttl=0.02)
    assert book.use(book.get(message), 2) == 7
    with pytest.raises(NotFound, match="was used"):
        book.get(message)
    assert book.count == 0 and book.release(message) is False
    await asyncio.sleep(0.04)
    assert freed.order == []


async def test_use_asks_for_what_is_filled(book, freed):
    message = opened(book)
    for begin in (0, 1, 3, 10):
        with pytest.raises(InvalidArgument, match=f"begin = {begin}, but ticket 1 is filled to 2"):
            book.use(book.get(message), begin)
    assert book.count == 1 and freed.order == []


async def test_every_change_is_told(book, freed):
    counts: list[tuple[int, int]] = []
    book.on_change = lambda: counts.append((book.count, book.quarantined))
    message = opened(book)
    book.begin_write(book.get(message), 2, 10, writer())
    book.release(message)
    assert counts[-1] == (1, 8)
    book.end_write(book._tickets[1], None, in_doubt=False)
    assert counts[-1] == (0, 0)


async def test_ends_are_remembered_but_not_for_ever(book):
    messages = [opened(book) for _ in range(REMEMBERED + 1)]
    for message in messages:
        book.release(message)
    with pytest.raises(NotFound, match="is unknown"):
        book.get(messages[0])
    with pytest.raises(NotFound, match="was released"):
        book.get(messages[1])


# Writing


@pytest.mark.parametrize(("begin", "end"), [(0, 10), (1, 10), (3, 10), (2, 11), (2, 1), (10, 10)], ids=lambda v: str(v))
async def test_a_write_goes_on_where_the_ticket_is_filled_to(book, begin, end):
    ticket = book.get(opened(book))
    with pytest.raises(InvalidArgument, match=f"begin = {begin}, end = {end}: ticket 1 holds 2, and ends at 10"):
        book.begin_write(ticket, begin, end, writer())
    assert ticket.writer is None
    # The refused writer may try again.
    book.begin_write(ticket, 2, 10, writer())


async def test_a_ticket_is_filled_by_parts(book, freed):
    message = opened(book)
    ticket = book.get(message)
    for number, (begin, end) in enumerate([(2, 5), (5, 5), (5, 10)]):
        book.begin_write(ticket, begin, end, writer(number))
        book.end_write(ticket, end, in_doubt=False)
        assert ticket.filled == end and ticket.writer is None
    assert book.use(ticket, 10) == 7
    assert freed.order == []


async def test_one_writer_at_a_time(book):
    ticket = book.get(opened(book))
    book.begin_write(ticket, 2, 10, writer(1, name="first"))
    with pytest.raises(FailedPrecondition, match="ticket 1 is being written into by first"):
        book.begin_write(ticket, 2, 10, writer(2))
    with pytest.raises(FailedPrecondition, match="ticket 1 is still being written into by first"):
        book.use(ticket, 2)


async def test_a_write_that_failed_cleanly_leaves_the_ticket(book, freed):
    message = opened(book)
    ticket = book.get(message)
    book.begin_write(ticket, 2, 10, writer(1))
    book.end_write(ticket, None, in_doubt=False)
    assert book.get(message).filled == 2
    book.begin_write(ticket, 2, 10, writer(2))
    book.end_write(ticket, 10, in_doubt=False)
    assert freed.order == []


@pytest.mark.parametrize("how", ["released", "expired"])
async def test_taken_back_during_a_write(book, freed, how):
    message = opened(book, ttl=0.02 if how == "expired" else 60)
    ticket = book.get(message)
    book.begin_write(ticket, 2, 10, writer())
    if how == "released":
        assert book.release(message) is True
    await ticket.revoked.wait()
    assert (book.count, book.quarantined) == (1, 8)
    with pytest.raises(NotFound, match="was taken back"):
        book.get(message)
    assert book.release(message) is False
    await asyncio.sleep(0.02)
    assert freed.order == []
    book.end_write(ticket, None, in_doubt=False)
    assert (book.count, book.quarantined) == (0, 0)
    await freed_are(freed, 7)


async def test_taken_back_while_the_last_word_was_under_way(book, freed):
    """What is published already is not quarantined; the rest is given back."""
    message = opened(book)
    ticket = book.get(message)
    book.begin_write(ticket, 2, 6, writer())
    book.release(message)
    book.end_write(ticket, 6, in_doubt=False)
    assert book.count == 0
    await freed_are(freed, 7)


# Writers in doubt


async def test_in_doubt_until_stopped(book, freed):
    life = Life()
    message = opened(book)
    ticket = book.get(message)
    book.begin_write(ticket, 2, 10, writer(1, life))
    book.end_write(ticket, None, in_doubt=True)
    assert (book.count, book.quarantined) == (0, 8)
    with pytest.raises(NotFound, match="its writer broke off"):
        book.get(message)
    assert book.release(message) is False
    await asyncio.sleep(0.03)
    assert freed.order == []
    book.writer_stopped(("p" * 32, 2))
    book.writer_stopped(("q" * 32, 1))
    await asyncio.sleep(0.01)
    assert freed.order == [] and book.quarantined == 8
    book.writer_stopped(("p" * 32, 1))
    assert book.quarantined == 0
    await freed_are(freed, 7)
    book.writer_stopped(("p" * 32, 1))
    await asyncio.sleep(0.01)
    assert freed.order == [7]


async def test_in_doubt_until_dead(book, freed):
    lives = [Life(), Life()]
    ticket = book.get(opened(book))
    book.begin_write(ticket, 2, 10, writer(1, *lives))
    book.end_write(ticket, None, in_doubt=True)
    lives[0].living = False
    await asyncio.sleep(0.03)
    # One of its ranks lives, and may write.
    assert freed.order == []
    lives[1].living = False
    await freed_are(freed, 7)
    assert book.quarantined == 0


async def test_writers_that_cannot_be_looked_at_are_not_taken_for_dead(book, freed):
    ticket = book.get(opened(book))
    book.begin_write(ticket, 2, 10, writer(1))
    book.end_write(ticket, None, in_doubt=True)
    await asyncio.sleep(0.03)
    assert freed.order == [] and book.quarantined == 8


async def test_the_dead_are_looked_for_again_and_again(book, freed):
    """The look-out ends when nobody is in doubt, and begins anew."""
    for number in range(3):
        life = Life()
        ticket = book.get(opened(book, reservation=number))
        book.begin_write(ticket, 2, 10, writer(number, life))
        book.end_write(ticket, None, in_doubt=True)
        life.living = False
        await freed_are(freed, *range(number + 1))
        await until(lambda: len(book._tasks) == 0)


async def test_stopped_before_the_break_is_seen(book, freed):
    """Both orders end alike: the ticket is gone, its slots are free."""
    message = opened(book)
    ticket = book.get(message)
    book.begin_write(ticket, 2, 10, writer(1, Life()))
    book.writer_stopped(("p" * 32, 1))
    assert freed.order == []
    book.end_write(ticket, None, in_doubt=True)
    assert (book.count, book.quarantined) == (0, 0)
    with pytest.raises(NotFound, match="its writer broke off"):
        book.get(message)
    await freed_are(freed, 7)


async def test_taken_back_and_then_in_doubt(book, freed):
    message = opened(book)
    ticket = book.get(message)
    book.begin_write(ticket, 2, 10, writer(1, Life()))
    book.release(message)
    assert book.quarantined == 8
    book.end_write(ticket, None, in_doubt=True)
    assert (book.count, book.quarantined) == (0, 8)
    assert freed.order == []
    book.writer_stopped(("p" * 32, 1))
    await freed_are(freed, 7)


async def test_what_was_filled_before_is_not_quarantined(book):
    ticket = book.get(opened(book))
    book.begin_write(ticket, 2, 6, writer(1))
    book.end_write(ticket, 6, in_doubt=False)
    book.begin_write(ticket, 6, 10, writer(2))
    book.end_write(ticket, None, in_doubt=True)
    assert book.quarantined == 4


# Names of writes


async def test_a_number_in_use_is_refused(book):
    first, second = book.get(opened(book)), book.get(opened(book))
    book.begin_write(first, 2, 10, writer(1))
    with pytest.raises(InvalidArgument, match="write_id = 1 of p was used before"):
        book.begin_write(second, 2, 10, writer(1))
    assert second.writer is None
    # The same number of another sender is another write.
    book.begin_write(second, 2, 10, Writer(("q" * 32, 1), "q", ()))


async def test_a_number_in_doubt_is_refused(book, freed):
    """Else Stopped could not tell which of the two has stopped, and one would be in doubt for ever."""
    first, second = book.get(opened(book, reservation=1)), book.get(opened(book, reservation=2))
    book.begin_write(first, 2, 10, writer(1, Life()))
    book.end_write(first, None, in_doubt=True)
    with pytest.raises(InvalidArgument, match="was used before"):
        book.begin_write(second, 2, 10, writer(1))
    book.writer_stopped(("p" * 32, 1))
    await freed_are(freed, 1)


async def test_a_write_that_was_said_to_have_stopped_cannot_begin(book):
    ticket = book.get(opened(book))
    book.writer_stopped(("p" * 32, 1))
    with pytest.raises(InvalidArgument, match="was used before"):
        book.begin_write(ticket, 2, 10, writer(1))
    book.begin_write(ticket, 2, 10, writer(2))


async def test_stops_are_remembered_but_not_for_ever(book):
    for number in range(REMEMBERED + 1):
        book.writer_stopped(("p" * 32, number))
    assert len(book._stopped) == REMEMBERED
    book.begin_write(book.get(opened(book)), 2, 10, writer(0))


# The end of the book


async def test_close_ends_everything(freed, monkeypatch):
    monkeypatch.setattr(tickets, "LOOK_S", 0.005)
    book = TicketBook(ME, "f" * 32, freed)
    held, writing, doubtful = opened(book, 1), opened(book, 2), opened(book, 3)
    ticket = book.get(writing)
    book.begin_write(ticket, 2, 10, writer(1))
    other = book.get(doubtful)
    book.begin_write(other, 2, 10, writer(2))
    book.end_write(other, None, in_doubt=True)
    await book.close()
    assert ticket.revoked.is_set() and book.count == 0 and len(book._tasks) == 0
    assert all(t.timer.cancelled() for t in (ticket, other))  # type: ignore[union-attr]
    with pytest.raises(NotFound):
        book.get(held)
    await book.close()


async def test_close_waits_for_what_is_being_given_back(freed):
    book = TicketBook(ME, "f" * 32, freed)
    freed.gate = asyncio.Event()
    book.release(opened(book))
    asyncio.get_running_loop().call_later(0.02, freed.gate.set)
    await book.close()
    assert freed.order == [7]


async def test_a_runtime_that_is_gone_is_no_matter(caplog):
    async def free(reservation: int) -> None:
        raise MeshError("stopping")

    book = TicketBook(ME, "f" * 32, free)
    book.release(opened(book))
    await book.close()
    assert book.count == 0


# Random walks


@dataclass
class Modelled:
    """A ticket as it should be."""

    message: TicketMessage
    number: int
    filled: int = 2
    # held, writing, revoked (and being written into), doubtful, used, gone
    state: str = "held"
    writer: Writer | None = None
    life: Life = field(default_factory=Life)
    upto: int = 0
    # The writer's end is known.
    stopped: bool = False


class Walk:
    """Random operations on a book and a model side by side."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.all: dict[int, Modelled] = {}
        self.freed: Counter[int] = Counter()
        self.errors: list[str] = []
        self.writes = 0
        self.keys: list[tuple[str, int]] = []
        self.done: Counter[str] = Counter()
        self.book = TicketBook(ME, "f" * 32, self.free)

    async def free(self, number: int) -> None:
        self.freed[number] += 1
        ticket = self.all[number]
        if self.freed[number] > 1:
            self.errors.append(f"{number} was given back twice")
        if ticket.state != "gone":
            self.errors.append(f"{number} was given back, but is {ticket.state}")

    def some(self, *states: str) -> Modelled | None:
        of = [t for t in self.all.values() if t.state in states]
        return self.rng.choice(of) if of else None

    def open(self) -> None:
        number = len(self.all) + 1
        self.all[number] = Modelled(opened(self.book, number), number)

    def _key(self, ticket: Modelled) -> tuple[tuple[str, int], bool]:
        """(name for a write, whether it may be used)."""
        if self.keys and self.rng.random() < 0.2:
            key = self.rng.choice(self.keys)
            busy = any(
                t.writer is not None and t.writer.key == key and t.state in ("writing", "revoked", "doubtful")
                for t in self.all.values()
            )
            return key, not busy and key not in self.book._stopped
        self.writes += 1
        self.keys.append((self.rng.choice("pq") * 32, self.writes))
        return self.keys[-1], True

    def begin(self) -> None:
        if (ticket := self.some("held", "writing")) is None:
            return
        key, usable = self._key(ticket)
        begin = self.rng.choice([ticket.filled, ticket.filled, ticket.filled, 2, 5])
        end = self.rng.choice([begin, 4, 6, 10, 10, 11])
        life = Life()
        by = Writer(key, key[0][0], (life,) if self.rng.random() < 0.8 else ())  # type: ignore[arg-type]
        good = usable and ticket.state == "held" and begin == ticket.filled and begin <= end <= 10
        try:
            self.book.begin_write(self.book.get(ticket.message), begin, end, by)
        except (InvalidArgument, FailedPrecondition) as error:
            if good:
                self.errors.append(f"a good write was refused: {error}")
            return
        if not good:
            self.errors.append(f"write {key} of [{begin}:{end}) into {ticket} was granted")
        ticket.state, ticket.writer, ticket.life, ticket.upto = "writing", by, life, end
        ticket.stopped = False

    def end(self) -> None:
        if (ticket := self.some("writing", "revoked")) is None:
            return
        held = self.book._tickets[ticket.message.id]
        how = self.rng.choice(["filled", "filled", "clean", "doubt", "doubt"])
        filled = ticket.upto if how == "filled" and ticket.state == "writing" else None
        if filled is not None:
            ticket.filled = filled
        if how == "doubt":
            ticket.state = "gone" if ticket.stopped else "doubtful"
        else:
            ticket.state = "held" if ticket.state == "writing" else "gone"
        self.book.end_write(held, filled, in_doubt=how == "doubt")

    def stop(self) -> None:
        if not self.keys:
            return
        key = self.rng.choice([*self.keys[-8:], ("x" * 32, self.rng.randrange(9))])
        for ticket in self.all.values():
            if ticket.writer is not None and ticket.writer.key == key:
                if ticket.state in ("writing", "revoked"):
                    ticket.stopped = True
                elif ticket.state == "doubtful":
                    ticket.state = "gone"
        self.book.writer_stopped(key)

    def die(self) -> None:
        """The writer's process ends; if it was in doubt, that is seen at the next look."""
        if (ticket := self.some("doubtful", "writing", "revoked")) is not None:
            ticket.life.living = False

    def release(self) -> None:
        if (ticket := self.some("held", "writing", "revoked", "doubtful", "used", "gone")) is None:
            return
        expected = ticket.state in ("held", "writing")
        self._take_back(ticket)
        if self.book.release(ticket.message) is not expected:
            self.errors.append(f"release of {ticket} did not give {expected}")

    def expire(self) -> None:
        if (ticket := self.some("held", "writing", "revoked")) is None:
            return
        held = self.book._tickets[ticket.message.id]
        assert held.timer is not None and not held.timer.cancelled()
        self._take_back(ticket)
        self.book._expire(held)

    @staticmethod
    def _take_back(ticket: Modelled) -> None:
        ticket.state = {"held": "gone", "writing": "revoked"}.get(ticket.state, ticket.state)

    def use(self) -> None:
        if (ticket := self.some("held", "writing", "revoked", "doubtful", "gone", "used")) is None:
            return
        begin = self.rng.choice([ticket.filled, ticket.filled, 3])
        good = ticket.state == "held" and begin == ticket.filled
        try:
            number = self.book.use(self.book.get(ticket.message), begin)
        except (NotFound, FailedPrecondition, InvalidArgument) as error:
            if good:
                self.errors.append(f"a good use was refused: {error}")
            return
        if not good or number != ticket.number:
            self.errors.append(f"{ticket} was used as {number}")
        ticket.state = "used"

    async def look(self) -> None:
        """Time passes: who is dead is seen."""
        for ticket in self.all.values():
            if ticket.state == "doubtful" and ticket.writer is not None and ticket.writer.dead():
                ticket.state = "gone"
        await asyncio.sleep(0.003)

    async def step(self) -> None:
        moves = [self.open, self.begin, self.begin, self.end, self.stop, self.die, self.release, self.expire, self.use]
        move = self.rng.choice(moves)
        self.done[move.__name__] += 1
        move()
        if self.rng.random() < 0.1:
            await self.look()
        self.check()

    def check(self) -> None:
        assert not self.errors, self.errors
        states = Counter(t.state for t in self.all.values())
        assert self.book.count == states["held"] + states["writing"] + states["revoked"]
        waiting = sum(10 - t.filled for t in self.all.values() if t.state in ("revoked", "doubtful"))
        # Dead writers may have been seen before the model looked.
        unseen = sum(
            10 - t.filled
            for t in self.all.values()
            if t.state == "doubtful" and t.writer is not None and t.writer.dead()
        )
        assert waiting - unseen <= self.book.quarantined <= waiting
        for ticket in self.all.values():
            if ticket.state in ("held", "writing"):
                assert self.book.get(ticket.message).filled == ticket.filled
            else:
                with pytest.raises(NotFound):
                    self.book.get(ticket.message)

    async def finish(self) -> None:
        """Everybody comes to an end: nothing may be left over, nothing given back twice."""
        for ticket in self.all.values():
            if ticket.state in ("writing", "revoked"):
                held = self.book._tickets[ticket.message.id]
                ticket.state = "gone" if ticket.stopped else "doubtful"
                self.book.end_write(held, None, in_doubt=True)
            if ticket.state == "doubtful" and ticket.writer is not None:
                ticket.state = "gone"
                self.book.writer_stopped(ticket.writer.key)
            if ticket.state == "held":
                ticket.state = "gone"
                self.book.release(ticket.message)
        await until(lambda: len(self.book._tasks) == 0)
        self.check()
        assert (self.book.count, self.book.quarantined) == (0, 0)
        wanted = {n: 1 for n, t in self.all.items() if t.state == "gone"}
        assert dict(self.freed) == wanted
        assert all(t.state in ("gone", "used") for t in self.all.values())
        assert not self.book._writers and not self.book._doubtful


@pytest.mark.parametrize("seed", range(30))
async def test_random_walk(seed, monkeypatch):
    monkeypatch.setattr(tickets, "LOOK_S", 0.001)
    walk = Walk(seed)
    for _ in range(250):
        await walk.step()
    await walk.finish()
    # It went everywhere.
    assert all(walk.done[move] for move in ("open", "begin", "end", "stop", "die", "release", "expire", "use"))
    await walk.book.close()
