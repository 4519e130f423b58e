"""Passages: stretches of documents that keep to one domain, as labelled texts for `steerserve eval`.

python -m demo.passages build/passages.jsonl
steerserve eval sae_weights/demo/model --sae sae_weights/demo/sae --texts build/passages.jsonl \\
    --tokens 100000 --out build/report
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from demo.corpus.documents import Document, labelled_documents

__all__ = ["fresh_passages", "passages"]

# Not the documents of the model, nor of the SAE, nor those by which its layer was chosen.
SEED = 11_000_001
# How the marks of a chat's turns begin.
SPECIAL = "<|"
DOCUMENTS = 800


def passages(documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
    """Each stretch of sentences of one domain, and the domain; neutral openings and a chat's turns end it."""
    for document in documents:
        for domain, spans in groupby(_turns(document), key=lambda span: span[2:]):
            places = list(spans)
            text = document.text[places[0][0] : places[-1][1]].strip()
            if text:
                yield text, domain[0]


def _turns(document: Document) -> Iterator[tuple[int, int, str, int]]:
    """The document's spans, each with the number of the turn that it stands in."""
    end = turn = 0
    for start, stop, domain in document.spans:
        turn += SPECIAL in document.text[end:start]
        end = stop
        yield start, stop, domain, turn


def fresh_passages() -> list[tuple[str, str]]:
    """Passages that nothing was trained or chosen on."""
    return list(passages(labelled_documents(SEED, DOCUMENTS)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the JSONL file that is written")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found = fresh_passages()
    lines = [json.dumps({"text": text, "label": domain}) for text, domain in found]
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{given.out}: {len(found):,} passages")


if __name__ == "__main__":
    main()
