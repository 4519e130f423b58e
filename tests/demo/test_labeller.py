from random import Random

import pytest

from demo.corpus.labeller import label, label_sentences, lexicon
from demo.corpus.sentences import ALL_DOMAINS, DOMAINS, opened_sentence, plain_sentence, sentence


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_held_out_sentences_get_their_own_domain(domain: str) -> None:
    rng = Random(99)
    kinds = (sentence, plain_sentence, opened_sentence)
    right = sum(label(rng.choice(kinds)(domain, rng).text) == domain for _ in range(1000))
    assert right >= 980


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_sentence_cut_in_half_still_shows_its_domain(domain: str) -> None:
    rng = Random(98)
    texts = [plain_sentence(domain, rng).text for _ in range(400)]
    right = sum(label(text[: max(24, len(text) // 2)]) == domain for text in texts)
    assert right >= 380


def test_no_domain_is_granted_without_evidence() -> None:
    assert label("") == "none"
    assert label("Then it was so, and she said that") == "none"


def test_each_sentence_is_labelled_apart() -> None:
    text = "The judge dismissed the lawsuit. The chef fried the salmon. Rain fell over the coast. The pian"
    assert [domain for _, domain in label_sentences(text)] == ["legal", "food", "weather", "none"]


def test_every_domain_has_words_of_its_own() -> None:
    for domain in ALL_DOMAINS:
        own = [word for word, domains in lexicon().items() if domains == (domain,)]
        assert len(own) >= (40 if domain in ("base64", "chat") else 90), domain
