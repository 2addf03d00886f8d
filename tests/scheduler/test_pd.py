"""Handing KV over, as the scheduler sees it: actions out, events in, who owns which page until when."""

from typing import Any

import msgspec
import pytest
from tests.fakes.paged_runner import oracle
from tests.scheduler.machine import Pair, Worker, submit

from baton.engine.scheduler.pd import AbortTransfer, Expect, Receive, SendPages
from baton.protocol.errors import ErrorInfo
from baton.protocol.rank import Bootstrap, Finish, Submit
from baton.transfer.base import Bootstrapped, Failed, FirstToken, Received, Sent

PROMPT = list(range(1, 11))
"""Ten tokens: two pages of four and a half one."""
BROKEN = ErrorInfo("TransferError", 500, "connection lost", "transfer", retryable=True)


def prefill_worker(**config: Any) -> Worker:
    return Worker(mode="prefill", **config)


def decode_worker(**config: Any) -> Worker:
    return Worker(mode="decode", **{"num_reserved_decode_tokens": 8, **config})


def received(room: int, token_id: int, **fields: Any) -> Received:
    return Received(room, FirstToken(token_id, **{"cached_tokens": 0, **fields}), 4000, 0.002, 0.1)


def put_kv(worker: Worker, request: Submit, action: Receive) -> None:
    """What the transfer does: the KV of the prompt is in the pages named."""
    source = Worker(num_pages=64, page_size=worker.cache.page_size)
    source.add(submit("source", request.input_ids, 2))
    source.step()
    pages = source.scheduler._life.live["source"].pages
    for i, page in enumerate(action.page_ids):
        worker.runner.write_page(page, source.runner.read_page(pages[action.first_page_idx + i]))


def start_receiving(worker: Worker, request: Submit) -> Receive:
    worker.add(request)
    worker.step()
    (action,) = worker.scheduler.drain_actions()
    assert isinstance(action, Receive)
    put_kv(worker, request, action)
    return action


# -- prefill side ------------------------------------------------------------------------------------------------------


def test_prefill_waits_for_the_decode_side_then_sends_whole_pages_as_chunks_finish() -> None:
    worker = prefill_worker(chunked_prefill_size=4, bootstrap_timeout_s=7.0)
    worker.add(submit("a", PROMPT, 50, room=1, timeout_s=60.0))
    assert worker.scheduler.drain_actions() == [Expect(1, 7.0)]
    assert not worker.step()
    assert worker.scheduler.state().num_prefill_prealloc == 1
    worker.scheduler.on_transfer_event(Bootstrapped(1, 0), worker.now)
    sends = []
    while worker.step():
        sends += worker.scheduler.drain_actions()
    assert all(isinstance(send, SendPages) for send in sends)
    token = oracle(PROMPT, 1)[0]
    assert [(s.first_page_idx, len(s.page_ids), s.first_token) for s in sends] == [
        (0, 1, None),
        (1, 1, None),
        (2, 1, FirstToken(token, 0)),
    ]
    assert worker.ledger.finishes == {}
    assert worker.scheduler.state().num_prefill_inflight == 1
    worker.scheduler.on_transfer_event(Sent(1, 3_000_000, 0.5), worker.now)
    worker.step()
    assert worker.ledger.tokens["a"] == [token]
    assert worker.ledger.finishes["a"] == Finish("length")
    assert worker.scheduler.state().kv_transfer_speed_gb_s == pytest.approx(0.006)
    assert worker.cache.num_evictable == 2, "the pages stay as prefix cache"


def test_pages_that_the_decode_side_has_are_not_sent() -> None:
    for first_page_idx, expected in ((1, [(1, 2)]), (3, [(3, 0)])):
        worker = prefill_worker()
        worker.add(submit("a", PROMPT, 5, room=1))
        worker.scheduler.drain_actions()
        worker.scheduler.on_transfer_event(Bootstrapped(1, first_page_idx), worker.now)
        worker.run()
        sends = worker.scheduler.drain_actions()
        assert [(s.first_page_idx, len(s.page_ids)) for s in sends if isinstance(s, SendPages)] == expected


def test_a_cached_prefix_is_sent_with_the_first_chunk() -> None:
    worker = prefill_worker()
    for room in (1, 2):
        worker.add(submit(f"r{room}", PROMPT, 5, room=room))
        worker.scheduler.on_transfer_event(Bootstrapped(room, 0), worker.now)
        worker.run()
        worker.scheduler.on_transfer_event(Sent(room, 1, 0.1), worker.now)
    last = worker.scheduler.drain_actions()[-1]
    assert isinstance(last, SendPages) and len(last.page_ids) == 3
    assert last.first_token is not None and last.first_token.cached_tokens == 8


def test_pages_stay_until_the_transfer_has_ended_even_if_the_client_is_gone() -> None:
    worker = prefill_worker(num_pages=4)
    worker.add(submit("a", PROMPT, 5, room=1))
    worker.scheduler.on_transfer_event(Bootstrapped(1, 0), worker.now)
    worker.run()
    worker.scheduler.drain_actions()
    worker.scheduler.abort("a", "gone", worker.now)
    assert worker.scheduler.drain_actions() == [AbortTransfer(1, "gone", "prefill")]
    worker.step()
    assert worker.ledger.finishes["a"].type == "abort"
    assert worker.cache.num_available == 1
    assert not worker.scheduler.is_idle and not worker.scheduler.flush_cache()
    worker.scheduler.on_transfer_event(Failed(1, BROKEN), worker.now)
    worker.step()
    assert worker.cache.num_available == 4 and worker.scheduler.is_idle


def test_a_prompt_waits_for_pages_that_are_still_being_sent() -> None:
    worker = prefill_worker(num_pages=4)
    for room in (1, 2):
        worker.add(submit(f"r{room}", range(room * 20, room * 20 + 10), 5, room=room))
        worker.scheduler.on_transfer_event(Bootstrapped(room, 0), worker.now)
    worker.run()
    assert worker.scheduler.state().num_waiting == 1
    worker.scheduler.on_transfer_event(Sent(1, 1, 0.1), worker.now)
    worker.run()
    worker.scheduler.on_transfer_event(Sent(2, 1, 0.1), worker.now)
    worker.step()
    assert worker.ledger.finishes == {"r1": Finish("length"), "r2": Finish("length")}


@pytest.mark.parametrize("steps", [-1, 0, 1, 9])
def test_a_failed_room_ends_the_prefill_request_wherever_it_is(steps: int) -> None:
    worker = prefill_worker(chunked_prefill_size=4)
    worker.add(submit("a", PROMPT, 5, room=1))
    if steps >= 0:
        worker.scheduler.on_transfer_event(Bootstrapped(1, 0), worker.now)
    for _ in range(steps):
        worker.step()
    worker.scheduler.on_transfer_event(Failed(1, BROKEN), worker.now)
    worker.run()
    assert worker.ledger.finishes["a"].error == msgspec.structs.replace(BROKEN, request_id="a")
    state = worker.scheduler.state()
    assert (state.num_bootstrap_failed_total, state.num_transfer_failed_total) == ((1, 0) if steps < 0 else (0, 1))
    assert worker.scheduler.is_idle


def test_a_room_in_use_is_refused() -> None:
    worker = prefill_worker()
    worker.add(submit("a", PROMPT, 5, room=1))
    worker.add(submit("b", PROMPT, 5, room=1))
    error = worker.ledger.finishes["b"].error
    assert error is not None and (error.code, error.param) == (400, "bootstrap_room")


def test_a_request_that_the_decode_side_never_asks_for_times_out_in_the_transfer_stage() -> None:
    worker = prefill_worker()
    worker.add(submit("a", PROMPT, 5, room=1, timeout_s=2.0))
    assert worker.scheduler.drain_actions() == [Expect(1, 2.0)]
    worker.ledger.take(worker.scheduler.drain_outputs(2.0))
    error = worker.ledger.finishes["a"].error
    assert error is not None and (error.code, error.stage) == (504, "transfer")
    assert [type(action) for action in worker.scheduler.drain_actions()] == [AbortTransfer]


# -- decode side -------------------------------------------------------------------------------------------------------


def test_decode_allocates_receives_and_goes_on_with_the_first_token() -> None:
    worker = decode_worker(default_bootstrap_port=9100)
    request = submit("a", PROMPT, 5, bootstrap=Bootstrap("10.0.0.7", None, 3), timeout_s=60.0)
    action = start_receiving(worker, request)
    assert (action.room, action.bootstrap_host, action.bootstrap_port) == (3, "10.0.0.7", 9100)
    assert (action.first_page_idx, len(action.page_ids)) == (0, 3)
    assert action.timeout_s == pytest.approx(60.0, abs=0.1)
    assert worker.scheduler.state().num_decode_transfer == 1
    expected = oracle(PROMPT, 5)
    worker.scheduler.on_transfer_event(received(3, expected[0], cached_tokens=6), worker.now)
    worker.run()
    assert worker.ledger.tokens["a"] == expected
    assert worker.ledger.last["a"].cached_tokens == 6
    assert worker.scheduler.state().kv_transfer_bootstrap_ms == 100.0


def test_the_next_turn_receives_only_what_decode_does_not_have() -> None:
    worker = decode_worker()
    first = submit("a", PROMPT, 7, room=1)
    start_receiving(worker, first)
    worker.scheduler.on_transfer_event(received(1, oracle(PROMPT, 1)[0]), worker.now)
    worker.run()
    turn = PROMPT + worker.ledger.tokens["a"] + [50, 51, 52]
    action = start_receiving(worker, submit("b", turn, 5, room=2))
    assert action.first_page_idx == 4  # 17 tokens, 16 of them computed
    assert len(action.page_ids) == 1


def test_a_prefix_that_decode_has_whole_still_asks_for_the_first_token() -> None:
    worker = decode_worker()
    prompt = PROMPT[:8]
    for room in (1, 2):
        request = submit(f"r{room}", prompt, 3, room=room)
        action = start_receiving(worker, request)
        worker.scheduler.on_transfer_event(received(room, oracle(prompt, 1)[0]), worker.now)
        worker.run()
        assert worker.ledger.tokens[request.rid] == oracle(prompt, 3)
        assert worker.scheduler.state().cache_hit_rate == (0 if room == 1 else 1), "what was not transferred"
    assert (action.first_page_idx, action.page_ids) == (2, [])


@pytest.mark.parametrize("matched_stop", [None, "END"])
def test_pages_being_received_are_not_given_to_others_before_the_transfer_has_ended(matched_stop: str | None) -> None:
    worker = decode_worker(num_pages=4)
    start_receiving(worker, submit("a", PROMPT, 5, room=1))
    worker.scheduler.abort("a", "gone", worker.now, matched_stop)
    assert [type(action) for action in worker.scheduler.drain_actions()] == [AbortTransfer]
    worker.add(submit("b", range(30, 40), 5, room=2))
    worker.step()
    assert worker.ledger.finishes.keys() == {"a"}
    assert worker.scheduler.drain_actions() == [] and worker.cache.num_free == 1
    worker.scheduler.on_transfer_event(Failed(1, BROKEN), worker.now)
    worker.step()
    (action,) = worker.scheduler.drain_actions()
    assert isinstance(action, Receive) and action.room == 2


def test_kv_that_arrives_after_the_client_left_is_kept_as_prefix() -> None:
    worker = decode_worker()
    start_receiving(worker, submit("a", PROMPT, 5, room=1))
    worker.scheduler.abort("a", "gone", worker.now)
    worker.scheduler.on_transfer_event(received(1, 5), worker.now)
    worker.run()
    assert worker.ledger.finishes["a"].type == "abort" and worker.ledger.tokens["a"] == []
    assert worker.scheduler.is_idle
    assert worker.cache.match_len(PROMPT, None, len(PROMPT)) == 8


def test_a_failed_transfer_ends_the_decode_request_and_its_pages_are_not_trusted() -> None:
    worker = decode_worker()
    start_receiving(worker, submit("a", PROMPT, 5, room=1))
    worker.scheduler.on_transfer_event(Failed(1, BROKEN), worker.now)
    worker.step()
    assert worker.ledger.finishes["a"].error == msgspec.structs.replace(BROKEN, request_id="a")
    assert worker.cache.num_free == worker.cache.num_pages


def test_a_first_token_that_stops_or_is_the_last_ends_at_once() -> None:
    first = oracle(PROMPT, 1)[0]
    worker = decode_worker(eos_token_ids=(first,))
    for room, (limit, ignore_eos) in enumerate([(5, False), (1, True), (0, True)]):
        start_receiving(worker, submit(f"r{room}", PROMPT, limit, room=room, ignore_eos=ignore_eos))
        worker.scheduler.on_transfer_event(received(room, first), worker.now)
        worker.ledger.take(worker.scheduler.drain_outputs(worker.now))
    assert worker.ledger.finishes == {
        "r0": Finish("stop", matched=first),
        "r1": Finish("length"),
        "r2": Finish("length"),
    }
    assert worker.ledger.tokens == {"r0": [first], "r1": [first], "r2": []}


def test_unreadable_metadata_ends_one_request_not_the_worker() -> None:
    worker = decode_worker()
    start_receiving(worker, submit("a", PROMPT, 5, room=1))
    worker.scheduler.on_transfer_event(received(1, 5, logprobs=b"\xc1"), worker.now)
    worker.step()
    error = worker.ledger.finishes["a"].error
    assert error is not None and (error.code, error.stage) == (500, "transfer")
    assert worker.scheduler.is_idle


def test_decode_lets_requests_in_first_come_first_served_while_their_output_fits() -> None:
    worker = decode_worker(num_pages=8, num_reserved_decode_tokens=8)
    for room, size in enumerate([10, 10, 2]):
        worker.add(submit(f"r{room}", range(room * 20, room * 20 + size), 8, room=room))
    worker.step()
    assert [type(action) for action in worker.scheduler.drain_actions()] == [Receive]
    assert worker.scheduler.state().num_decode_prealloc == 2


def test_events_of_unknown_rooms_are_ignored() -> None:
    for worker in (prefill_worker(), decode_worker()):
        for event in (Bootstrapped(9, 0), Sent(9, 1, 0.1), received(9, 1), Failed(9, BROKEN)):
            worker.scheduler.on_transfer_event(event, 0.0)
        worker.step()
        assert worker.ledger.last == {}


def test_the_fake_bootstrap_host_is_served_without_a_peer() -> None:
    for worker in (prefill_worker(), decode_worker()):
        worker.add(submit("warm-up", PROMPT, 3, bootstrap=Bootstrap("2.2.2.2", None, 0)))
        worker.run()
        assert worker.scheduler.drain_actions() == []
        num_tokens = 1 if worker.scheduler.config.mode == "prefill" else 3
        assert worker.ledger.tokens["warm-up"] == oracle(PROMPT, num_tokens)
        assert worker.ledger.finishes["warm-up"] == Finish("length")


def test_the_last_running_request_makes_way_for_one_that_is_being_received_and_goes_first_afterwards() -> None:
    worker = decode_worker(num_pages=6, page_size=2, num_reserved_decode_tokens=0, context_len=12)
    start_receiving(worker, submit("runs", PROMPT[:2], 8, room=1))
    worker.scheduler.on_transfer_event(received(1, oracle(PROMPT[:2], 1)[0]), worker.now)
    worker.step()
    worker.add(submit("comes", range(30, 36), 2, room=2))
    worker.run()
    (receiving,) = worker.scheduler.drain_actions()
    assert isinstance(receiving, Receive)
    assert worker.state_of("runs") == "waiting"
    worker.add(submit("later", [40], 2, room=3))
    worker.run()
    assert worker.scheduler.drain_actions() == [], "nobody is let in before the one that was sent back"
    put_kv(worker, submit("comes", range(30, 36)), receiving)
    worker.scheduler.on_transfer_event(received(2, oracle(list(range(30, 36)), 1)[0]), worker.now)
    worker.run()
    assert worker.ledger.tokens["runs"] == oracle(PROMPT[:2], 8)
    assert worker.ledger.finishes == {"runs": Finish("length"), "comes": Finish("length")}


# -- both --------------------------------------------------------------------------------------------------------------


def test_a_pair_gives_the_tokens_and_log_probabilities_of_one_worker() -> None:
    requests = [
        submit(f"r{i}", [*range(i % 3 * 7), 1, 2, i], 9, room=i, return_logprob=True, logprob_start_len=0)
        for i in range(12)
    ]
    alone = Worker()
    pair = Pair(prefill_worker(chunked_prefill_size=8), decode_worker())
    for request in requests:
        alone.add(msgspec.structs.replace(request, bootstrap=None))
        pair.prefill.add(request)
        pair.decode.add(request)
    alone.run()
    pair.run()
    assert pair.decode.ledger.tokens == alone.ledger.tokens
    assert pair.decode.ledger.logprobs == alone.ledger.logprobs
    assert pair.decode.ledger.input_logprobs == alone.ledger.input_logprobs
    assert pair.prefill.ledger.tokens == {rid: tokens[:1] for rid, tokens in alone.ledger.tokens.items()}


def test_decode_that_runs_out_of_pages_computes_the_prompt_again_by_itself() -> None:
    decode = decode_worker(num_pages=14, page_size=2, num_reserved_decode_tokens=0)
    pair = Pair(prefill_worker(page_size=2), decode)
    requests = [submit(f"r{i}", range(i * 10, i * 10 + 4), 12, room=i) for i in range(3)]
    for request in requests:
        pair.prefill.add(request)
        pair.decode.add(request)
    pair.run()
    assert pair.decode.scheduler.state().num_retracted_total > 0
    for request in requests:
        assert pair.decode.ledger.tokens[request.rid] == oracle(request.input_ids, 12)
