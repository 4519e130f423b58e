from __future__ import annotations

import pytest
import torch

from steerserve.judging.classifier import train_classifier
from steerserve.judging.texts import Text, split


def test_the_demos_domains_are_told_apart_on_texts_not_trained_on(labelled: list[Text]) -> None:
    classifier = train_classifier(*split(labelled, 0.5, 0))
    assert classifier.labels == ("code", "food", "legal", "music")
    assert classifier.accuracy > 0.9
    scores = classifier(["The chef roasted the chicken with garlic.", "def parse(buffer): return"], "food")
    assert scores[0] > 1.0 > scores[1]


def test_probabilities_sum_to_one_and_embeddings_have_unit_length(labelled: list[Text]) -> None:
    classifier = train_classifier(labelled, labelled)
    texts = [text for text, _ in labelled[:9]]
    torch.testing.assert_close(classifier.probabilities(texts).sum(1), torch.ones(9))
    torch.testing.assert_close(classifier.embeddings(texts).norm(dim=1), torch.ones(9))


def test_noise_is_known_by_its_shape() -> None:
    noise = ["aGVsbG8gd29ybGQ xYzKq", "bWVldCBhdAzz QrTyU", "c2lsdmVyIG1vb24 LmNoP", "ZxCvB aSdFg qWeRtY"]
    words = ["the man went home", "a cat sat there", "the dog ran home", "a man sat there"]
    texts: list[Text] = [(text, "noise") for text in noise] + [(text, "words") for text in words]
    classifier = train_classifier(texts, texts)
    assert classifier(["KjHgF dSaPoI"], "noise")[0] > 1.0
    assert classifier([""], "noise")[0] == pytest.approx(1.0, abs=0.5)
