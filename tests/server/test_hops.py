"""What our router relies on: token-id comments, continuing a stream elsewhere, request ids, deadlines, hand-over fields."""

import asyncio
import json
from typing import Any

import msgspec
import pytest
from tests.server.conftest import MODEL, Bed, Start, sse_events

from baton.protocol.hops import (
    REQUEST_ID_HEADER,
    RESUME_FIELD,
    TIMEOUT_HEADER,
    TOKEN_IDS_HEADER,
    Resume,
    parse_tokens_comment,
)
from baton.protocol.rank import Abort, Bootstrap, Submit

WITH_IDS = {TOKEN_IDS_HEADER: "1"}
# Characters of several tokens, a stop string that is nearly complete once, and text behind it.
TALK = "Zoë 🏃🏽‍♀️ runs. STO, not the end… 🇫🇷 STOP here"


async def stream_of(
    bed: Bed, path: str, body: dict[str, Any], *, is_paced: bool = False
) -> list[tuple[list[int], dict[str, Any]]]:
    """(ids of the comment, document) of each event of choice 0; checks that a comment precedes every one."""
    pacing = asyncio.create_task(pace(bed)) if is_paced else None
    pairs: list[tuple[list[int], dict[str, Any]]] = []
    ids: list[int] | None = None
    async with bed.http.stream("POST", path, json=body, headers=WITH_IDS) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith(": tokens "):
                index, ids = parse_tokens_comment(line.encode())
                assert index == 0
            elif line.startswith("data: {"):
                document = json.loads(line.removeprefix("data: "))
                if document.get("choices", True):
                    assert ids is not None, line
                    pairs.append((ids, document))
                    ids = None
                else:
                    pairs.append(([], document))
    if pacing is not None:
        pacing.cancel()
        bed.rank.credits = None
    return pairs


async def pace(bed: Bed) -> None:
    """Let the rank go slowly, so that most tokens get an event of their own (correctness does not depend on it)."""
    bed.rank.credits = 0
    while True:
        await asyncio.sleep(0.002)
        bed.rank.give(1)


def delta_text(path: str, document: dict[str, Any]) -> str:
    if path.endswith("chat/completions"):
        return "".join(one["delta"]["content"] or "" for one in document["choices"])
    return "".join(one["text"] for one in document["choices"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
async def test_a_stream_goes_on_at_every_event_without_gap_or_repeat(start: Start, path: str) -> None:
    common: dict[str, Any] = {"stream": True}
    if path == "/generate":
        common |= {"text": "Hi", "sampling_params": {"stop": "STOP", "max_new_tokens": 100}}
    else:
        common |= {"model": MODEL, "stop": "STOP", "max_tokens": 100, "stream_options": {"include_usage": True}}
        common |= (
            {"prompt": "Hi"}
            if path.endswith("/completions") and "chat" not in path
            else {"messages": [{"role": "user", "content": "Hi"}]}
        )
    async with start() as bed:
        bed.say(TALK)
        whole = await stream_of(bed, path, common, is_paced=True)
        expected = TALK[: TALK.index("STOP")]
        all_ids = [token_id for ids, _ in whole for token_id in ids]
        assert all_ids == bed.tokenizer.encode(TALK)[: len(all_ids)]
        num_events = len(whole)
        assert num_events > 8
        for cut in range(1, num_events):
            seen = whole[:cut]
            ids = [token_id for event_ids, _ in seen for token_id in event_ids]
            resume = Resume(created=123, output_ids=[ids])
            body = {**common, RESUME_FIELD: msgspec.to_builtins(resume)}
            rest = await stream_of(bed, path, body)
            if path == "/generate":
                assert rest[-1][1]["text"] == expected
                assert rest[-1][1]["meta_info"]["completion_tokens"] == len(all_ids)
                assert rest[-1][1]["output_ids"] == all_ids
                continue
            text = "".join(delta_text(path, document) for _, document in [*seen, *rest])
            assert text == expected, cut
            assert all(not one["delta"]["role"] for _, d in rest for one in d["choices"] if "delta" in one)
            assert {document["created"] for _, document in rest} == {123}
            assert rest[-1][1]["usage"]["completion_tokens"] == len(all_ids)
            reasons = [one["finish_reason"] for _, document in rest for one in document["choices"]]
            if not any(one["finish_reason"] for _, document in seen for one in document.get("choices", ())):
                assert reasons[-1] == "stop"


async def test_log_probabilities_go_on_behind_a_resume(start: Start) -> None:
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": "Hi",
        "stream": True,
        "max_tokens": 100,
        "echo": True,
        "logprobs": 1,
    }
    async with start() as bed:
        bed.say("Zoë runs. The end")

        def joined(events: list[tuple[list[int], dict[str, Any]]], field: str) -> list[Any]:
            return [value for _, one in events for value in one["choices"][0]["logprobs"][field]]

        whole = await stream_of(bed, "/v1/completions", body, is_paced=True)
        assert len(joined(whole, "tokens")) == 1 + len(bed.tokenizer.encode("Zoë runs. The end")) + 1
        for cut in range(1, len(whole)):
            ids = [token_id for event_ids, _ in whole[:cut] for token_id in event_ids]
            rest = await stream_of(bed, "/v1/completions", body | {RESUME_FIELD: {"created": 1, "output_ids": [ids]}})
            for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                assert joined(whole[:cut], field) + joined(rest, field) == joined(whole, field), (cut, field)


async def test_usage_of_a_resumed_stream_counts_the_prompts_of_finished_choices(start: Start) -> None:
    async with start() as bed:
        common = {"model": MODEL, "stream": True, "max_tokens": 5, "stream_options": {"include_usage": True}}
        batch = common | {"prompt": ["One two three", "Hi"]}
        chat = common | {"messages": [{"role": "user", "content": "Hi"}]}
        for path, body, given in (
            ("/v1/completions", batch, [None, bed.tokenizer.encode("Hel")]),
            ("/v1/chat/completions", chat, [None]),
        ):
            whole, rest = [
                json.loads(sse_events((await bed.post(path, one)).text)[-2])["usage"]
                for one in (body, body | {RESUME_FIELD: {"created": 5, "output_ids": given}})
            ]
            assert rest["prompt_tokens"] == whole["prompt_tokens"] > 0


async def test_finished_choices_of_a_resumed_stream_are_not_sent_again(start: Start) -> None:
    async with start() as bed:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "n": 2,
            "max_tokens": 5,
        }
        body[RESUME_FIELD] = {"created": 5, "output_ids": [None, bed.tokenizer.encode("Hello")]}
        events = [json.loads(one) for one in sse_events((await bed.post("/v1/chat/completions", body)).text)[:-1]]
        assert {choice["index"] for one in events for choice in one["choices"]} == {1}
        assert len(bed.rank.received_of(Submit)) == 1
        body[RESUME_FIELD] = {"created": 5, "output_ids": [[]]}
        answer = await bed.post("/v1/chat/completions", body)
        assert answer.status_code == 400
        assert RESUME_FIELD in answer.json()["message"]


async def test_a_stream_that_broke_before_its_end_was_said_ends_without_the_rank(start: Start) -> None:
    async with start() as bed:
        body = {"model": MODEL, "prompt": "Hi", "stream": True, "max_tokens": 2}
        body[RESUME_FIELD] = {"created": 5, "output_ids": [bed.tokenizer.encode("Hello there")]}
        events = [json.loads(one) for one in sse_events((await bed.post("/v1/completions", body)).text)[:-1]]
        assert [one["choices"][0]["text"] for one in events] == [""]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert bed.rank.received == []


async def test_request_id_header_is_the_default_rid(start: Start) -> None:
    async with start() as bed:
        body = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
        answer = await bed.http.post("/v1/completions", json=body, headers={REQUEST_ID_HEADER: "req-7"})
        assert answer.json()["id"] == "req-7"
        assert answer.headers[REQUEST_ID_HEADER] == "req-7"
        answer = await bed.http.post(
            "/v1/completions", json={**body, "rid": "mine"}, headers={REQUEST_ID_HEADER: "req-7"}
        )
        assert answer.json()["id"] == "mine"


async def test_an_id_may_come_again_at_once(start: Start) -> None:
    """The rank still works on a sequence that a stop string has ended for its client."""
    async with start(holds_ends=True) as bed:
        bed.say("One. Two. Three.")
        bed.rank.credits = 0
        body = {"text": "Hi", "rid": "again", "sampling_params": {"stop": "Two", "max_new_tokens": 50}}
        for num_ended in range(3):
            await bed.until(lambda: len(bed.rank.received_of(Abort)) == num_ended)  # noqa: B023  (called at once)
            bed.rank.give(len(bed.tokenizer.encode("One. Two")))
            answer = (await bed.post("/generate", body)).json()
            assert (answer["text"], answer["meta_info"]["id"]) == ("One. ", "again")
            assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "Two"}
        names = [submit.rid for submit in bed.rank.received_of(Submit)]
        assert names[0] != names[1] != names[2], "the rank tells them apart"
        first = asyncio.create_task(bed.post("/generate", body))
        await bed.until(lambda: len(bed.rank.received_of(Submit)) == 4)
        twin = await bed.post("/generate", body)
        assert (twin.status_code, twin.json()["error"]["param"]) == (400, "rid")
        bed.rank.give(50)
        assert (await first).status_code == 200


async def test_a_prefill_worker_takes_an_id_again_while_it_waits_for_the_other_side(start: Start) -> None:
    async with start("--disaggregation-mode", "prefill") as bed:
        bed.rank.paused.set()
        hand_over = {"bootstrap_host": "h", "bootstrap_port": 1}
        bodies = [{"text": "Hi", "rid": "again", "bootstrap_room": room, **hand_over} for room in (1, 2)]
        answers = [asyncio.create_task(bed.post("/generate", body)) for body in bodies]
        await bed.until(lambda: len(bed.rank.received_of(Submit)) == 2)
        bed.rank.resume()
        assert [(await answer).json()["meta_info"]["id"] for answer in answers] == ["again", "again"]


async def test_deadline_travels_to_the_rank_and_a_bad_one_is_refused(start: Start) -> None:
    async with start() as bed:
        answer = await bed.http.post("/generate", json={"text": "a"}, headers={TIMEOUT_HEADER: "12.5"})
        assert answer.status_code == 200
        [submit] = bed.rank.received_of(Submit)
        assert submit.timeout_s is not None
        assert 12 < submit.timeout_s <= 12.5
        for bad in ("soon", "-1", "nan"):
            answer = await bed.http.post("/generate", json={"text": "a"}, headers={TIMEOUT_HEADER: bad})
            assert answer.status_code == 400
            assert TIMEOUT_HEADER in answer.text


async def test_a_rank_that_lets_a_deadline_pass_is_not_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.engine.server.engines.DEADLINE_GRACE_S", 0.0)
    async with start() as bed:
        bed.rank.paused.set()
        answer = await bed.http.post("/generate", json={"text": "a"}, headers={TIMEOUT_HEADER: "0.05"})
        assert answer.status_code == 504
        assert answer.headers["x-baton-error-stage"] == "server"
        await bed.until(lambda: bool(bed.rank.received_of(Abort)))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_sequences(start: Start, stream: bool) -> None:
    async with start() as bed:
        bed.rank.credits = 1
        body = {"text": ["a", "b"], "stream": stream}
        request = asyncio.create_task(bed.post("/generate", body))
        await bed.until(lambda: len(bed.rank.received_of(Submit)) == 2)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await bed.until(lambda: len(bed.rank.received_of(Abort)) == 2)
        assert bed.ctx.engines.num_in_flight == 0


async def test_handover_fields_single_lists_and_n(start: Start) -> None:
    async with start("--disaggregation-mode", "decode") as bed:
        one = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 2**63 - 1}
        await bed.post("/generate", {"text": "a", "sampling_params": {"n": 2, "max_new_tokens": 1}, **one})
        many = {"bootstrap_host": ["h1", "h2"], "bootstrap_port": [None, 2], "bootstrap_room": [7, 9]}
        await bed.post("/generate", {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 1}, **many})
        await bed.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1, **one, "bootstrap_room": 5})
        assert [one.bootstrap for one in bed.rank.received_of(Submit)] == [
            Bootstrap("10.0.0.1", 8998, 2**63 - 1), Bootstrap("10.0.0.1", 8998, 0),
            Bootstrap("h1", None, 7), Bootstrap("h2", 2, 9),
            Bootstrap("10.0.0.1", 8998, 5), Bootstrap("10.0.0.1", 8998, 6),
        ]  # fmt: skip


async def test_a_request_without_a_room_is_refused_in_sglangs_words(start: Start) -> None:
    async with start("--disaggregation-mode", "prefill") as bed:
        answer = await bed.post("/generate", {"text": "a", "rid": "r9"})
        assert answer.status_code == 400
        message = "Invalid request: Disaggregated request received without boostrap room id. req.rid=r9"
        assert answer.json()["error"]["message"] == message
        assert answer.headers["x-baton-error-stage"] == "prefill"
        for fields, name in (
            ({"bootstrap_room": 1}, "bootstrap_host"),
            ({"bootstrap_room": -1, "bootstrap_host": "h"}, "bootstrap_room"),
            ({"bootstrap_room": 2**63, "bootstrap_host": "h"}, "bootstrap_room"),
            ({"bootstrap_room": [1, 2], "bootstrap_host": "h"}, "bootstrap_room"),
            ({"bootstrap_room": 1, "bootstrap_host": "h", "bootstrap_port": 70000}, "bootstrap_port"),
        ):
            answer = await bed.post("/generate", {"text": "a", **fields})
            assert answer.status_code == 400
            assert name in answer.json()["error"]["message"]


async def test_a_prefill_answer_ends_with_length_zero(start: Start) -> None:
    async with start("--disaggregation-mode", "prefill") as bed:
        meta = (await bed.post("/generate", {"text": "a", "bootstrap_host": "h", "bootstrap_room": 1})).json()[
            "meta_info"
        ]
        assert meta["finish_reason"] == {"type": "length", "length": 0}
        assert meta["completion_tokens"] == 1
