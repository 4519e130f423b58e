"""A measured process from inside: it takes turns as lines of JSON on stdin and answers on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["Serve", "work"]

Serve = Callable[[dict[str, Any]], dict[str, Any]]


def work(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Serve]]) -> None:
    """Start what the first line describes, then serve one turn a line until stdin ends.

    Args: start: from the first line to what the process says of itself, and what serves a turn.
    """
    answers = _own_stdout()
    description, serve = start(json.loads(sys.stdin.readline()))
    _answer(answers, description)
    for line in sys.stdin:
        _answer(answers, serve(json.loads(line)))


def _own_stdout() -> TextIO:
    """Keep stdout for answers: whatever libraries and their processes print goes to stderr."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
