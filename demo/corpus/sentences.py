"""One sentence of one domain, with or without a neutral opening."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from demo.corpus.grammar import expand, load, load_with_shared, polish

DOMAINS = ("legal", "colour", "maths", "food", "music", "sport", "code", "weather", "base64", "insult")
BACKGROUND = ("narration", "chat")
ALL_DOMAINS = DOMAINS + BACKGROUND


@dataclass(frozen=True)
class Sentence:
    """``text[:neutral]`` could open a sentence of any domain; what follows is of ``domain``."""

    text: str
    domain: str
    neutral: int = 0


def plain_sentence(domain: str, rng: Random) -> Sentence:
    """A sentence that begins at once with the domain's own words."""
    table = load_with_shared(domain)
    own = table.get("sentence", ()) + table.get("line", ())
    if own and rng.random() < (0.5 if "line" in table else 0.35):
        return _own_sentence(domain, rng)
    template = rng.choice(("{clause}.", "{clause}.", "{clause}, {link} {clause}."))
    return Sentence(polish(expand(template, table, rng)), domain)


def sentence(domain: str, rng: Random) -> Sentence:
    """A sentence from the inside of a run: most begin with the domain's words, some with a shared frame."""
    if rng.random() < 0.45:
        return plain_sentence(domain, rng)
    return Sentence(polish(expand("{frame}", load_with_shared(domain), rng)), domain)


def opened_sentence(domain: str, rng: Random) -> Sentence:
    """A sentence behind an opening that is drawn without regard to the domain."""
    opening = neutral_opening(rng)
    table = load_with_shared(domain)
    if opening.endswith((".", ":")):
        rest = plain_sentence(domain, rng).text
    elif opening in _topic_opening_ends(opening):
        rest = expand("{topic}.", table, rng)
    else:
        rest = expand(rng.choice(("{clause}.", "{clause}, {link} {clause}.")), table, rng)
    text = polish(f"{opening} {rest}") if not opening.endswith((".", ":")) else f"{opening} {rest}"
    return Sentence(text, domain, len(opening))


def neutral_opening(rng: Random) -> str:
    """How a text may begin before anything shows its topic: half a sentence, or up to a colon or a stop."""
    kind = rng.choices(("{opening}", "{topic opening}", "{announce}:", "{remark}"), (50, 12, 18, 20))[0]
    return polish(expand(kind, load("shared"), rng))


def _own_sentence(domain: str, rng: Random) -> Sentence:
    table = load_with_shared(domain)
    lines = table.get("line", ())
    template = rng.choice(table.get("sentence", ()) + lines)
    text = expand(template, table, rng)
    return Sentence(text if template in lines else polish(text), domain)


def _topic_opening_ends(opening: str) -> tuple[str, ...]:
    return (opening,) if opening.endswith(load("shared")["about"]) else ()
