"""A small classifier of texts, trained on the labelled ones, that says how much of a concept a text holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .texts import Text, labels_of

__all__ = ["ConceptJudge", "TextClassifier", "train_classifier"]

ConceptJudge = Callable[[Sequence[str], str], list[float]]
"""(texts, label) → how much of the label's concept each text holds, from 0 (none) to 2 (plainly there)."""

_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")
_VOCABULARY = 5000
_STEPS = 60
_L2 = 1e-4


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """Softmax regression on the words of a text (tf-idf, unit length); rare words count by their shape.

    Attributes:
        labels: the classes. words: what the columns stand for.
        idf: [V] float32. weight: [L, V] float32. bias: [L] float32.
        accuracy: on texts that it was not trained on.
    """

    labels: tuple[str, ...]
    words: dict[str, int] = field(repr=False)
    idf: Tensor = field(repr=False)
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    accuracy: float = 0.0

    def embeddings(self, texts: Sequence[str]) -> Tensor:
        """[n, V] float32 unit vectors: the words of each text by tf-idf, without the language model."""
        return _unit(_vectors(texts, self.words) * self.idf)

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """[n, L] float32."""
        return (self.embeddings(texts) @ self.weight.T + self.bias).softmax(1)

    def __call__(self, texts: Sequence[str], label: str) -> list[float]:
        """Twice the label's probability: a `ConceptJudge`."""
        found: list[float] = (2 * self.probabilities(texts)[:, self.labels.index(label)]).tolist()
        return found


def train_classifier(choose: Sequence[Text], measure: Sequence[Text]) -> TextClassifier:
    """Train on labelled texts, and measure the accuracy on others. Texts without a label are passed over."""
    labels = labels_of(choose)
    texts, truth = _labelled(choose, labels)
    words = _vocabulary(texts)
    counts = _vectors(texts, words)
    idf = ((1 + len(texts)) / (1 + (counts > 0).sum(0))).log() + 1
    weight, bias = _fit(_unit(counts * idf), truth, len(labels))
    trained = TextClassifier(labels, words, idf, weight, bias)
    held, held_truth = _labelled(measure, labels)
    right = trained.probabilities(held).argmax(1) == held_truth
    return TextClassifier(labels, words, idf, weight, bias, float(right.float().mean()))


def _labelled(texts: Sequence[Text], labels: tuple[str, ...]) -> tuple[list[str], Tensor]:
    kept = [(text, labels.index(label)) for text, label in texts if label in labels]
    return [text for text, _ in kept], torch.tensor([at for _, at in kept])


def _vocabulary(texts: Sequence[str]) -> dict[str, int]:
    """The words of at least two texts, most frequent first, and the shapes of all."""
    seen: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    for text in texts:
        found = set(_WORD.findall(text))
        seen.update(word.lower() for word in found)
        shapes.update(_shape(word) for word in found)
    words = [word for word, count in seen.most_common(_VOCABULARY) if count > 1]
    kept = dict.fromkeys([*words, *(shape for shape, count in shapes.most_common(200) if count > 1)])
    return {word: at for at, word in enumerate(kept)}


def _shape(word: str) -> str:
    """What a word looks like: `<Aa>` for a name, `<a>` for a word, `<aAaA>` for noise, `<0>` for a number."""
    kinds = ["0" if sign.isdigit() else "A" if sign.isupper() else "a" for sign in word]
    runs = [kind for at, kind in enumerate(kinds) if at == 0 or kinds[at - 1] != kind]
    return f"<{''.join(runs[:4])}>"


def _vectors(texts: Sequence[str], words: dict[str, int]) -> Tensor:
    """[n, V] float32: how often each known word occurs, or the shape of an unknown one."""
    out = torch.zeros(len(texts), len(words))
    for row, text in enumerate(texts):
        for word in _WORD.findall(text):
            at = words.get(word.lower(), words.get(_shape(word)))
            if at is not None:
                out[row, at] += 1
    return out


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit


def _fit(inputs: Tensor, truth: Tensor, labels: int) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(labels, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(labels, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = cross_entropy(inputs @ weight.T + bias, truth) + _L2 / 2 * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()
