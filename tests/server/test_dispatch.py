"""Which engine of a worker gets a prompt, by method: plain calls, no engines."""

from itertools import pairwise

import pytest

from baton.engine.server.dispatch import CacheAware, Dispatcher, EngineLoad, make_balancer
from baton.protocol.errors import RequestError
from baton.protocol.rank import FAKE_BOOTSTRAP_HOST, Bootstrap, Submit
from baton.protocol.sampling import SamplingParams

PAGE = 4


def submit(*input_ids: int, extra_key: str | None = None, room: int | None = None, host: str = "10.0.0.1") -> Submit:
    bootstrap = None if room is None else Bootstrap(host, None, room)
    return Submit(
        rid="a", input_ids=list(input_ids), sampling=SamplingParams(), extra_key=extra_key, bootstrap=bootstrap
    )


def idle(count: int) -> list[EngineLoad]:
    return [EngineLoad() for _ in range(count)]


def choose(method: str, loads: list[EngineLoad], prompts: list[Submit]) -> list[int]:
    return Dispatcher(make_balancer(method, PAGE, 100)).dispatch(prompts, loads, None)


@pytest.mark.parametrize("method", ["auto", "round_robin"])
def test_engines_take_turns(method: str) -> None:
    dispatcher = Dispatcher(make_balancer(method, PAGE, 100))
    loads = [EngineLoad(9, 900), EngineLoad(), EngineLoad()]
    assert [dispatcher.dispatch([submit(1)], loads, None) for _ in range(4)] == [[0], [1], [2], [0]]


@pytest.mark.parametrize("method", ["total_requests", "shortest_queue"])
def test_the_fewest_requests(method: str) -> None:
    loads = [EngineLoad(3, 1), EngineLoad(1, 500), EngineLoad(2, 2)]
    # What was given out counts at once; engines that have the same take turns.
    assert choose(method, loads, [submit(index) for index in range(6)]) == [1, 2, 1, 2, 0, 1]
    assert [one.num_requests for one in loads] == [4, 4, 4]


@pytest.mark.parametrize("method", ["total_tokens", "minimum_tokens"])
def test_the_fewest_tokens(method: str) -> None:
    loads = [EngineLoad(1, 10), EngineLoad(9, 4)]
    assert choose(method, loads, [submit(*range(20)), submit(*range(9)), submit(1)]) == [1, 0, 0]
    assert [one.num_tokens for one in loads] == [20, 24]


def test_idle_engines_take_turns_whatever_the_method() -> None:
    for method in ("total_requests", "total_tokens", "cache_aware"):
        dispatcher = Dispatcher(make_balancer(method, PAGE, 100))
        chosen = [dispatcher.dispatch([submit(*[index] * 8)], idle(3), None)[0] for index in range(6)]
        assert all(one != other for one, other in pairwise(chosen)), method


def test_choices_of_one_prompt_stay_together() -> None:
    one, other = submit(1, 2), submit(3, 4)
    assert choose("round_robin", idle(2), [one, one, one, other, other]) == [0, 0, 0, 1, 1]


class TestCacheAware:
    def choose(self, policy: CacheAware, prompt: Submit, loads: list[EngineLoad] | None = None) -> int:
        return policy.choose(prompt, loads or idle(3))

    def test_the_next_turn_goes_where_the_last_one_went(self) -> None:
        policy = CacheAware(PAGE, 100)
        first = [self.choose(policy, submit(*[user] * 9)) for user in range(3)]
        assert sorted(first) == [0, 1, 2]
        for user in (2, 0, 1, 1):
            assert self.choose(policy, submit(*[user] * 9, 7, 7, 7)) == first[user]

    def test_the_longest_beginning_wins_over_the_load(self) -> None:
        policy = CacheAware(PAGE, 100)
        short, long = submit(*range(4), 9, 9, 9, 9), submit(*range(12))
        assert self.choose(policy, short, [EngineLoad(0), EngineLoad(1)]) == 0
        assert self.choose(policy, long, [EngineLoad(9), EngineLoad(0)]) == 1
        assert self.choose(policy, submit(*range(16)), [EngineLoad(0), EngineLoad(4)]) == 1
        assert self.choose(policy, submit(*range(4), 9, 9, 9, 9, 1), [EngineLoad(4), EngineLoad(0)]) == 0

    def test_a_much_busier_engine_is_left_alone(self) -> None:
        policy = CacheAware(PAGE, 100)
        assert self.choose(policy, submit(*range(8)), [EngineLoad(0), EngineLoad(1)]) == 0
        assert self.choose(policy, submit(*range(8)), [EngineLoad(20), EngineLoad(15)]) == 0, "more, but not by much"
        assert self.choose(policy, submit(*range(8)), [EngineLoad(5), EngineLoad(0)]) == 1

    def test_less_than_a_page_is_no_beginning(self) -> None:
        policy = CacheAware(PAGE, 100)
        assert self.choose(policy, submit(1, 2, 3), [EngineLoad(0), EngineLoad(1)]) == 0
        assert self.choose(policy, submit(1, 2, 3), [EngineLoad(1), EngineLoad(0)]) == 1

    def test_another_salt_is_another_prompt(self) -> None:
        policy = CacheAware(PAGE, 100)
        assert self.choose(policy, submit(*range(8), extra_key="a"), [EngineLoad(0), EngineLoad(1)]) == 0
        assert self.choose(policy, submit(*range(8), extra_key="b"), [EngineLoad(1), EngineLoad(0)]) == 1

    def test_what_was_sent_long_ago_is_forgotten_from_its_end(self) -> None:
        policy = CacheAware(PAGE, 3)
        assert self.choose(policy, submit(*range(12)), [EngineLoad(0), EngineLoad(1)]) == 0
        assert self.choose(policy, submit(50, 51, 52, 53), [EngineLoad(0), EngineLoad(1)]) == 0
        # Two of the three pages are left: as many as the other engine gets now.
        assert self.choose(policy, submit(*range(8), 99), [EngineLoad(4), EngineLoad(0)]) == 0
        for start in (60, 70, 80):
            assert self.choose(policy, submit(*range(start, start + 4)), [EngineLoad(0), EngineLoad(1)]) == 0
        assert self.choose(policy, submit(*range(8)), [EngineLoad(1), EngineLoad(0)]) == 1


class TestRooms:
    prefill = Dispatcher(make_balancer("auto", PAGE, 100), mode="prefill")

    def test_a_prefill_follows_the_room(self) -> None:
        rooms = [submit(1, room=room) for room in (7, 8, 6, 2**62 + 1)]
        assert self.prefill.dispatch(rooms, idle(3), None) == [1, 2, 0, (2**62 + 1) % 3]

    def test_choices_of_one_prompt_too(self) -> None:
        ids = [1, 2]
        choices = [Submit(rid=str(room), input_ids=ids, sampling=SamplingParams(), bootstrap=Bootstrap("h", 1, room)) for room in (4, 5)]  # fmt: skip
        assert self.prefill.dispatch(choices, idle(2), None) == [0, 1]

    def test_what_nobody_meets_has_no_room(self) -> None:
        fake = [submit(index, room=4, host=FAKE_BOOTSTRAP_HOST) for index in range(2)]
        assert sorted(self.prefill.dispatch(fake, idle(2), None)) == [0, 1]
        assert self.prefill.dispatch(fake, idle(2), 1) == [1, 1]

    def test_a_worker_of_both_parts_follows_it_where_it_prefills(self) -> None:
        dispatcher = Dispatcher(make_balancer("total_requests", PAGE, 100), mode="both")
        sides = [Bootstrap("h", 1, 4, "prefill"), Bootstrap("h", 1, 6, "decode"), None]
        requests = [Submit(rid="a", input_ids=[1], sampling=SamplingParams(), bootstrap=side) for side in sides]
        assert dispatcher.dispatch(requests, [EngineLoad(9), EngineLoad(0)], None) == [0, 1, 1]

    def test_numbers_that_begin_elsewhere(self) -> None:
        """Engines 3 and 4 of a deployment register as groups 1 and 0 of this worker's two."""
        dispatcher = Dispatcher(make_balancer("auto", PAGE, 100), mode="prefill", first_dp_rank=3)
        assert dispatcher.dispatch([submit(1, room=0), submit(2, room=1)], idle(2), None) == [1, 0]

    def test_asking_for_another_engine_is_the_decodes_business(self) -> None:
        """Routers send the same body to both sides, which may have different numbers of engines."""
        assert self.prefill.dispatch([submit(1, room=5)], idle(2), 0) == [1]
        assert self.prefill.dispatch([submit(1, room=5)], idle(2), 7) == [1]
        decode = Dispatcher(make_balancer("follow_bootstrap_room", PAGE, 100), follows_room=True, mode="decode")
        assert decode.dispatch([submit(1, room=5)], idle(2), None) == [1]
        assert decode.dispatch([submit(1, room=5)], idle(2), 0) == [0]


@pytest.mark.parametrize("dp_rank", [-1, 2])
def test_an_engine_that_there_is_not_is_named(dp_rank: int) -> None:
    with pytest.raises(RequestError, match=rf"data_parallel_rank must be in \[0, 2\), got {dp_rank}"):
        Dispatcher(make_balancer("auto", PAGE, 100)).dispatch([submit(1)], idle(2), dp_rank)
