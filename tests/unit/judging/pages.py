"""What a browser would see of a page: its text, and everything it would have to fetch."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "hr", "input", "link"}
FETCHING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


class Page(HTMLParser):
    """Attributes: text: of the page. open: tags not closed. fetched: outside references. ids: of elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.fetched, self.tags = "", [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._look(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._look(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        self.fetched += re.findall(r"@import\s+\S+|url\((?!['\"]?#)[^)]*\)", data)

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in FETCHING and not (value or "").startswith("#"):
                self.fetched.append(f"{name}={value}")
            self.fetched += re.findall(r"url\((?!['\"]?#)[^)]*\)", value or "")
