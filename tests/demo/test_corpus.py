from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from demo.corpus.documents import labelled_documents
from demo.corpus.grammar import BASE64_TEXT, BUILTINS, SLOT, expand, load_with_shared, parse
from demo.corpus.sentences import ALL_DOMAINS, DOMAINS, neutral_opening, opened_sentence, sentence


def test_the_same_seed_gives_the_same_documents() -> None:
    assert list(labelled_documents(7, 50)) == list(labelled_documents(7, 50))


def test_another_seed_gives_other_documents() -> None:
    first = {document.text for document in labelled_documents(7, 50)}
    assert first.isdisjoint(document.text for document in labelled_documents(8, 50))


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_every_slot_of_every_table_is_defined(domain: str) -> None:
    table = load_with_shared(domain)
    named = {slot for texts in table.values() for text in texts for slot in SLOT.findall(text)}
    assert named <= table.keys() | BUILTINS.keys()


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_has_more_than_thirty_thousand_distinct_sentences(domain: str) -> None:
    # n draws from N equally likely sentences hold about n²/2N repeats: 2,000 of 12,000 mean N is about
    # 36,000, and unlikely sentences only raise the true number.
    rng = Random(0)
    texts = [sentence(domain, rng).text for _ in range(12_000)]
    assert len(set(texts)) > 10_000


def test_the_ten_domains_are_of_similar_size() -> None:
    sizes: Counter[str] = Counter()
    for document in labelled_documents(0, 1500):
        for start, end, domain in document.spans:
            sizes[domain] += end - start
    domains = [sizes[domain] for domain in DOMAINS]
    assert max(domains) < 2 * min(domains)
    assert sizes["narration"] > max(domains)


def test_spans_lie_in_order_inside_the_text() -> None:
    for document in labelled_documents(1, 300):
        last = 0
        for start, end, domain in document.spans:
            assert last <= start < end <= len(document.text)
            assert domain in ALL_DOMAINS
            last = end


def test_topics_persist_and_shift() -> None:
    stays = shifts = 0
    for document in labelled_documents(2, 500):
        domains = [domain for _, _, domain in document.spans]
        for before, after in pairwise(domains):
            stays += before == after
            shifts += before != after
    assert 0.75 < stays / (stays + shifts) < 0.95


def test_an_opening_is_drawn_without_regard_to_the_domain() -> None:
    openings = {domain: neutral_opening(Random(3)) for domain in ALL_DOMAINS}
    assert len(set(openings.values())) == 1
    for domain, opening in openings.items():
        opened = opened_sentence(domain, Random(3))
        assert opened.text.startswith(opening)
        assert opened.neutral == len(opening)


def test_no_slot_is_left_open_in_the_text() -> None:
    assert not any(SLOT.search(document.text) for document in labelled_documents(4, 300))


def test_base64_is_recognised_and_words_are_not() -> None:
    rng = Random(0)
    blobs = [expand("{base64}", load_with_shared("base64"), rng) for _ in range(500)]
    assert sum(bool(BASE64_TEXT.fullmatch(blob)) for blob in blobs) > 450
    words = "The HttpClient of United Wanderers and TaskQueue, encode_utf8, well-known CERTIFICATE"
    assert not BASE64_TEXT.search(words)


def test_a_table_without_a_header_is_refused() -> None:
    with pytest.raises(ValueError, match="header"):
        parse("no header | here")
