"""Ranks find one another, agree, and notice when one is gone; strangers and differences are named. No model, no processes."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
from tests.fakes.batches import PagedSequences, Query

from baton.engine.args import engine_args, split_address
from baton.engine.batch import PromptLogprobsRow, SampleRow
from baton.engine.distributed import control, heartbeat
from baton.engine.distributed.control import FRAME_HEADER, GroupError, Leader, finish_phase, join
from baton.engine.distributed.group import LeaderGroup
from baton.engine.distributed.heartbeat import Heartbeat
from baton.engine.distributed.messages import Hello, Welcome, decode_step, encode_step
from baton.engine.distributed.topology import RANKS_PER_HOST, Topology, plan_topology
from baton.engine.errors import ModelError
from baton.engine.runner import logit_rows
from baton.protocol.sampling import SamplingParams

WAIT_S = 20.0
FACTS = {"--page-size": "16", "--dtype": "bfloat16"}


def ranks(size: int, node_rank: int) -> Topology:
    return Topology(size, node_rank, 1, 0, size)


@pytest.fixture
def leader() -> Iterator[Leader]:
    one = Leader(ranks(3, 0), ("127.0.0.1", 0), WAIT_S)
    yield one
    one.close()


def follow(leader: Leader, hello: Hello) -> object:
    """What a follower gets: its welcome and what all brought to a phase, or the error."""
    try:
        control, watch, welcome = join(ranks(3, hello.rank), leader.address, hello, WAIT_S)
    except GroupError as error:
        return error
    with watch:
        values = finish_phase(control, "load", f"of {hello.rank}", WAIT_S)
        control.close()
    return (welcome, values)


def lead(leader: Leader) -> object:
    try:
        pages = leader.gather_ranks(Hello(0, FACTS, 100))
    except GroupError as error:
        leader.close()
        return error
    leader.tell_all(Welcome(pages))
    values = leader.phase("load", "of 0", WAIT_S)
    return (Welcome(pages), values)


def meet(leader: Leader, *hellos: Hello) -> list[object]:
    with ThreadPoolExecutor(1 + len(hellos)) as executor:
        leading = executor.submit(lead, leader)
        following = [executor.submit(follow, leader, hello) for hello in hellos]
        return [leading.result(WAIT_S), *(one.result(WAIT_S) for one in following)]


def test_all_ranks_take_the_pages_of_the_smallest_and_go_on_together(leader: Leader) -> None:
    answers = meet(leader, Hello(2, FACTS, 70), Hello(1, FACTS, 80))
    assert answers == [(Welcome(70), ["of 0", "of 1", "of 2"])] * 3


def test_what_differs_is_named_on_both_sides(leader: Leader) -> None:
    ours, theirs = meet(leader, Hello(1, FACTS | {"--page-size": "32", "--dtype": "float32"}, 80))
    text = "--page-size: 16 on rank 0 and 32 on rank 1 (node 1); --dtype: bfloat16 on rank 0 and float32 on rank 1 (node 1)"
    assert text in str(ours) and text in str(theirs)


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.1\r\n\r\n", FRAME_HEADER.pack(3) + b"\xc1\xc1\xc1", b""])
def test_a_stranger_is_sent_away_and_the_group_still_meets(leader: Leader, junk: bytes) -> None:
    with socket.create_connection(leader.address) as stranger:
        stranger.sendall(junk)
        if not junk:
            stranger.shutdown(socket.SHUT_WR)
        answers = meet(leader, Hello(1, FACTS, 80), Hello(2, FACTS, 80))
        assert answers[0] == (Welcome(80), ["of 0", "of 1", "of 2"])
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


def test_a_node_rank_given_twice_or_too_large_is_refused(leader: Leader) -> None:
    with ThreadPoolExecutor(4) as executor:
        leading = executor.submit(lead, leader)
        other = FACTS | {"--nnodes": "8"}
        assert "ranks 0 to 2, led by rank 0, and no rank 7; is --node-rank right?" in str(
            follow(leader, Hello(7, FACTS, 80))
        )
        assert "--nnodes: nothing on rank 0 and 8 on rank 7" in str(follow(leader, Hello(7, other, 80)))
        twice = [executor.submit(follow, leader, Hello(1, FACTS, 80)) for _ in range(2)]
        refused, waiting = wait(twice, WAIT_S, FIRST_COMPLETED)
        assert "rank 1 (node 1) is there already; is --node-rank given twice?" in str(refused.pop().result())
        third = follow(leader, Hello(2, FACTS, 80))
        assert third == leading.result(WAIT_S) == waiting.pop().result(WAIT_S)


def test_ranks_that_do_not_come_are_named() -> None:
    leader = Leader(ranks(3, 0), ("127.0.0.1", 0), 0.05)
    with pytest.raises(
        GroupError, match=r"rank 1 \(node 1\), rank 2 \(node 2\) did not come within 0.05 s \(--dist-timeout\)"
    ):
        leader.gather_ranks(Hello(0, FACTS, 1))
    leader.close()


def test_whoever_came_hears_why_there_is_no_group() -> None:
    group = LeaderGroup(ranks(3, 0), ("127.0.0.1", 0), 0.3, lambda reason: None)
    with ThreadPoolExecutor(1) as executor:
        address = group.address
        follower = executor.submit(join, ranks(3, 1), address, Hello(1, FACTS, 1), WAIT_S)
        with pytest.raises(GroupError) as error:
            group.agree(FACTS, 1)
        group.close(f"rank 0 failed: {error.value}")
        with pytest.raises(GroupError, match=r"refuses this rank: rank 0 failed: rank 2 \(node 2\) did not come"):
            follower.result(WAIT_S)


def test_a_name_that_nobody_knows_is_named_with_its_flag() -> None:
    with pytest.raises(GroupError, match=r"--dist-init-addr no-such-host\.invalid:5000: "):
        Leader(ranks(2, 0), ("no-such-host.invalid", 5000), 0.0)
    with pytest.raises(GroupError, match=r"no-such-host.invalid:5000 \(--dist-init-addr\) was not there"):
        join(ranks(2, 1), ("no-such-host.invalid", 5000), Hello(1, FACTS, 1), 0.0)


def test_a_leader_whose_name_is_not_known_yet_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[object] = [socket.gaierror(socket.EAI_NONAME, "not known"), socket.getaddrinfo("127.0.0.1", 0)]

    def look_up(*args: object, **kwargs: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(control, "NAME_RETRY_S", 0.0)
    leader = Leader(ranks(2, 0), ("new-pod.svc", 0), WAIT_S)
    assert leader.address[0] == "127.0.0.1"
    leader.close()


def test_a_leader_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
        slept: list[float] = []
        wanted = rf"127.0.0.1:{address[1]} \(--dist-init-addr\) was not there .*is --node-rank given twice"
        with pytest.raises(GroupError, match=wanted):
            join(ranks(2, 1), address, Hello(1, FACTS, 1), 0.0, sleep=slept.append)


def pair(limit_s: float = WAIT_S) -> tuple[Heartbeat, socket.socket, list[str], threading.Event]:
    ours, theirs = socket.socketpair()
    reasons: list[str] = []
    lost = threading.Event()

    def on_lost(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    beat = Heartbeat({"rank 1 (node 1)": ours}, on_lost, interval_s=0.02, limit_s=limit_s)
    beat.start()
    return beat, theirs, reasons, lost


def test_a_rank_that_stands_still_is_lost() -> None:
    beat, theirs, reasons, lost = pair(limit_s=0.2)
    with theirs:
        assert lost.wait(WAIT_S)
        assert reasons == ["rank 1 (node 1) has not been heard of for 0.2 s"]
    beat.close()


def test_a_time_in_which_all_stood_still_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    jump_s = 0.0
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + jump_s))
    beat, theirs, reasons, lost = pair()
    with theirs:
        assert theirs.recv(1) == b"."
        jump_s = 1000.0
        assert [theirs.recv(1) for _ in range(3)] == [b"."] * 3
        theirs.sendall(b"rank 1 (node 1) was told to stop")
        assert lost.wait(WAIT_S)
        assert reasons == ["rank 1 (node 1) was told to stop"]
    beat.close()


def test_the_last_words_of_a_rank_are_passed_on() -> None:
    beat, theirs, reasons, lost = pair()
    with theirs:
        theirs.sendall(b"...rank 1 (node 1) failed: no memory")
        assert lost.wait(WAIT_S)
        assert reasons == ["rank 1 (node 1) failed: no memory"]
    beat.close()


def test_a_peer_that_ends_on_purpose_is_no_loss() -> None:
    ours, theirs = socket.socketpair()
    ends: list[tuple[str, str]] = []
    beat = Heartbeat(
        {"rank 0": ours}, lambda words: ends.append(("lost", words)), lambda words: ends.append(("stop", words))
    )
    beat.start()
    Heartbeat({"rank 1": theirs}, lambda words: None).close("rank 0 was told to stop", on_purpose=True)
    beat.join(WAIT_S)
    assert ends == [("stop", "rank 0 was told to stop")]
    beat.close()


def test_closing_on_purpose_is_no_loss() -> None:
    beat, theirs, reasons, _ = pair()
    with theirs:
        beat.close("rank 0 ended")
        assert theirs.recv(1000).lstrip(b".") == b"rank 0 ended"
        assert reasons == []


def test_a_step_reaches_followers_whole() -> None:
    sequences = PagedSequences([list(range(3, 60)), list(range(90, 107)), [5, 6, 7]], 16)
    sampling = SamplingParams()
    batch = sequences.batch(
        [Query(0, 16, 57), Query(1, 16, 17), Query(2, 0, 2)],
        samples=[SampleRow(seq, sampling, 0, 0, [], []) for seq in (0, 1)],
        prompt_logprobs=[PromptLogprobsRow(0, 20, list(range(10)))],
    )
    found, rows = decode_step(encode_step(batch, logit_rows(batch)))
    for field in ("token_ids", "positions", "query_lens", "context_lens", "page_tables"):
        ours, theirs = getattr(found, field), getattr(batch, field)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), field
    assert [one.tolist() for one in rows] == [list(range(3, 13)), [40, 41]]


def flags(text: str) -> Topology:
    return plan_topology(engine_args(f"--model m {text}".split()), "cpu", {})


def test_a_cpu_host_is_one_rank_and_says_so() -> None:
    alone = flags("--tp 2")
    assert (alone.num_ranks, alone.rank) == (1, 0)
    assert alone.note is not None and alone.note.startswith("--tp-size 2: 1 rank runs")
    nodes = flags("--tp 4 --nnodes 2 --node-rank 1 --dist-init-addr h:1")
    assert (nodes.num_ranks, nodes.rank) == (2, 1)
    assert flags("--tp 2 --nnodes 2 --node-rank 1 --dist-init-addr h:1").note is None


def test_ranks_of_a_host_can_be_forced_and_gpus_are_a_rank_each() -> None:
    args = engine_args(["--model", "m", "--tp", "4", "--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "h:1"])
    forced = plan_topology(args, "cpu", {RANKS_PER_HOST: "8"}, local_rank=1)
    assert (forced.num_ranks, forced.rank, forced.name_of(3)) == (4, 3, "rank 3 (node 1)")
    assert plan_topology(args, "cuda", {}).num_ranks == 4
    with pytest.raises(ModelError, match="BATON_RANKS_PER_HOST must be a whole number"):
        plan_topology(args, "cpu", {RANKS_PER_HOST: "two"})


def test_ranks_are_numbered_stage_after_stage() -> None:
    args = engine_args(["--model", "m", "--tp", "2", "--pp", "3"])
    ranks_of = [plan_topology(args, "cuda", {}, local_rank) for local_rank in range(6)]
    assert [(one.stage, one.tp_rank) for one in ranks_of] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [one.stage_ranks for one in ranks_of[2:4]] == [range(2, 4)] * 2
    assert [ranks_of[5].rank_at(stage) for stage in (1, 2, 3)] == [3, 5, 1], "the ring is closed"


@pytest.mark.parametrize(
    ("asked", "per_host", "sizes"),
    [
        ("--tp 2 --pp 2", 1, (1, 1)), ("--tp 2 --pp 2", 2, (1, 2)), ("--tp 2 --pp 2", 4, (2, 2)), ("--pp 3", 2, (2, 1)),
        ("--tp 4 --pp 2 --nnodes 2 --dist-init-addr h:1", 1, (1, 2)), ("--pp 4 --tp 3", 6, (3, 2)),
    ],
)  # fmt: skip
def test_where_fewer_ranks_run_stages_stay_as_far_as_they_divide(
    asked: str, per_host: int, sizes: tuple[int, int]
) -> None:
    args = engine_args(["--model", "m", *asked.split()])
    topology = plan_topology(args, "cpu", {RANKS_PER_HOST: str(per_host)})
    assert (topology.tp_size, topology.pp_size) == sizes
    assert topology.tp_size * topology.pp_size == topology.num_ranks
    is_less = topology.num_ranks < args.tp_size * args.pp_size
    assert (topology.note is not None and f"--pp-size {args.pp_size}: " in topology.note) == is_less


def test_addresses() -> None:
    assert split_address("tcp://leader.svc:20000") == ("leader.svc", 20000)
    assert split_address("[::1]:5") == ("::1", 5)
