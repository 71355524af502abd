"""Credit: what was sent counts as load until a report can have seen it, and never twice or for ever."""

from __future__ import annotations

import random

from services.router.credit import SEEN_AFTER_S, Credits


def sums(credits: Credits) -> tuple[int, int]:
    return credits.requests, credits.tokens


def test_charge_and_settle():
    credits = Credits()
    a, b = credits.charge(1, 100, 0.0), credits.charge(1, 7, 0.0)
    assert a != b and sums(credits) == (2, 107)
    credits.settle(a)
    assert sums(credits) == (1, 7)
    credits.settle(a)
    credits.settle(12345)
    assert sums(credits) == (1, 7)


def test_a_report_takes_over_what_it_must_have_seen():
    credits = Credits()
    old, new = credits.charge(1, 100, 0.0), credits.charge(1, 7, SEEN_AFTER_S)
    credits.reported(SEEN_AFTER_S / 2)
    assert sums(credits) == (2, 107)
    credits.reported(SEEN_AFTER_S)
    assert sums(credits) == (1, 7)
    # The end of work that a report has counted takes nothing away a second time.
    credits.settle(old)
    assert sums(credits) == (1, 7)
    credits.reported(2 * SEEN_AFTER_S)
    credits.settle(new)
    assert sums(credits) == (0, 0) and not credits._open


def test_what_was_assigned_stays_until_it_begins_or_ends():
    credits = Credits()
    a, b = credits.charge(1, 100, 0.0), credits.charge(1, 7, 0.0)
    credits.reported(2 * SEEN_AFTER_S)
    assert sums(credits) == (0, 0) and credits.assigned == 107
    credits.begun(a)
    credits.begun(a)
    assert credits.assigned == 7
    credits.settle(b)
    credits.settle(a)
    assert credits.assigned == 0 and not credits._assigned


def test_sums_are_those_of_what_is_open_whatever_happens():
    draw, credits, now, numbers = random.Random(3), Credits(), 0.0, [0]
    for _ in range(5000):
        now += draw.random() * SEEN_AFTER_S / 3
        match draw.randrange(4):
            case 0 | 1:
                numbers.append(credits.charge(1, draw.randrange(1000), now))
            case 2:
                credits.settle(draw.choice(numbers))
            case 3:
                credits.reported(now)
                assert all(now - entry.sent < SEEN_AFTER_S for entry in credits._open.values())
        entries = credits._open.values()
        assert sums(credits) == (sum(e.requests for e in entries), sum(e.tokens for e in entries))
