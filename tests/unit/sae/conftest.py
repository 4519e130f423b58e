"""SAEs written by SAELens itself, with random weights and nothing left at zero."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# SAELens still imports names that TransformerLens deprecates.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sae_lens import (
        SAE,
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        GatedSAE,
        GatedSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        StandardSAE,
        StandardSAEConfig,
        TopKSAE,
        TopKSAEConfig,
    )

D_IN, D_SAE = 24, 70
KINDS = {
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 5}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 5}),
}

Make = Callable[..., tuple[SAE[Any], Path]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("jumprelu", apply_b_dec_to_input=False)` → SAELens' own object, and the folder it saved."""

    def build(kind: str, **settings: Any) -> tuple[SAE[Any], Path]:
        torch.manual_seed(0)
        cls, config, extra = KINDS[kind]
        sae = cls(config(d_in=D_IN, d_sae=D_SAE, **{**extra, **settings}))
        sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.3))
                if name == "threshold":
                    parameter.abs_()
        folder = tmp_path / kind
        if kind == "batchtopk":
            sae.topk_threshold = torch.tensor(0.7, dtype=torch.double)
            sae.save_inference_model(folder)
            return SAE.load_from_disk(folder), folder
        sae.save_model(folder)
        return sae, folder

    return build


@pytest.fixture
def stream() -> torch.Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1)) * 2


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
