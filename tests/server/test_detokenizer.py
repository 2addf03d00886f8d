"""Text is a function of the ids: any grouping, any break, any stop string gives what decoding the whole gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from baton.engine.detokenizer import OutputText, Vocabulary
from baton.engine.tokenizer import TextTokenizer

VOCAB = 49152
SPICY = ["🏃🏽‍♀️", "é", "…", " the", "\n\n", "<|im_end|>", "漢字", "a", " ", "STOP", "ST", "\x00", "ﷺ"]


@pytest.fixture(scope="module")
def byte_level(tokenizer: TextTokenizer) -> Vocabulary:
    return tokenizer.vocabulary


@pytest.fixture(scope="module")
def sentencepiece() -> Vocabulary:
    """A small vocabulary in the style of Llama 2: spaces as ▁, unknown text as single bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "cat", "▁cat", "s", "é"]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return Vocabulary(tokenizer)


def run(
    vocabulary: Vocabulary, ids: list[int], stops: list[str], *, skip: bool = True, **options: object
) -> OutputText:
    text = OutputText(vocabulary.decoder([], skip_special_tokens=skip), stops, **options)  # type: ignore[arg-type]
    for token_id in ids:
        if text.push(token_id):
            return text
    text.flush()
    return text


any_ids = st.lists(st.integers(0, VOCAB - 1), max_size=60)


@settings(max_examples=200, deadline=None)
@given(ids=any_ids, skip=st.booleans())
def test_pieces_join_to_the_whole(byte_level: Vocabulary, ids: list[int], skip: bool) -> None:
    expected = byte_level.tokenizer.decode(ids, skip_special_tokens=skip)
    assert run(byte_level, ids, [], skip=skip).released_text == expected


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from(SPICY), max_size=20),
    stops=st.lists(st.sampled_from(["STOP", "é…", "\n\n", "🏃"]), max_size=3),
)
def test_stop_strings_cut_where_the_whole_text_says(byte_level: Vocabulary, words: list[str], stops: list[str]) -> None:
    text = "".join(words)
    ids = byte_level.tokenizer.encode(text, add_special_tokens=False).ids
    whole = byte_level.tokenizer.decode(ids, skip_special_tokens=True)
    cut = min((whole.find(stop) for stop in stops if stop in whole), default=None)
    out = run(byte_level, ids, stops)
    assert out.released_text == whole[:cut]
    assert (out.matched_stop is not None) == (cut is not None)


@settings(max_examples=100, deadline=None)
@given(ids=any_ids, data=st.data())
def test_replaying_any_prefix_gives_the_same_text(byte_level: Vocabulary, ids: list[int], data: st.DataObject) -> None:
    whole = byte_level.tokenizer.decode(ids, skip_special_tokens=True)
    stops = data.draw(st.lists(st.sampled_from([whole[3:6], whole[10:12], "the", "e"]).filter(bool), max_size=2))
    cut = data.draw(st.integers(0, len(ids)))
    once = OutputText(byte_level.decoder([], skip_special_tokens=True), stops)
    again = OutputText(byte_level.decoder([], skip_special_tokens=True), stops)
    for token_id in ids[:cut]:
        if once.push(token_id):
            break
    for token_id in ids[:cut]:
        if again.push(token_id):
            break
    assert once.released_text == again.released_text
    expected = run(byte_level, ids, stops).released_text
    assert expected.startswith(once.released_text)


def test_half_a_character_waits_and_becomes_a_replacement_at_the_end(byte_level: Vocabulary) -> None:
    ids = byte_level.tokenizer.encode("🏃", add_special_tokens=False).ids
    assert len(ids) > 1
    text = OutputText(byte_level.decoder([], skip_special_tokens=True))
    text.push(ids[0])
    assert text.released_text == ""
    text.flush()
    assert text.released_text == "\ufffd"


def test_a_possible_stop_is_held_back_and_released_at_the_end(byte_level: Vocabulary) -> None:
    text = OutputText(byte_level.decoder([], skip_special_tokens=True), ["STOP"])
    for token_id in byte_level.tokenizer.encode("go ST", add_special_tokens=False).ids:
        assert not text.push(token_id)
    assert text.released_text == "go "
    text.flush()
    assert text.released_text == "go ST"


def test_no_stop_trim_keeps_the_stop_string(byte_level: Vocabulary) -> None:
    ids = byte_level.tokenizer.encode("one two three", add_special_tokens=False).ids
    assert run(byte_level, ids, ["two"], no_stop_trim=True).released_text == "one two"
    assert run(byte_level, ids, ["two"]).released_text == "one "


def test_stop_strings_count_only_after_min_new_tokens(byte_level: Vocabulary) -> None:
    ids = byte_level.tokenizer.encode("a b a b a b", add_special_tokens=False).ids
    assert run(byte_level, ids, ["b"], min_new_tokens=3).released_text == "a b a "
    assert run(byte_level, ids, ["b"]).released_text == "a "


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["<0xC3>", "<0xA9>", "▁the", "▁cat", "s", "é", "<s>", "<0x41>"]), max_size=12))
def test_sentencepiece_text_joins_to_the_whole(sentencepiece: Vocabulary, words: list[str]) -> None:
    ids = [sentencepiece.tokenizer.token_to_id(word) for word in words]
    prompt = [sentencepiece.tokenizer.token_to_id("cat")]
    text = OutputText(sentencepiece.decoder(prompt, skip_special_tokens=True))
    for token_id in ids:
        text.push(token_id)
    text.flush()
    whole = sentencepiece.tokenizer.decode(prompt + ids, skip_special_tokens=True)
    if "\ufffd" not in whole:
        assert "cat" + text.released_text == whole
    else:
        # Bytes that are no text may be grouped otherwise, but nothing around them is lost.
        assert ("cat" + text.released_text).replace("\ufffd", "").startswith("cat")


def test_sentencepiece_keeps_the_space_before_the_first_word(sentencepiece: Vocabulary) -> None:
    ids = [sentencepiece.tokenizer.token_to_id(word) for word in ("▁the", "▁cat")]
    text = OutputText(sentencepiece.decoder([sentencepiece.tokenizer.token_to_id("cat")], skip_special_tokens=True))
    for token_id in ids:
        text.push(token_id)
    assert text.released_text == " the cat"
