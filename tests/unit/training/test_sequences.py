from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.errors import ConfigError
from steerserve.training.corpus import Corpus, Text
from steerserve.training.sequences import batches, pieces, token_lists

BOS, EOS = 0, 1
SPECIAL = frozenset({BOS, EOS})
WORDS = st.lists(st.integers(2, 99), max_size=60)


@given(words=WORDS, longest=st.integers(2, 20))
def test_pieces_put_together_are_the_text_and_each_opens_as_it_does(words: list[int], longest: int) -> None:
    found = list(pieces([BOS, *words], longest, SPECIAL))
    assert [token for piece in found for token in piece[1:]] == words
    assert all(piece[0] == BOS and len(piece) <= longest for piece in found)
    assert all(len(piece) == longest for piece in found[:-1])


@pytest.mark.parametrize("tokens", [[5, 6, 7], [BOS, 5, 6], [BOS, BOS], [EOS]])
def test_a_text_that_fits_is_left_as_it_is(tokens: list[int]) -> None:
    assert list(pieces(tokens, 3, SPECIAL)) == [tokens]


def test_a_model_that_takes_nothing_but_special_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than 2 special"):
        list(pieces([BOS, BOS, 5], 2, SPECIAL))


@given(
    texts=st.lists(st.lists(st.integers(2, 99), max_size=30), max_size=20),
    max_tokens=st.integers(4, 40),
    max_sequences=st.integers(1, 5),
)
def test_batches_hold_every_piece_once_in_order_and_never_too_much(
    texts: list[list[int]], max_tokens: int, max_sequences: int
) -> None:
    found = list(
        batches(
            ((text, number) for number, text in enumerate(texts, start=1)),
            longest=8,
            special=SPECIAL,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
        )
    )
    sequences = [sequence for batch in found for sequence in batch.sequences]
    assert sequences == [piece for text in texts if text for piece in pieces(text, 8, SPECIAL)]
    assert all(0 < len(batch.sequences) <= max_sequences for batch in found)
    assert all(batch.tokens <= max_tokens or len(batch.sequences) == 1 for batch in found)
    starts = [sum(len(batch.sequences) for batch in found[:i]) for i in range(len(found))]
    assert [batch.first for batch in found] == starts
    reads = [batch.read for batch in found]
    assert reads == sorted(reads)


def test_a_batch_says_how_far_it_read() -> None:
    corpus = Corpus(30, lambda: iter([Text("a", 10), Text("b", 20), Text("c", 30)]))
    lists = token_lists(corpus, lambda text: [ord(text)] * 2)
    found = list(batches(lists, longest=8, special=SPECIAL, max_tokens=4, max_sequences=9))
    assert [(batch.first, batch.read) for batch in found] == [(0, 20), (2, 30)]


def test_prompts_are_texts_or_tokens() -> None:
    assert list(token_lists(["ab", [7]], lambda text: list(text.encode()))) == [([97, 98], 1), ([7], 2)]
