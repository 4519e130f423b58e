from __future__ import annotations

import json
from pathlib import Path

from demo.corpus.documents import Document, labelled_documents
from demo.corpus.sentences import ALL_DOMAINS
from demo.passages import passages

README = Path("sae_weights/demo/README.md")
RESULTS = Path("sae_weights/demo/results.json")


def test_a_passage_is_a_stretch_of_one_domain() -> None:
    document = Document("Well. One two. Three. Four.", [(6, 14, "food"), (15, 21, "food"), (22, 27, "code")])
    assert list(passages([document])) == [("One two. Three.", "food"), ("Four.", "code")]


def test_a_turn_of_a_chat_ends_a_passage() -> None:
    document = Document("Bread?<|assistant|>Rye. Oat.", [(0, 6, "food"), (19, 23, "food"), (24, 28, "food")])
    assert list(passages([document])) == [("Bread?", "food"), ("Rye. Oat.", "food")]


def test_passages_of_the_corpus_cover_every_domain_and_hold_no_special_token() -> None:
    found = list(passages(labelled_documents(5, 300)))
    assert {domain for _, domain in found} == set(ALL_DOMAINS)
    assert not any("<|" in text for text, _ in found)


def test_the_demo_has_a_feature_that_tells_the_passages_of_each_domain() -> None:
    found = json.loads(RESULTS.read_text())["passages"]
    good = [domain for domain, f1 in found["f1"].items() if f1 >= 0.9]
    assert len(good) >= 9
    assert found["ce_score"] >= 0.95
    page = README.read_text()
    assert all(f"**{found['f1'][domain]:.2f}** ({found['feature'][domain]})" in page for domain in good)
