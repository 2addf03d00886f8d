"""Splicing of bodies and of event streams: pure functions of bytes."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.protocol.errors import RequestError
from baton.protocol.hops import Resume, tokens_comment
from baton.router.body import bootstrap_fields, parse_body, resume_field, rid_field, splice
from baton.router.logprobs import StreamMerger, merge_answers, needs_prefill
from baton.router.relay import DONE_EVENT, StreamError, StreamRelay

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4), st.sampled_from(["", " ", "\n\t"]), st.booleans())
def test_splice_adds_fields_and_changes_nothing_else(body, space, compact):
    text = json.dumps(body, separators=(",", ":") if compact else None)
    raw = (space + text[:-1] + space + "}" + space).encode()
    parse_body(raw) if not set(body) & {"rid"} else None
    spliced = splice(raw, b'"bootstrap_room":5,"rid":"r"')
    assert json.loads(spliced) == body | {"bootstrap_room": 5, "rid": "r"}
    assert spliced.startswith(raw[: len(space + text) - 1])


def test_a_field_of_the_client_is_overridden():
    assert json.loads(splice(b'{"rid":"theirs","x":1}', rid_field("ours", None))) == {"rid": "ours", "x": 1}


@pytest.mark.parametrize("body", [b"", b"[1]", b"7", b'{"a":', b"{'a':1}", b'{"a":1}x'])
def test_a_body_that_is_no_json_object_is_a_400(body):
    with pytest.raises(RequestError) as caught:
        parse_body(body)
    assert caught.value.info.code == 400


@pytest.mark.parametrize(
    ("body", "batch", "choices"),
    [
        ({"text": "a"}, None, 1),
        ({"text": ["a", "b"]}, 2, 2),
        ({"text": ["a"]}, 1, 1),
        ({"text": ["a", "b"], "sampling_params": {"n": 3}}, 2, 6),
        ({"input_ids": [1, 2]}, None, 1),
        ({"input_ids": [[1], [2]]}, 2, 2),
        ({"prompt": [1, 2, 3], "n": 2}, None, 2),
        ({"prompt": ["a", "b"], "n": 2}, 2, 4),
        ({"prompt": [[1], [2]]}, 2, 2),
        ({"messages": [{"role": "user", "content": "x"}], "n": 4}, None, 4),
        ({"text": [], "n": "many"}, None, 1),
    ],
)
def test_batches_and_choices(body, batch, choices):
    view = parse_body(json.dumps(body).encode())
    assert view.batch_size() == batch
    assert view.num_choices() == choices


def test_bootstrap_fields_are_scalars_or_lists():
    one = json.loads(b"{" + bootstrap_fields("[::1]", None, [7], None) + b"}")
    assert one == {"bootstrap_host": "[::1]", "bootstrap_port": None, "bootstrap_room": 7}
    many = json.loads(b"{" + bootstrap_fields("h", 9, [7, 8], 2) + b"}")
    assert many == {"bootstrap_host": ["h", "h"], "bootstrap_port": [9, 9], "bootstrap_room": [7, 8]}


def test_resume_is_written_as_the_protocol_says():
    field = resume_field(Resume(12, [[1, 2], None]))
    assert json.loads(b"{" + field + b"}") == {"baton_resume": {"created": 12, "output_ids": [[1, 2], None]}}


def chunk(index: int, text: str, ids: list[int] | None, finish: str | None = None) -> bytes:
    choice = {"index": index, "text": text, "finish_reason": finish}
    comment = b"" if ids is None else tokens_comment(index, ids)
    data = json.dumps({"id": "r", "created": 5, "choices": [choice]}, separators=(",", ":")).encode()
    return comment + b"data: " + data + b"\n\n"


STREAM = [
    chunk(0, "a", [1]),
    chunk(1, "b\n\n: tokens 9 9", [2, 3]),
    chunk(0, "c", [4], "stop"),
    chunk(1, "d", [5]),
    DONE_EVENT,
]
CLEAN = b"".join(event.partition(b"\n")[2] if event.startswith(b":") else event for event in STREAM)


@given(st.lists(st.integers(0, len(b"".join(STREAM))), max_size=12))
def test_whole_events_come_out_however_the_bytes_come_in(cuts):
    data, relay, out = b"".join(STREAM), StreamRelay(), b""
    edges = [0, *sorted(cuts), len(data)]
    for start, stop in itertools.pairwise(edges):
        new = relay.feed(data[start:stop])
        assert new == b"" or new.endswith(b"\n\n")
        out += new
    assert out == CLEAN
    assert relay.done


def test_resume_holds_ids_per_choice_and_none_for_the_finished():
    relay = StreamRelay()
    relay.feed(b"".join(STREAM[:4]) + b": tokens 1 77\ndata: {half")
    assert relay.can_resume()
    assert relay.resume(2) == Resume(5, [None, [2, 3, 5]])


def test_nothing_sent_means_start_afresh():
    relay = StreamRelay()
    relay.feed(b": tokens 0 1\ndata: {half")
    assert relay.resume(1) is None


def test_a_role_chunk_waits_for_its_first_token_and_survives_the_worker():
    role = b": tokens %d \n" + b'data: {"choices":[{"index":%d,"delta":{"role":"assistant"},"finish_reason":null}]}\n\n'
    relay = StreamRelay()
    assert relay.feed(role % (0, 0) + role % (1, 1)) == b""
    first = relay.feed(chunk(0, "a", [1]))
    assert first.count(b'"role"') == 1
    assert relay.resume(2).output_ids == [[1], []]  # type: ignore[union-attr]
    relay.next_worker("tag-")
    second = relay.feed(chunk(1, "b", [9]))
    assert second.count(b'"role"') == 1


def test_ids_of_a_later_worker_are_never_seen():
    relay = StreamRelay()
    relay.feed(chunk(0, "a", [1]))
    relay.resume(1)
    relay.next_worker("0123-")
    out = relay.feed(chunk(0, "b", [2]).replace(b'"id":"r"', b'"id":"0123-r"'))
    assert b'"id":"r"' in out


def test_an_error_event_ends_the_feed_with_what_came_before_it():
    relay = StreamRelay()
    with pytest.raises(StreamError) as caught:
        relay.feed(chunk(0, "a", [1]) + b'data: {"error":{"code":503,"retryable":true}}\n\ndata: [DONE]\n\n')
    assert relay.take() == chunk(0, "a", None)
    assert caught.value.info == {"code": 503, "retryable": True}
    assert not relay.done


def test_a_stream_without_token_ids_cannot_resume_once_text_was_sent():
    relay = StreamRelay()
    assert relay.can_resume()
    relay.feed(chunk(0, "a", None))
    assert not relay.can_resume()


def answer(logprobs: list[float], index: int | None = None) -> dict[str, object]:
    found: dict[str, object] = {"text": "t", "meta_info": {"input_token_logprobs": logprobs, "id": "x"}}
    return found if index is None else found | {"index": index}


def test_input_logprobs_of_prefill_come_first():
    merged = json.loads(merge_answers(json.dumps(answer([1, 2])).encode(), json.dumps(answer([3])).encode()))
    assert merged["meta_info"]["input_token_logprobs"] == [1, 2, 3]
    batch = merge_answers(
        json.dumps([answer([1]), answer([2])]).encode(), json.dumps([answer([]), answer([9])]).encode()
    )
    assert [one["meta_info"]["input_token_logprobs"] for one in json.loads(batch)] == [[1], [2, 9]]


def test_an_unreadable_prefill_answer_leaves_decode_alone():
    assert merge_answers(b"oops", b'{"meta_info":{}}') == b'{"meta_info":{}}'


def test_an_answer_that_was_aborted_waits_for_no_prefill():
    """Its other half may never have arrived there, and would be waited for until the bootstrap times out."""
    aborted = {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "Aborted"}}}
    assert not needs_prefill(json.dumps(aborted).encode())
    assert needs_prefill(json.dumps([aborted, answer([5])]).encode())
    merger = StreamMerger()
    event = b"data: " + json.dumps(aborted).encode() + b"\n\n"
    assert merger.can_merge(event + DONE_EVENT)
    assert merger.merge(event) == event
    assert not merger.can_merge(b"data: " + json.dumps(answer([5], 0)).encode() + b"\n\n" + event)


def test_stream_merge_uses_the_first_prefill_chunk_of_each_index():
    merger = StreamMerger()
    events = b"".join(b"data: " + json.dumps(answer([i], 0)).encode() + b"\n\n" for i in (1, 2))
    merger.feed_prefill(events[:30])
    mine = b"data: " + json.dumps(answer([5], 0)).encode() + b"\n\n"
    assert not merger.can_merge(mine)
    merger.feed_prefill(events[30:])
    assert merger.can_merge(mine)
    assert not merger.can_merge(b"data: " + json.dumps(answer([5], 1)).encode() + b"\n\n")
    merged = merger.merge(mine + DONE_EVENT)
    assert json.loads(merged.split(b"\n\n")[0][6:])["meta_info"]["input_token_logprobs"] == [1, 5]
    assert merged.endswith(DONE_EVENT)
