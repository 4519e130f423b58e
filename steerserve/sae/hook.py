"""The place an SAE or direction names in its own files: a decoder layer and a site of the residual stream."""

from __future__ import annotations

import re
from dataclasses import dataclass

from steerserve.hookpoint import Site

__all__ = ["Hook", "parse_hook"]

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post)")
_OURS = re.compile(r"(resid_pre|resid_post)\.(\d+)")
# A decoder layer of a Hugging Face model returns the stream behind it.
_HUGGING_FACE = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)")


@dataclass(frozen=True)
class Hook:
    """The residual stream before (`resid_pre`) or behind (`resid_post`) decoder layer `layer`."""

    layer: int
    site: Site

    @property
    def name(self) -> str:
        """TransformerLens' name of the place, which SAELens writes: `blocks.3.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_{self.site}"


def parse_hook(name: str) -> Hook | None:
    """The hook a checkpoint's `hook_name` means, or None where it names no residual stream.

    Reads TransformerLens' names (`blocks.3.hook_resid_post`), our own (`resid_post.3`, HookPoint.name) and
    Hugging Face's modules (`model.layers.3`, `transformer.h.3`), whose output is `resid_post`.
    """
    if match := _TRANSFORMER_LENS.fullmatch(name):
        return Hook(int(match[1]), "resid_pre" if match[2] == "resid_pre" else "resid_post")
    if match := _OURS.fullmatch(name):
        return Hook(int(match[2]), "resid_pre" if match[1] == "resid_pre" else "resid_post")
    if match := _HUGGING_FACE.fullmatch(name):
        return Hook(int(match[1]), "resid_post")
    return None
