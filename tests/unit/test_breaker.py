"""The circuit breaker by itself."""

from services.router.breaker import FAILURES, PAUSE_S, Breaker


def test_it_opens_after_failures_in_a_row_and_longer_each_time():
    breaker = Breaker()
    for _ in range(FAILURES - 1):
        breaker.bad(0.0)
    assert not breaker.open(0.0)
    breaker.good()
    for _ in range(FAILURES):
        breaker.bad(1.0)
    now, pause = 1.0, PAUSE_S[0]
    for _ in range(8):
        assert breaker.open(now) and breaker.open(now + pause - 0.01) and not breaker.open(now + pause)
        # What was under way when it opened does not make it longer.
        breaker.bad(now + pause / 2)
        assert not breaker.open(now + pause)
        now, pause = now + pause, min(2 * pause, PAUSE_S[1])
        breaker.bad(now)
    assert pause == PAUSE_S[1]
    breaker.good()
    assert not breaker.open(now)
    breaker.bad(now)
    assert not breaker.open(now)
