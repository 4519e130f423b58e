"""A Hugging Face model with its residual stream in reach: read, replaced or added to at one hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerserve.errors import ConfigError
from steerserve.hookpoint import Site
from steerserve.sae import Hook

__all__ = ["Edit", "HookedModel", "accelerator", "decoder_layers", "load_model", "parse_site"]

_MOST_ROWS = 128
_LOGITS_AT_ONCE = 2**26
Edit = Callable[[Tensor, Tensor], Tensor]
"""(stream [B, T, d], ordinary [B, T] bool) → the stream to go on with, of the same shape."""


@dataclass(eq=False)
class HookedModel:
    """A causal language model, its tokenizer, and the hook at which it is judged.

    Special tokens (BOS, padding, the marks of a chat) are never edited and never collected: `ordinary` is
    False there.

    Attributes:
        model, tokenizer: of the transformers library.
        hook: the layer and site.
        device: where the model runs.
    """

    model: Any
    tokenizer: Any
    hook: Hook
    device: torch.device
    _seen: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.special = frozenset(int(token) for token in self.tokenizer.all_special_ids)
        self._special = torch.tensor(sorted(self.special), dtype=torch.long, device=self.device)
        layers = decoder_layers(self.model)
        if not 0 <= self.hook.layer < len(layers):
            raise ConfigError(f"expected a layer < {len(layers)}, the model's layers, got {self.hook.layer}")
        self._layer = layers[self.hook.layer]

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def pad(self) -> int:
        """What short rows of a batch are filled up with; attention never sees it."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def rows_at_once(self, longest: int) -> int:
        """How many rows of a batch to pass at once, so that their logits take at most 256 MiB."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        return max(1, min(_MOST_ROWS, _LOGITS_AT_ONCE // (longest * vocabulary)))

    def encode(self, text: str, limit: int) -> list[int]:
        """The token ids of a text with the tokenizer's own special tokens, at most `limit` of them."""
        ids: list[int] = self.tokenizer(text)["input_ids"][:limit]
        return ids

    def batch(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, [B, T] each, filled up on the right, or on the left to generate."""
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for at, row in enumerate(rows):
            place = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[at, place], mask[at, place] = torch.tensor(row, dtype=torch.long), 1
        return ids.to(self.device), mask.to(self.device)

    def ordinary(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T] bool: neither padding nor a special token."""
        return mask.bool() & ~torch.isin(ids, self._special)

    @torch.no_grad()
    def logits(self, ids: Tensor, mask: Tensor, edit: Edit | None = None) -> Tensor:
        """[B, T, V] float32, with the stream edited at the hook."""
        with self.edited(edit):
            out: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return out.float()

    @torch.no_grad()
    def stream(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T, d] float32: the residual stream at the hook. The layers behind it are not computed."""
        kept: list[Tensor] = []

        def keep(stream: Tensor, _: Tensor) -> Tensor:
            kept.append(stream.float())
            raise _Enough

        with suppress(_Enough):
            self.logits(ids, mask, keep)
        return kept[0]

    @contextmanager
    def edited(self, edit: Edit | None) -> Iterator[None]:
        """While open, every forward pass goes on with what `edit` makes of the stream at the hook."""
        if edit is None:
            yield
            return
        handles = [self.model.register_forward_pre_hook(self._note, with_kwargs=True)]
        if self.hook.site == "resid_post":
            handles.append(self._layer.register_forward_hook(self._behind(edit)))
        else:
            handles.append(self._layer.register_forward_pre_hook(self._before(edit), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def _apply(self, edit: Edit, stream: Tensor) -> Tensor:
        assert self._seen is not None
        ids = self._seen[:, -stream.shape[1] :]
        # Where a pad token is none of the special ones, its positions are edited; nothing attends to them.
        ordinary = self.ordinary(ids, torch.ones_like(ids))
        return edit(stream, ordinary).to(stream.dtype)

    def _behind(self, edit: Edit) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self._apply(edit, output[0]), *output[1:])
            return self._apply(edit, output)

        return hook

    def _before(self, edit: Edit) -> Callable[..., Any]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._apply(edit, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self._apply(edit, kwargs["hidden_states"])}

        return hook


def load_model(path: str, hook: Hook, device: torch.device | str = "cpu") -> HookedModel:
    """A causal language model in float32 (bfloat16 on an accelerator) and its tokenizer.

    Args: path: a folder, or a name that transformers knows.
    Raises: ConfigError if it cannot be loaded, or has no such layer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = torch.device(device)
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(place).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"expected a language model's folder or name, got {path!r}: {error}") from None
    return HookedModel(model, tokenizer, hook, place)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, found by structure: the first module list as long as the config says.

    Raises: ConfigError if the model has none.
    """
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and "vision" not in name:
            return module
    raise ConfigError(f"expected a model with a list of {count} decoder layers, found none")


def accelerator() -> str:
    """The device to use where none is named."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_site(name: str) -> Site:
    """A site of the residual stream from the command line.

    Raises: ConfigError if it is none.
    """
    if name not in ("resid_pre", "resid_post"):
        raise ConfigError(f"expected --hook resid_post or resid_pre, got {name!r}")
    return "resid_pre" if name == "resid_pre" else "resid_post"


class _Enough(Exception):
    """Raised behind the hook: the rest of the forward pass is not needed."""
