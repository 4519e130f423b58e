"""One small SAE of every layout, with what it computes by the formula that its authors publish.

Each function writes files with random weights, nothing left at zero, and returns features and reconstruction
of `x` in plain torch, from the tensors as they are named and shaped on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from steerserve.sae import Sae, open_sae
from steerserve.sae.resident import Resident
from tests.support.saes import make_sae

D_IN, D_SAE, K = 12, 40, 5


@dataclass(frozen=True)
class Written:
    """An SAE on disk, and what it makes of x: features f [n, F] and reconstruction out [n, d]."""

    path: Path
    x: Tensor
    f: Tensor
    out: Tensor

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def stream(seed: int = 1) -> Tensor:
    return torch.randn(50, D_IN, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def top_k(pre: Tensor, k: int = K) -> Tensor:
    values, indices = torch.relu(pre).topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values)


def jump_relu(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.relu(pre) * (pre > threshold)


def write_json(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def write_torch(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def check(written: Written) -> Sae:
    """Open it, and hold every way of computing features and reconstruction to the formula's."""
    sae = open_sae(written.path)
    assert sae.refusal is None
    assert (written.f > 0).any()
    assert (written.f == 0).any()
    ours = Resident.of(sae)
    encoded = ours.encode(written.x)
    assert torch.equal(encoded.f > 0, written.f > 0)
    close(encoded.f, written.f)
    close(ours.decode(encoded.f, encoded), written.out)
    if sae.normalisation == "none" and sae.router is None and sae.encoder is None:
        close(sae.encode(written.x), written.f)
        close(sae.decode(written.f), written.out)
    if sae.per_feature:
        features = [7, 0, D_SAE - 1]
        close(sae.rows(features).activations(written.x), written.f[:, features])
    return sae


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-6 * max(1.0, float(expected.abs().max())), rtol=1e-5)


def saelens(folder: Path) -> Written:
    from tests.support.saes import load_sae

    make_sae(folder, "jumprelu", 3, d_in=D_IN, d_sae=D_SAE)
    theirs, x = load_sae(folder), stream()
    f = theirs.encode(x).detach()
    return Written(folder, x, f, theirs.decode(f).detach())


def sparsify(folder: Path, **settings: Any) -> Written:
    shapes = {
        "encoder.weight": (D_SAE, D_IN),
        "encoder.bias": (D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
    }
    t, folder = random_tensors(shapes), folder / "layers.3"
    write_safetensors(folder / "sae.safetensors", t)
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
    }
    write_json(folder / "cfg.json", {**config, "transcode": False, "d_in": D_IN, **settings})
    x = stream()
    f = top_k((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    return Written(folder, x, f, f @ t["W_dec"] + t["b_dec"])


def trainer(folder: Path, dict_class: str, **settings: Any) -> None:
    values = {
        "dict_class": dict_class,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": 3,
        "lm_name": "tiny",
    }
    write_json(folder / "config.json", {"trainer": {**values, "submodule_name": None, **settings}})


def dictionary_learning(folder: Path) -> Written:
    """BatchTopK: the two-matrix form with one threshold for all."""
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)}
    t = random_tensors({**shapes, "b_dec": (D_IN,)})
    numbers = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.7)}
    write_torch(folder / "ae.pt", {**t, **numbers})
    trainer(folder, "BatchTopKSAE", k=K)
    x = stream()
    f = jump_relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"], 0.7)
    return Written(folder, x, f, f @ t["decoder.weight"].T + t["b_dec"])


def gemma_scope(folder: Path) -> Written:
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    t = random_tensors({**shapes, "threshold": (D_SAE,)})
    t["threshold"].abs_()
    folder = folder / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: part.numpy() for name, part in t.items()})
    x = stream()
    f = jump_relu(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    return Written(folder, x, f, f @ t["W_dec"] + t["b_dec"])


def gemma_scope_2(folder: Path, **settings: Any) -> Written:
    shapes = {"w_enc": (D_IN, D_SAE), "w_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    t = random_tensors({**shapes, "threshold": (D_SAE,)})
    t["threshold"].abs_()
    write_safetensors(folder / "params.safetensors", t)
    hook = "model.layers.3.output"
    config = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": D_SAE, "model_name": "tiny"}
    write_json(folder / "config.json", {**config, "architecture": "jump_relu", "l0": 60, **settings})
    x = stream()
    f = jump_relu(x @ t["w_enc"] + t["b_enc"], t["threshold"])
    return Written(folder, x, f, f @ t["w_dec"] + t["b_dec"])


def llama_scope(folder: Path, norm_in: float = 6.3125, norm_out: float = 6.3125, **settings: Any) -> Written:
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "decoder.weight": (D_IN, D_SAE)}
    t = random_tensors({**shapes, "decoder.bias": (D_IN,)})
    write_safetensors(folder / "checkpoints" / "final.safetensors", t)
    hook = "blocks.3.hook_resid_post"
    config = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "jump_relu_threshold": 0.52,
        "act_fn": "jumprelu",
        "model_name": "tiny",
    }
    config |= {"dataset_average_activation_norm": {"in": norm_in, "out": norm_out}, "use_decoder_bias": True}
    config |= {"sparsity_include_decoder_norm": True, "norm_activation": "dataset-wise"}
    config |= {"hook_point_in": hook, "hook_point_out": hook}
    write_json(folder / "hyperparams.json", {**config, **settings})
    x = stream()
    s_in, s_out = math.sqrt(D_IN) / norm_in, math.sqrt(D_IN) / norm_out
    threshold = 0.52 * s_in / (t["decoder.weight"].T * s_in / s_out).norm(dim=1)
    f = jump_relu((s_in * x) @ t["encoder.weight"].T + t["encoder.bias"], threshold)
    return Written(folder, x, f, (f @ t["decoder.weight"].T + t["decoder.bias"]) / s_out)


def openmoss(folder: Path, norm: float = 5.5, **settings: Any) -> Written:
    log_threshold, hook = "activation_function.log_jumprelu_threshold", "blocks.3.hook_resid_post"
    shapes = {
        "W_E": (D_IN, D_SAE),
        "b_E": (D_SAE,),
        "W_D": (D_SAE, D_IN),
        "b_D": (D_IN,),
        log_threshold: (D_SAE,),
    }
    t = random_tensors(shapes)
    write_safetensors(
        folder / "sae_weights.safetensors",
        {**t, f"dataset_average_activation_norm.{hook}": torch.tensor(norm)},
    )
    config = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "act_fn": "jumprelu"}
    config |= {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "model_name": "tiny"}
    write_json(folder / "config.json", {**config, "hook_point_in": hook, "hook_point_out": hook, **settings})
    x, s = stream(), math.sqrt(D_IN) / norm
    pre, norms = (s * x) @ t["W_E"] + t["b_E"], t["W_D"].norm(dim=1)
    f = jump_relu(pre * norms, t[log_threshold].exp()) / norms
    return Written(folder, x, f, (f @ t["W_D"] + t["b_D"]) / s)


def openai(folder: Path, **values: Any) -> Written:
    shapes = {"pre_bias": (D_IN,), "encoder.weight": (D_SAE, D_IN), "latent_bias": (D_SAE,)}
    t = random_tensors({**shapes, "decoder.weight": (D_IN, D_SAE)})
    activation = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    statistics = {"stats_last_nonzero": torch.arange(D_SAE), "latents_mean_square": torch.ones(D_SAE)}
    path = folder / "resid_post_mlp_v5_32k" / "autoencoders" / "3.pt"
    write_torch(path, {**t, **statistics, **activation, **values})
    x = stream()
    mu = x.mean(dim=-1, keepdim=True)
    std = (x - mu).square().sum(dim=-1, keepdim=True).div(D_IN - 1).sqrt()
    f = top_k(((x - mu) / (std + 1e-5) - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"])
    return Written(path, x, f, (f @ t["decoder.weight"].T + t["pre_bias"]) * std + mu)


def qwen_scope(folder: Path, name: str = f"SAE-Res-Qwen3-1.7B-Base-L0_{K}") -> Written:
    shapes = {"W_enc": (D_SAE, D_IN), "W_dec": (D_IN, D_SAE), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    t = random_tensors(shapes)
    path = write_torch(folder / name / "layer3.sae.pt", t)
    x = stream()
    f = top_k(x @ t["W_enc"].T + t["b_enc"])
    return Written(path, x, f, f @ t["W_dec"].T + t["b_dec"])


def goodfire(folder: Path) -> Written:
    shapes = {"encoder_linear.weight": (D_SAE, D_IN), "encoder_linear.bias": (D_SAE,)}
    t = random_tensors({**shapes, "decoder_linear.weight": (D_IN, D_SAE), "decoder_linear.bias": (D_IN,)})
    path = write_torch(folder / "Llama-3.1-8B-Instruct-SAE-l3.pth", t)
    x = stream()
    f = torch.relu(x @ t["encoder_linear.weight"].T + t["encoder_linear.bias"])
    return Written(path, x, f, f @ t["decoder_linear.weight"].T + t["decoder_linear.bias"])


LAYOUTS: dict[str, Callable[[Path], Written]] = {
    "Gemma Scope": gemma_scope,
    "Gemma Scope 2": gemma_scope_2,
    "Goodfire": goodfire,
    "Llama Scope": llama_scope,
    "OpenAI": openai,
    "OpenMOSS": openmoss,
    "Qwen-Scope": qwen_scope,
    "SAELens": saelens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}
