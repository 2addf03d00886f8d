"""Workers are killed, frozen and restarted at each state of the hand-over; clients leave at each of them.

After each: every request had exactly one end, answers are those of an aggregated worker, nobody holds a page or waits, and
the next request is served without restarting anything else. States are reached by freezing one side and looking at the other.
"""

import contextlib
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.chaos import ENVIRONMENT, ROUTER_FLAGS, WORKER_FLAGS, Client, at_rest, body, info, state, until
from tests.e2e.clients import generate_all
from tests.e2e.service import Process, Service, request, running

PROMPT_TOKENS = 400
VICTIMS = ("prefill", "decode")
KILLS = ("rank", "http", "worker")
STATES = ("bootstrapping", "preallocated", "transferring", "last-page", "decoding")


@pytest.fixture(scope="module")
def pair(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(demo_model, tmp_path_factory.mktemp("chaos")) as service:
        service.environment = ENVIRONMENT
        service.worker("prefill", "prefill", *WORKER_FLAGS)
        service.worker("decode", "decode", *WORKER_FLAGS)
        service.wait_ready()
        service.router(*ROUTER_FLAGS)
        service.wait_ready()
        yield service


@pytest.fixture(scope="module")
def expect(aggregated: Process) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def answer(wanted: dict[str, Any]) -> dict[str, Any]:
        return generate_all(aggregated.url, [{**wanted, "stream": False}], 1)[0]

    return answer


def kill(service: Service, name: str, how: str) -> None:
    """The rank process only, the HTTP process only, or both at once. Then a supervisor restarts the worker."""
    process = service.processes[name]
    if how == "rank":
        os.kill(process.rank_pid(), signal.SIGKILL)
    elif how == "http":
        os.kill(process.popen.pid, signal.SIGKILL)
    else:
        process.kill()
    service.restart(name)


@contextlib.contextmanager
def frozen(process: Process) -> Iterator[None]:
    """The rank stands still, as in a debugger or on a machine that pages. It may be killed inside."""
    pid = process.rank_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def at_state(service: Service, name: str, clients: list[Client]) -> Iterator[None]:
    """Starts the clients and enters the block when they are at that state; what was frozen goes on after the block."""
    prefill, decode = service.processes["prefill"], service.processes["decode"]
    count = len(clients)
    with contextlib.ExitStack() as stack:
        if name == "bootstrapping":
            stack.enter_context(frozen(decode))
        if name == "preallocated":
            stack.enter_context(frozen(prefill))
        for client in clients:
            client.start()
        if name == "bootstrapping":
            until(name, lambda: state(prefill)["num_prefill_prealloc"] == count)
        elif name == "preallocated":
            until(name, lambda: state(decode)["num_decode_transfer"] == count)
        elif name == "transferring":
            until(name, lambda: state(prefill)["num_running"] and state(decode)["num_decode_transfer"])
        elif name == "last-page":
            until(name, lambda: state(decode)["num_decode_transfer"] == count)
            stack.enter_context(frozen(decode))
            until(name, lambda: state(prefill)["num_prefill_inflight"])  # one is enough: peers lose patience
        else:
            until(name, lambda: state(decode)["num_running"] == count)
            for client in clients:
                until(name, lambda client=client: not client.body["stream"] or client.num_events >= 2)  # type: ignore[misc]
        yield


def served_again(service: Service, seed: int, expect: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    wanted = body(200, seed, stream=False)
    client = Client(service.processes["router"].url, wanted).start()
    client.answered(expect(wanted))
    at_rest(service)


def bodies(seed: int, at: str) -> list[dict[str, Any]]:
    tokens = 100 if at == "decoding" else 12
    return [body(PROMPT_TOKENS, seed * 10 + n, stream=n == 0, max_new_tokens=tokens) for n in range(2)]


FAST = (0, 14, 21, 28)
"""Indices of the cases that run in `make test`: each state but one, each victim, each kind of death."""
CASES = [(at, victim, how) for at in STATES for victim in VICTIMS for how in KILLS]


@pytest.mark.parametrize(
    ("at", "victim", "how"),
    [
        pytest.param(*case, marks=[] if index in FAST else [pytest.mark.slow], id="-".join(case))
        for index, case in enumerate(CASES)
    ],
)
def test_a_killed_worker_costs_time_only(
    pair: Service, expect: Callable[[dict[str, Any]], dict[str, Any]], at: str, victim: str, how: str
) -> None:
    seed = 100 + CASES.index((at, victim, how))
    wanted = bodies(seed, at)
    answers = [expect(one) for one in wanted]
    clients = [Client(pair.processes["router"].url, one) for one in wanted]
    with at_state(pair, at, clients):
        kill(pair, victim, how)
    for client, answer in zip(clients, answers, strict=True):
        client.answered(answer)
    pair.wait_ready()
    at_rest(pair)
    served_again(pair, seed, expect)


@pytest.mark.parametrize("at", STATES)
def test_clients_that_leave_free_everything(
    pair: Service, expect: Callable[[dict[str, Any]], dict[str, Any]], at: str
) -> None:
    seed = 200 + STATES.index(at)
    clients = [Client(pair.processes["router"].url, one) for one in bodies(seed, at)]
    with at_state(pair, at, clients):
        for client in clients:
            client.leave()
            assert client.end() == "closed"
    at_rest(pair)
    served_again(pair, seed, expect)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("at", ["transferring", pytest.param("decoding", marks=pytest.mark.slow)])
def test_a_worker_that_freezes_and_wakes_is_used_again(
    pair: Service, expect: Callable[[dict[str, Any]], dict[str, Any]], at: str, victim: str
) -> None:
    """Frozen for longer than its peer's patience: the session ends, the room fails or the answer comes late."""
    seed = 300 + 2 * STATES.index(at) + VICTIMS.index(victim)
    wanted = bodies(seed, at)
    answers = [expect(one) for one in wanted]
    clients = [Client(pair.processes["router"].url, one) for one in wanted]
    survivor = pair.processes["decode" if victim == "prefill" else "prefill"]
    with at_state(pair, at, clients), frozen(pair.processes[victim]):
        before = state(survivor)
        if at == "transferring":
            until(
                "the peer gives up",
                lambda: state(survivor)["num_transfer_failed_total"] > before["num_transfer_failed_total"],
            )
    for client, answer in zip(clients, answers, strict=True):
        client.answered(answer)
    at_rest(pair)
    served_again(pair, seed, expect)


def test_half_a_request_times_out_with_a_typed_error(pair: Service) -> None:
    """Only one worker of the pair hears of it: its peer never comes."""
    port = info(pair.processes["prefill"])["disaggregation_bootstrap_port"]
    clients = []
    for index, side in enumerate(VICTIMS):
        for stream in (False, True):
            room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": 4711 + 2 * index + stream}
            clients.append(Client(pair.processes[side].url, {**body(300, 400, stream=stream), **room}).start())
    for client in clients:
        assert client.end() == "error"
        assert "within 6 s" in client.problem, client.problem
        assert '"transfer"' in client.problem, client.problem
    at_rest(pair)


def test_the_router_may_be_killed_and_come_back(
    pair: Service, expect: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    clients = [Client(pair.processes["router"].url, one) for one in bodies(500, "decoding")]
    with at_state(pair, "decoding", clients):
        pair.processes["router"].kill()
        for client in clients:
            assert client.end() == "broken"
        pair.restart("router")
    at_rest(pair)
    pair.wait_ready()
    served_again(pair, 501, expect)


def test_a_router_starts_before_its_workers(
    demo_model: Path, tmp_path: Path, pair: Service, expect: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    prefill, decode = pair.processes["prefill"], pair.processes["decode"]
    for process in (prefill, decode):
        process.kill()
    pair.processes["router"].kill()
    pair.restart("router")
    router = pair.processes["router"]
    until("the router is alive", lambda: router.get("/liveness")[0] == 200)
    status, text = request(router.url, "POST", "/generate", {"text": "hi"})
    assert status == 503, text
    pair.restart("prefill")
    pair.restart("decode")
    pair.wait_ready()
    served_again(pair, 502, expect)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_under_load(
    pair: Service, expect: Callable[[dict[str, Any]], dict[str, Any]], seed: int
) -> None:
    """Each round: eight requests, and a kill when as many stream events have come as the dice say."""
    dice = random.Random(seed)
    kinds = [
        body(dice.randrange(20, 400), 600 + 10 * seed + n, stream=n % 2 == 0, max_new_tokens=dice.randrange(4, 60))
        for n in range(8)
    ]
    answers = [expect(one) for one in kinds]
    num_events = sum(one["sampling_params"]["max_new_tokens"] for one in kinds if one["stream"])
    for _ in range(5):
        clients = [Client(pair.processes["router"].url, one).start() for one in kinds]
        wanted = dice.randrange(num_events // 2)
        until("some events", lambda clients=clients, wanted=wanted: sum(c.num_events for c in clients) >= wanted)  # type: ignore[misc]
        kill(pair, dice.choice(VICTIMS), dice.choice(KILLS))
        for client, answer in zip(clients, answers, strict=True):
            client.answered(answer)
        pair.wait_ready()
        at_rest(pair)
