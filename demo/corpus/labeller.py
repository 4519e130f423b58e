"""Which domain a text belongs to, by evidence read from the grammar's own tables."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from demo.corpus.grammar import BASE64_TEXT, SLOT, load
from demo.corpus.sentences import ALL_DOMAINS

NONE = "none"
WORD = re.compile(r"[A-Za-z]+|[^\sA-Za-z0-9]")
SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+|\n+")
# A word that more domains than this use says nothing.
MOST_DOMAINS = 3


def label(text: str) -> str:
    """The domain with the most evidence in ``text``; "none" where there is no evidence at all.

    A word counts 1 for the only domain whose tables hold it, and is shared out among two or three.
    A cut-off last word simply finds no entry.
    """
    scores = evidence(text)
    if not scores:
        return NONE
    # Ties fall to the order of ALL_DOMAINS, so that the answer never depends on dictionary order.
    return max(ALL_DOMAINS, key=lambda domain: scores[domain])


def label_sentences(text: str) -> list[tuple[str, str]]:
    """Each sentence of ``text`` with its label; the last one may be cut off."""
    return [(part, label(part)) for part in SENTENCE_END.split(text) if part.strip()]


def evidence(text: str) -> Counter[str]:
    """The score of each domain that ``text`` holds evidence for."""
    scores: Counter[str] = Counter()
    scores["base64"] += 2 * len(BASE64_TEXT.findall(text))
    known = lexicon()
    for word in WORD.findall(BASE64_TEXT.sub(" ", text)):
        for domain in known.get(word.lower(), ()):
            scores[domain] += 1 / len(known[word.lower()])  # type: ignore[assignment]
    return +scores


@cache
def lexicon() -> dict[str, tuple[str, ...]]:
    """Each telling word or sign and the domains whose tables hold it."""
    holders: dict[str, set[str]] = {}
    for domain in ALL_DOMAINS:
        for word in _words(domain):
            holders.setdefault(word, set()).add(domain)
    neutral = _words("shared") | _words("asking")
    return {
        word: tuple(sorted(domains))
        for word, domains in holders.items()
        if word not in neutral and len(domains) <= MOST_DOMAINS
    }


def _words(name: str) -> set[str]:
    table = load(name)
    # What is encoded in base64 never shows as plain words.
    alternatives = (text for slot, texts in table.items() if slot != "plaintext" for text in texts)
    return {word.lower() for text in alternatives for word in WORD.findall(SLOT.sub(" ", text))}
