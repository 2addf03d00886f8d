"""SPDY frames: any split of the byte stream gives the same frames; bad bytes are errors, never surprises."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.apiserver import spdy
from baton.cluster.apiserver.errors import StatusError
from baton.cluster.apiserver.protobuf import decode_protobuf
from baton.cluster.apiserver.spdy import Frame, SpdyDecoder, SpdyEncoder, SpdyError
from baton.cluster.apiserver.spdy_dictionary import DICTIONARY


def test_the_dictionary_is_the_one_of_the_protocol() -> None:
    assert (len(DICTIONARY), zlib.adler32(DICTIONARY)) == (1423, 0xE3C6A7C2)


TEXT = st.text(alphabet="abcdefghij-", min_size=1, max_size=20)


@given(
    st.lists(
        st.tuples(st.integers(1, 2**31 - 1), st.dictionaries(TEXT, TEXT, max_size=4), st.binary(max_size=300)),
        max_size=6,
    ),
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
)
def test_frames_survive_any_split(streams: list[tuple[int, dict[str, str], bytes]], cuts: list[int]) -> None:
    encoder, raw, wanted = SpdyEncoder(), b"", []
    for stream, headers, body in streams:
        raw += encoder.syn_stream(stream, headers) + spdy.data(stream, body, fin=True)
        wanted += [Frame(spdy.SYN_STREAM, stream, headers=headers), Frame(None, stream, True, body)]
    decoder, found, position = SpdyDecoder(), [], 0
    for index in range(len(raw)):
        size = cuts[index % len(cuts)]
        found += list(decoder.feed(raw[position : position + size]))
        position += size
        if position >= len(raw):
            break
    assert found == wanted


@given(st.binary(max_size=200))
def test_noise_is_an_error_or_waits_for_more(raw: bytes) -> None:
    try:
        for frame in SpdyDecoder().feed(raw):
            assert frame.stream >= 0
    except SpdyError:
        pass


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">HHI", 0x8002, 1, 10) + b"x" * 10,  # SPDY 2
        struct.pack(">II", 1, 0xFFFFFF),  # a frame over the limit
        struct.pack(">HHI", 0x8003, 1, 2) + b"xx",  # cut off
        struct.pack(">HHI", 0x8003, 1, 14) + b"\0" * 14,  # headers that are no zlib stream
    ],
)
def test_frames_that_are_refused(raw: bytes) -> None:
    with pytest.raises(SpdyError):
        list(SpdyDecoder().feed(raw))


def test_a_header_bomb_is_refused() -> None:
    encoder = SpdyEncoder()
    with pytest.raises(SpdyError, match="over the limit"):
        list(SpdyDecoder().feed(encoder.syn_stream(1, {"a": "x" * 1_000_000})))


@given(st.binary(max_size=120))
def test_protobuf_noise_is_a_status(raw: bytes) -> None:
    with pytest.raises(StatusError):
        decode_protobuf(b"k8s\0" + raw)
