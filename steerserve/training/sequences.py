"""From texts and token lists to batches of sequences that the model takes, in an order that never varies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field

from ..errors import ConfigError
from .corpus import Corpus

__all__ = ["Batch", "batches", "pieces", "token_lists"]


@dataclass
class Batch:
    """Sequences that are run at once.

    Attributes:
        first: the number of its first sequence, counted through the whole harvest.
        read: how much of the input has been read with it: bytes of a corpus, or prompts.
    """

    first: int
    read: int = 0
    sequences: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences, special ones included."""
        return sum(map(len, self.sequences))


def token_lists(
    prompts: Corpus | Iterable[list[int] | str], encode: Callable[[str], list[int]]
) -> Iterator[tuple[list[int], int]]:
    """The token ids of every prompt, and how much of the input has been read with it."""
    if isinstance(prompts, Corpus):
        yield from ((encode(text), read) for text, read in prompts)
    else:
        for number, prompt in enumerate(prompts, start=1):
            yield encode(prompt) if isinstance(prompt, str) else prompt, number


def pieces(tokens: list[int], longest: int, special: Set[int]) -> Iterator[list[int]]:
    """Cut a text into sequences of at most `longest` tokens that follow each other without overlap.

    Every piece opens with the special tokens that the text opens with (BOS, as a rule): the model was trained
    on text behind them, and without them a piece's first activations would be outliers.

    Raises: ConfigError if no token would fit behind them.
    """
    lead = next((place for place, token in enumerate(tokens) if token not in special), len(tokens))
    if len(tokens) <= longest:
        yield tokens
    elif lead >= longest:
        raise ConfigError(f"expected room for more than {lead} special tokens in a sequence of {longest}")
    else:
        room = longest - lead
        for start in range(lead, len(tokens), room):
            yield tokens[:lead] + tokens[start : start + room]


def batches(
    texts: Iterable[tuple[list[int], int]],
    *,
    longest: int,
    special: Set[int],
    max_tokens: int,
    max_sequences: int,
) -> Iterator[Batch]:
    """Group the pieces of all texts, in their order, into batches of at most so many tokens and sequences.

    Args: longest: tokens of a piece; one of more than `max_tokens` is a batch of its own. special: their ids.
    """
    batch, filled = Batch(0), 0
    for tokens, read in texts:
        for piece in pieces(tokens, longest, special) if tokens else ():
            full = filled + len(piece) > max_tokens or len(batch.sequences) == max_sequences
            if full and batch.sequences:
                yield batch
                batch, filled = Batch(batch.first + len(batch.sequences), batch.read), 0
            batch.sequences.append(piece)
            filled += len(piece)
        batch.read = read
    if batch.sequences:
        yield batch
