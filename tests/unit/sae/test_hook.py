from __future__ import annotations

import pytest

from steerserve.sae import Hook, parse_hook


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("blocks.3.hook_resid_post", Hook(3, "resid_post")),
        ("blocks.0.hook_resid_pre", Hook(0, "resid_pre")),
        ("resid_pre.0", Hook(0, "resid_pre")),
        ("resid_post.11", Hook(11, "resid_post")),
        ("model.layers.12", Hook(12, "resid_post")),
        ("layers.12", Hook(12, "resid_post")),
        ("transformer.h.7", Hook(7, "resid_post")),
        ("blocks.3.hook_resid_mid", None),
        ("blocks.3.hook_mlp_out", None),
        ("blocks.3.attn.hook_z", None),
        ("model.layers.3.mlp", None),
        ("hook_embed", None),
        ("", None),
    ],
)
def test_a_hook_name_means_a_layer_and_a_site_or_nothing(name: str, hook: Hook | None) -> None:
    assert parse_hook(name) == hook


def test_a_hook_is_named_as_transformer_lens_names_it() -> None:
    assert parse_hook(Hook(3, "resid_pre").name) == Hook(3, "resid_pre")
