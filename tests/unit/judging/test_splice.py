from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from steerserve.errors import ConfigError
from steerserve.judging.hooked import HookedModel
from steerserve.judging.judged import Judged
from steerserve.judging.splice import Spliced, judge_splice
from tests.support.models import BOS
from tests.support.saes import load_sae

from .conftest import LAYER, WORDS


def passed(model: Any, ids: list[int], replace: Any) -> Tensor:
    """Log-probabilities with the stream behind the layer replaced, but not at BOS: a plain hook."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        assert ids[0] == BOS
        changed = torch.cat([stream[:, :1], replace(stream[:, 1:])], dim=1)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "layer_norm"])
def test_losses_are_those_of_a_plain_hook_around_saelens_sae(
    kind: str, model: HookedModel, saes: dict[str, Judged], folders: dict[str, Path]
) -> None:
    theirs = load_sae(folders[kind])

    def reconstruct(stream: Tensor) -> Tensor:
        return theirs.decode(theirs.encode(stream[0])).unsqueeze(0)

    sums, count = torch.zeros(5, dtype=torch.float64), 0
    for text in WORDS:
        ids = model.encode(text, 99)
        target = torch.tensor(ids[2:])
        runs = [passed(model.model, ids, edit)[1:-1] for edit in (lambda s: s, reconstruct, torch.zeros_like)]
        losses = [cross_entropy(run, target, reduction="sum") for run in runs]
        divergences = [kl_div(run, runs[0], log_target=True, reduction="sum") for run in runs[1:]]
        sums += torch.stack([*losses, *divergences]).double()
        count += len(target)
    found = judge_splice(model, saes[kind], WORDS, limit=99)
    assert found.tokens == count
    ours = (found.ce_clean, found.ce_sae, found.ce_zero, found.kl_sae, found.kl_zero)
    assert ours == pytest.approx((sums / count).tolist(), rel=1e-4)


def test_the_scores_follow_their_formulas() -> None:
    found = Spliced(ce_clean=1.0, ce_sae=1.5, ce_zero=5.0, kl_sae=0.3, kl_zero=3.0, tokens=9)
    assert (found.ce_score, found.kl_score) == pytest.approx((3.5 / 4, 0.9))


def test_texts_without_a_prediction_are_refused(model: HookedModel, saes: dict[str, Judged]) -> None:
    with pytest.raises(ConfigError, match="at least two tokens"):
        judge_splice(model, saes["topk"], ["", ""], limit=99)
