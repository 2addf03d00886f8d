"""The circuit breaker's states and the decision after a failed try: pure, with the clock as a number."""

from random import Random

import pytest

from baton.router.breaker import CircuitBreaker
from baton.router.config import BreakerConfig, RetryConfig
from baton.router.retry import Answer, Failure, RetryState, blames, next_try_s

CONFIG = BreakerConfig(failure_threshold=3, success_threshold=2, open_s=60, window_s=120)
RETRY = RetryConfig(max_retries=3, initial_backoff_s=0.1, max_backoff_s=1.0, multiplier=2.0, jitter=0.0)
RNG = Random(1)


def status(code: int, role: str = "decode", **info: object) -> Failure:
    return Failure("status", role, "http://w", "", Answer(code, [], b""), dict(info))


def test_breaker_opens_after_failures_in_a_row_and_closes_after_successes():
    breaker = CircuitBreaker(CONFIG)
    for now_s in (0.0, 1.0, 2.0):
        assert breaker.allows(now_s)
        breaker.on_failure(now_s)
    assert breaker.state == "open"
    assert not breaker.allows(61.9)
    assert breaker.allows(62.0)
    assert breaker.state == "half_open"
    breaker.on_success()
    breaker.on_success()
    assert breaker.state == "closed"
    assert breaker.transitions == 3


def test_breaker_opens_again_on_a_failure_while_half_open():
    breaker = CircuitBreaker(CONFIG)
    for now_s in (0.0, 1.0, 2.0):
        breaker.on_failure(now_s)
    assert breaker.allows(70.0)
    breaker.on_failure(70.0)
    assert not breaker.allows(71.0)


def test_a_success_between_failures_keeps_it_closed():
    breaker = CircuitBreaker(CONFIG)
    for now_s in range(10):
        breaker.on_failure(float(now_s))
        if now_s % 2:
            breaker.on_success()
    assert breaker.state == "closed"


def test_failures_older_than_the_window_do_not_count():
    breaker = CircuitBreaker(CONFIG)
    for now_s in (0.0, 1.0, 130.0, 131.0):
        breaker.on_failure(now_s)
    assert breaker.state == "closed"
    breaker.on_failure(132.0)
    assert breaker.state == "open"


def test_a_disabled_breaker_never_opens():
    breaker = CircuitBreaker(BreakerConfig(enabled=False, failure_threshold=1))
    breaker.on_failure(0.0)
    assert breaker.allows(0.0)


@pytest.mark.parametrize(
    ("failure", "blamed"),
    [
        (Failure("connect", "decode", "u", ""), True),
        (Failure("lost", "prefill", "u", ""), True),
        (Failure("stale", "decode", "u", ""), False),
        (status(400), False),
        (status(429), False),
        (status(503), False),
        (status(504), False),
        (status(500), True),
        (status(500, stage="transfer"), False),
        (status(500, stage="prefill"), False),
        (status(500, "prefill", stage="prefill"), True),
        (Failure("event", "decode", "u", "", info={"code": 500}), True),
        (Failure("event", "decode", "u", "", info={"code": 499}), False),
    ],
)
def test_what_counts_against_a_worker(failure, blamed):
    assert blames(failure) is blamed


@pytest.mark.parametrize(
    ("failure", "retried"),
    [
        (status(400), False),
        (status(404), False),
        (status(422), False),
        (status(500), True),
        (status(500, retryable=False), False),
        (status(503), True),
        (status(400, retryable=True), True),
        (Failure("event", "decode", "u", "", info={"code": 400}), False),
        (Failure("event", "decode", "u", "", info={"retryable": True}), True),
        (Failure("lost", "decode", "u", ""), True),
    ],
)
def test_what_is_tried_again(failure, retried):
    assert (next_try_s(failure, RetryState(), RETRY, RNG) is not None) is retried


def test_backoff_grows_and_ends():
    state = RetryState()
    delays = [next_try_s(status(500), state, RETRY, RNG) for _ in range(4)]
    assert delays == [0.1, 0.2, 0.4, None]


def test_the_first_retry_after_a_lost_connection_is_at_once():
    state = RetryState()
    lost = Failure("lost", "decode", "u", "")
    assert [next_try_s(lost, state, RETRY, RNG) for _ in range(2)] == [0.0, 0.2]


def test_after_a_loss_a_full_queue_is_waited_for_without_counting():
    state = RetryState()
    state.note(Failure("lost", "decode", "u", ""))
    delays = [next_try_s(status(503), state, RETRY, RNG) for _ in range(50)]
    assert None not in delays
    assert max(delay for delay in delays if delay is not None) <= 1.0
    assert state.retries == 0


def test_without_a_loss_a_full_queue_is_passed_on_after_the_retries():
    state = RetryState()
    assert [next_try_s(status(503), state, RETRY, RNG) for _ in range(4)][-1] is None


def test_stale_connections_cost_no_retry_but_are_bounded():
    state, off = RetryState(), RetryConfig(max_retries=0)
    stale = Failure("stale", "decode", "u", "")
    assert [next_try_s(stale, state, off, RNG) for _ in range(4)] == [0.0, 0.0, 0.0, None]


@pytest.mark.parametrize(
    "failure",
    [
        status(503, type="WorkerLostError", stage="prefill", retryable=True),
        status(500, type="TransferError", stage="transfer", retryable=True),
        status(504, type="TransferTimeout", stage="transfer", retryable=True),
    ],
    ids=["rank gone", "peer gone", "peer silent"],
)
def test_a_request_whose_worker_said_that_it_or_its_peer_is_gone_waits_for_another(failure: Failure):
    state = RetryState()
    state.note(failure)
    assert state.lost_worker, "from now on only the deadline ends the search"
    assert next_try_s(failure, state, RETRY, RNG) is not None
    for _ in range(20):
        refused = Failure("connect", "decode", "u", "")
        state.note(refused)
        assert next_try_s(refused, state, RETRY, RNG) is not None


def test_a_full_queue_or_a_bad_request_is_not_a_lost_worker():
    for failure in (status(503, type="ServiceUnavailableError", retryable=True), status(400, stage="transfer")):
        state = RetryState()
        state.note(failure)
        assert not state.lost_worker


def test_a_rank_that_ended_is_not_a_full_queue():
    state = RetryState()
    gone = status(503, type="WorkerLostError", retryable=True)
    assert not gone.is_busy
    state.note(gone)
    assert next_try_s(gone, state, RETRY, RNG) == 0.0


def test_workers_that_are_gone_cost_no_retries():
    """A machine with most of the workers dies: whoever is left gets the request."""
    state = RetryState()
    for index in range(20):
        refused = Failure("connect", "decode", f"http://w{index}", "")
        state.note(refused)
        assert next_try_s(refused, state, RETRY, RNG) == 0.0


def test_one_that_nobody_has_seen_healthy_is_not_tried_for_ever():
    """Without health checks nothing but the retries ends it."""
    state = RetryState()
    refused = Failure("connect", "decode", "u", "")
    delays = []
    for _ in range(5):
        state.note(refused)
        delays.append(next_try_s(refused, state, RETRY, RNG))
    assert delays == [0.0, 0.1, 0.2, 0.4, None]


def test_after_a_connection_that_closed_a_full_queue_is_waited_for():
    """It may have been a worker's end, and the others are full of what that one had."""
    state = RetryState()
    state.note(Failure("stale", "decode", "u", ""))
    assert None not in [next_try_s(status(503), state, RETRY, RNG) for _ in range(50)]


def test_a_failed_hand_over_speaks_against_both_of_the_pair():
    for role, stage, peer_is_avoided in (("prefill", "transfer", True), ("decode", "transfer", True),
                                         ("decode", "prefill", True), ("prefill", "prefill", False)):  # fmt: skip
        state = RetryState()
        failure = status(500, role, stage=stage)
        failure.peer_url = "http://peer"
        state.note(failure)
        assert ("http://peer" in state.tried) is peer_is_avoided
