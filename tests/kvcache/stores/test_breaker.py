"""The breaker alone: what counts as "in a row", and how long it waits."""

from baton.kvcache.stores.breaker import Breaker


def make() -> Breaker:
    return Breaker(max_failures=3, first_wait_s=1.0, max_wait_s=4.0)


def test_only_failures_in_a_row_take_it_down() -> None:
    breaker = make()
    assert not breaker.failed(0.0, "read") and not breaker.failed(0.0, "read")
    assert not breaker.succeeded("read")
    assert not breaker.failed(0.0, "read") and not breaker.failed(0.0, "read")
    assert breaker.failed(0.0, "read") and breaker.is_down


def test_one_hanging_call_is_enough_and_is_told_once() -> None:
    breaker = make()
    assert breaker.open(5.0, "read") and not breaker.open(5.0, "read")
    assert breaker.is_down


def test_each_probe_that_fails_doubles_the_wait_up_to_the_limit() -> None:
    breaker, now, waits = make(), 0.0, []
    breaker.open(now, "read")
    for _ in range(4):
        waits.append(breaker.retry_at - now)
        now = breaker.retry_at
        assert not breaker.failed(now, "read")
    assert waits == [1.0, 2.0, 4.0, 4.0]


def test_after_a_probe_the_first_real_call_decides() -> None:
    breaker = make()
    breaker.open(0.0, "read")
    breaker.probed()
    assert not breaker.is_down and breaker.failed(1.0, "read") and breaker.retry_at == 3.0
    breaker.probed()
    assert breaker.succeeded("read") and breaker.state == "up"
    breaker.open(10.0, "read")
    assert breaker.retry_at == 11.0


def test_that_queries_pass_says_nothing_of_reads() -> None:
    breaker = make()
    for _ in range(2):
        assert not breaker.failed(0.0, "read") and not breaker.succeeded("query")
    assert breaker.failed(0.0, "read")
    breaker.probed()
    assert not breaker.succeeded("query") and breaker.state == "trial"
    assert breaker.failed(1.0, "read") and breaker.retry_at == 3.0
    breaker.probed()
    assert breaker.succeeded("read") and breaker.state == "up"
