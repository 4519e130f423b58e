from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from steerserve.errors import ConfigError
from steerserve.hookpoint import Site
from steerserve.judging.hooked import HookedModel, decoder_layers, load_model, parse_site
from steerserve.sae import Hook
from tests.support.models import CONFIGS, N_LAYERS, make_model


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize(("site", "behind"), [("resid_post", 1), ("resid_pre", 0)])
def test_the_stream_is_transformers_hidden_state(
    family: str, site: Site, behind: int, tmp_path: Path
) -> None:
    hooked = load_model(str(make_model(tmp_path, family)), Hook(1, site))
    ids, mask = hooked.batch([hooked.encode("w5 w9 w30 w8", 99), hooked.encode("w7 w8", 99)])
    with torch.no_grad():
        states = hooked.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    kept = mask.bool()
    torch.testing.assert_close(hooked.stream(ids, mask)[kept], states[1 + behind][kept])


def test_an_edit_changes_ordinary_tokens_only_and_ends_with_the_pass(model: HookedModel) -> None:
    ids, mask = model.batch([model.encode("w5 w9 w30", 99), model.encode("w8", 99)])
    seen: list[torch.Tensor] = []

    def edit(stream: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
        seen.append(ordinary)
        return torch.where(ordinary.unsqueeze(-1), stream + 1.0, stream)

    plain = model.logits(ids, mask)
    edited = model.logits(ids, mask, edit)
    assert seen[0].tolist() == [[False, True, True, True], [False, True, False, False]]
    torch.testing.assert_close(edited[:, 0], plain[:, 0])
    assert not torch.allclose(edited[0, 1:], plain[0, 1:])
    torch.testing.assert_close(model.logits(ids, mask), plain)


def test_hooks_are_taken_off_after_a_failure(model: HookedModel) -> None:
    ids, mask = model.batch([[0, 5, 9]])
    with pytest.raises(ZeroDivisionError):
        model.logits(ids, mask, lambda stream, _: stream * (1 // 0))
    assert model.logits(ids, mask).isfinite().all()


def test_a_layer_beyond_the_models_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match=f"layer < {N_LAYERS}, the model's layers, got 9"):
        load_model(str(llama), Hook(9, "resid_post"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a language model's folder"):
        load_model(str(tmp_path), Hook(0, "resid_post"))


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    plain.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))
    with pytest.raises(ConfigError, match="list of 3 decoder layers"):
        decoder_layers(plain)


def test_a_site_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="resid_post or resid_pre, got 'mlp_out'"):
        parse_site("mlp_out")
