"""Whatever happens to an object outside of our memory, only the very bytes that were sealed under this key verify."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from baton.kvcache.stores.seal import KEY_BYTES, SEAL_BYTES, check, seal

keys = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES)
payloads = st.binary(min_size=1, max_size=300)


def sealed(payload: bytes, key: bytes) -> NDArray[np.uint8]:
    region = np.frombuffer(payload + bytes(SEAL_BYTES), dtype=np.uint8).copy()
    seal(region, key)
    return region


@given(payloads, keys)
def test_a_sealed_region_verifies_and_its_payload_is_untouched(payload: bytes, key: bytes) -> None:
    region = sealed(payload, key)
    assert check(region, key) and region[:-SEAL_BYTES].tobytes() == payload


@given(payloads, keys, st.data())
def test_any_flipped_bit_is_noticed(payload: bytes, key: bytes, data: st.DataObject) -> None:
    region = sealed(payload, key)
    region[data.draw(st.integers(0, len(region) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert not check(region, key)


@given(payloads, keys, st.data())
def test_a_torn_region_is_noticed(payload: bytes, key: bytes, data: st.DataObject) -> None:
    """Some of the bytes are those of what lay there before."""
    region = sealed(payload, key)
    before = np.frombuffer(data.draw(st.binary(min_size=len(region), max_size=len(region))), dtype=np.uint8)
    cut = data.draw(st.integers(0, len(region) - 1))
    torn = np.concatenate([region[:cut], before[cut:]])
    assert check(torn, key) == np.array_equal(torn, region)


@given(payloads, keys, keys)
def test_another_key_does_not_verify(payload: bytes, key: bytes, other: bytes) -> None:
    assert check(sealed(payload, key), other) == (key == other)


@given(payloads, keys, st.integers(1, 64))
def test_a_longer_or_shorter_object_does_not_verify(payload: bytes, key: bytes, count: int) -> None:
    region = sealed(payload, key)
    assert not check(np.concatenate([region, np.zeros(count, dtype=np.uint8)]), key)
    assert not check(np.concatenate([np.zeros(count, dtype=np.uint8), region]), key)
    if len(region) - count > SEAL_BYTES:
        assert not check(region[:-count], key) and not check(region[count:], key)


def test_memory_that_was_never_written_does_not_verify() -> None:
    assert not check(np.zeros(1000, dtype=np.uint8), bytes(KEY_BYTES))
