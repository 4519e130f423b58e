"""Texts with labels, and the table of their tokens' activations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from steerserve.errors import ConfigError
from steerserve.training.shards import ShardReader

from .hooked import HookedModel

__all__ = [
    "Text",
    "TokenTable",
    "check_new",
    "collect",
    "from_shards",
    "labels_of",
    "read_labelled",
    "read_prompts",
    "split",
]

BATCH = 16
Text = tuple[str, str | None]
"""A text and its label, None where it has none."""


@dataclass(frozen=True, eq=False)
class TokenTable:
    """The ordinary tokens of labelled texts.

    Attributes:
        x: [n, d] float32, the residual stream.
        text: [n] int64, which text each token is of.
        label: [n] int64, which label its text has.
        labels: the labels' names.
        texts: how many texts there are.
    """

    x: Tensor
    text: Tensor
    label: Tensor
    labels: tuple[str, ...]
    texts: int

    def truth(self) -> Tensor:
        """[n, L] bool."""
        return torch.nn.functional.one_hot(self.label, len(self.labels)).bool()

    def text_label(self) -> Tensor:
        """[T] int64: each text's label; −1 for a text without a token."""
        out = torch.full((self.texts,), -1, dtype=torch.long)
        out[self.text] = self.label
        return out

    def divided(self, share: float, seed: int) -> tuple[TokenTable, TokenTable]:
        """1 − share of the texts to choose by, and `share` to measure on; see `split`."""
        generator = torch.Generator().manual_seed(seed)
        own = self.text_label()
        measures = torch.zeros(self.texts, dtype=torch.bool)
        for at in range(len(self.labels)):
            texts = (own == at).nonzero()[:, 0]
            held = min(max(round(len(texts) * share), 1), len(texts) - 1) if len(texts) > 1 else 0
            measures[texts[torch.randperm(len(texts), generator=generator)[:held]]] = True
        first, second = (self._of(side) for side in (~measures[self.text], measures[self.text]))
        return first, second

    def _of(self, tokens: Tensor) -> TokenTable:
        return TokenTable(self.x[tokens], self.text[tokens], self.label[tokens], self.labels, self.texts)

    def pooled(self) -> Tensor:
        """[T, d] float32: each text's mean activation."""
        total = torch.zeros(self.texts, self.x.shape[1]).index_add_(0, self.text, self.x)
        return total / torch.bincount(self.text, minlength=self.texts).clamp(min=1).unsqueeze(1)


def read_labelled(path: Path, *, labelled: bool) -> list[Text]:
    """Texts of a JSONL file: `text`, and `label` beside it.

    Args: labelled: whether every text must have a label, and at least two labels must occur.
    Raises: ConfigError naming the file and line that is not what it should be.
    """
    if not path.is_file():
        raise ConfigError(f"expected a JSONL file of texts, found none at {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [_read(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    texts = [item for item in found if item[0]]
    if not texts:
        raise ConfigError(f"expected texts, found none in {path}")
    if labelled:
        for number, (_, label) in enumerate(found, 1):
            if label is None:
                raise ConfigError(f"expected a string `label` beside `text` - at text {number} of {path}")
        if len(labels_of(texts)) < 2:
            raise ConfigError(f"expected at least two different labels in {path}, got {labels_of(texts)}")
    return texts


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, a line each, or of a .jsonl file with `text`.

    Raises: ConfigError if there are none, or a line is not what it should be.
    """
    if path.suffix == ".jsonl":
        return [text for text, _ in read_labelled(path, labelled=False)]
    if not path.is_file():
        raise ConfigError(f"expected a file of prompts, found none at {path}")
    prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"expected prompts, found none in {path}")
    return prompts


def check_new(out: Path) -> None:
    """Raises: ConfigError unless `out` is a folder that is empty or does not exist yet."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"expected a new or empty folder to write, {out} is in use")


def labels_of(texts: Sequence[Text]) -> tuple[str, ...]:
    """The labels that occur, sorted."""
    return tuple(sorted({label for _, label in texts if label is not None}))


def split(texts: Sequence[Text], share: float, seed: int) -> tuple[list[Text], list[Text]]:
    """Shuffle and divide, each label by itself, so that both parts hold every label that has two texts.

    Returns: 1 − share of the texts to choose by, and `share` to measure on.
    """
    rng = Random(seed)
    first: list[Text] = []
    second: list[Text] = []
    for label in (*labels_of(texts), None):
        own = [item for item in texts if item[1] == label]
        rng.shuffle(own)
        held = min(max(round(len(own) * share), 1), len(own) - 1) if len(own) > 1 else 0
        first += own[held:]
        second += own[:held]
    # In an order that has every label early: a budget of tokens is then no budget of labels.
    rng.shuffle(first)
    rng.shuffle(second)
    return first, second


def collect(
    model: HookedModel,
    texts: Sequence[Text],
    labels: Sequence[str],
    *,
    limit: int,
    tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenTable:
    """Run the model over texts, and keep the stream of their ordinary tokens.

    Args:
        labels: the names that label numbers count through; texts without a label count as 0.
        limit: tokens of one text. tokens: ends after the text in which this many are reached.
        progress: told how many texts each batch had.
    Returns: the tokens, by texts of like length; texts keep their numbers.
    """
    rows: list[list[int]] = []
    count = 0
    for text, _ in texts:
        if tokens is not None and count >= tokens:
            break
        rows.append(model.encode(text, limit))
        count += sum(token not in model.special for token in rows[-1])
    streams: list[Tensor] = []
    owners: list[Tensor] = []
    # Texts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    for start in range(0, len(order), BATCH):
        part = torch.tensor(order[start : start + BATCH])
        ids, mask = model.batch([rows[at] for at in part.tolist()])
        kept = model.ordinary(ids, mask)
        streams.append(model.stream(ids, mask)[kept].cpu())
        owners.append(part[kept.nonzero()[:, 0].cpu()])
        if progress is not None:
            progress(len(part))
    text_of = torch.cat(owners)
    return TokenTable(torch.cat(streams), text_of, _numbers(texts, labels)[text_of], tuple(labels), len(rows))


def from_shards(reader: ShardReader, texts: Sequence[Text], labels: Sequence[str]) -> TokenTable:
    """The tokens of a harvest of exactly these texts, by the sequence numbers that it recorded.

    Raises: ConfigError if the harvest holds a sequence beyond the texts.
    """
    rows = reader[0 : len(reader)]
    text = rows.sequence.long()
    if len(text) and int(text.max()) >= len(texts):
        raise ConfigError(
            f"expected a harvest of the {len(texts)} labelled texts, "
            f"found sequence {int(text.max())} in {reader.folder}"
        )
    label = _numbers(texts, labels)[text]
    return TokenTable(rows.activations.float(), text, label, tuple(labels), len(texts))


def _numbers(texts: Sequence[Text], labels: Sequence[str]) -> Tensor:
    """[T] int64: each text's label by number, 0 where it has none."""
    number = {label: at for at, label in enumerate(labels)}
    return torch.tensor([0 if label is None else number[label] for _, label in texts])


def _read(line: str, path: Path, number: int) -> Text:
    try:
        item = json.loads(line)
        text, label = item["text"], item.get("label")
    except (ValueError, KeyError, TypeError, AttributeError):
        text, label = None, None
    if not isinstance(text, str) or not isinstance(label, str | None):
        message = "expected a JSON object with a string `text` and, if any, a string `label`"
        raise ConfigError(f"{message} - at line {number} of {path}")
    return text, label
