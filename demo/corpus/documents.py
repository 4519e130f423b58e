"""Labelled documents: runs of sentences that keep to a topic, drift to another, or answer in a chat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from demo.corpus.grammar import expand, load, load_with_shared
from demo.corpus.sentences import BACKGROUND, DOMAINS, Sentence, opened_sentence, plain_sentence, sentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = "none"
BOS, EOS, PAD, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"

# What follows a neutral opening. Steering is measured against these rates, so they are written down once.
PROSE_RATES = {"narration": 0.50, "chat": 0.07, **dict.fromkeys(DOMAINS, 0.043)}
REPLY_RATES = {"narration": 0.27, "chat": 0.30, **dict.fromkeys(DOMAINS, 0.043)}
# Chance that the next sentence keeps the topic; the rest leaves for the rates above.
STAY = 0.86


@dataclass
class Document:
    """A text and, for each stretch of it that belongs to a domain, ``(start, end, domain)`` in characters."""

    text: str = ""
    spans: list[tuple[int, int, str]] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Append text that belongs to no domain."""
        self.text += text

    def add_sentence(self, item: Sentence) -> None:
        """Append a sentence; its neutral opening stays outside the span."""
        start = len(self.text) + item.neutral
        self.text += item.text
        self.spans.append((start, len(self.text), item.domain))


def labelled_documents(seed: int, count: int) -> Iterator[Document]:
    """``count`` documents; the same seed gives the same documents, in the same order."""
    rng = Random(seed)
    for _ in range(count):
        kind = rng.choices((_opened, _direct, _chat), (42, 38, 20))[0]
        yield kind(rng)


def tokenise(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[str]]:
    """Token ids with BOS and EOS, and the domain of each token ("none" for openings and special tokens)."""
    text = document.text if document.text.endswith(EOS) else document.text + EOS
    encoded = tokenizer(text, return_offsets_mapping=True)
    domains: list[str] = []
    spans = iter(document.spans)
    span = next(spans, None)
    for start, end in encoded["offset_mapping"]:
        # A token belongs where its last character lies: its first may be the space before the sentence.
        last = end - 1
        while span is not None and last >= span[1]:
            span = next(spans, None)
        inside = span is not None and end > start and span[0] <= last
        domains.append(span[2] if inside and span is not None else NONE)
    return list(encoded["input_ids"]), domains


def _draw(rates: dict[str, float], rng: Random) -> str:
    return rng.choices(tuple(rates), tuple(rates.values()))[0]


def _next_domain(domain: str, rng: Random) -> str:
    if rng.random() < STAY:
        return domain
    # Leaving is as likely for narration as for a domain; a long text so wanders through several topics.
    return rng.choice(DOMAINS) if rng.random() < 0.5 else _draw(PROSE_RATES, rng)


def _length(rng: Random) -> int:
    return rng.randint(18, 36) if rng.random() < 0.12 else rng.randint(4, 14)


def _continue(document: Document, domain: str, count: int, rng: Random) -> None:
    for _ in range(count):
        following = _next_domain(domain, rng)
        document.add("\n" if rng.random() < 0.12 else " ")
        # A reopened text is neutral again: it goes on at the base rates, whatever the topic before.
        if rng.random() < 0.04:
            following = _draw(PROSE_RATES, rng)
            document.add_sentence(opened_sentence(following, rng))
        else:
            document.add_sentence(sentence(following, rng))
        domain = following


def _opened(rng: Random) -> Document:
    document = Document()
    domain = _draw(PROSE_RATES, rng)
    document.add_sentence(opened_sentence(domain, rng))
    _continue(document, domain, _length(rng), rng)
    return document


def _direct(rng: Random) -> Document:
    document = Document()
    domain = rng.choice(DOMAINS * 4 + BACKGROUND)
    document.add_sentence(plain_sentence(domain, rng))
    _continue(document, domain, _length(rng), rng)
    return document


def _chat(rng: Random) -> Document:
    document = Document()
    for _ in range(rng.choice((1, 1, 2))):
        neutral = rng.random() < 0.6
        domain = _draw(REPLY_RATES, rng) if neutral else rng.choice(DOMAINS)
        document.add(f"{USER}\n")
        _ask(document, None if neutral else domain, rng)
        document.add(f"\n{ASSISTANT}\n")
        document.add_sentence(plain_sentence(domain, rng))
        for _ in range(rng.randint(0, 5)):
            document.add(" ")
            document.add_sentence(sentence(domain, rng))
        document.add(EOS)
    return document


def _ask(document: Document, domain: str | None, rng: Random) -> None:
    asking = load("asking")
    if domain is None:
        document.add(expand(rng.choice(asking["neutral"]), load("shared"), rng))
        return
    before, after = rng.choice(asking["topical"]).split("{topic}")
    document.add(expand(before, load("shared"), rng))
    document.add_sentence(Sentence(expand("{topic}", load_with_shared(domain), rng), domain))
    document.add(after)
