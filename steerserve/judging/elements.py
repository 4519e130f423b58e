"""The pieces that the report's page is put together from."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["bold", "figure", "number", "percent", "table"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. Args: head: plain text. rows: HTML; a cell that begins with `<td` stands as it is."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def figure(picture: str, caption: str) -> str:
    """A picture with its caption. Args: picture: SVG. caption: plain text."""
    return f'<figure class="card">{picture}<figcaption>{escape(caption)}</figcaption></figure>'


def number(value: float | None, digits: int) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def bold(value: float | None, digits: int) -> str:
    """A number that matters most in its row."""
    return f"<b>{number(value, digits)}</b>"


def percent(value: float) -> str:
    """A share, with one decimal."""
    return f"{100 * value:.1f} %"


def _cell(cell: str) -> str:
    return cell if cell.startswith("<td") else f"<td>{cell}</td>"
