"""One training step of each trainer that is compared, on the same batches: ours, SAELens', sparsify's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerserve.training.distributed import World
from steerserve.training.run import Run
from steerserve.training.settings import parse_settings

__all__ = ["ARCHITECTURES", "Size", "planted", "sides"]

ARCHITECTURES = ("topk", "batchtopk", "standard", "jumprelu", "gated", "matryoshka")
LR = 1e-4


@dataclass(frozen=True)
class Size:
    """Width d, features F, batch B and active features k."""

    d: int = 256
    features: int = 4096
    batch: int = 4096
    k: int = 32


def planted(size: Size, batches: int) -> list[Tensor]:
    """Batches [B, d] of sparse sums of F planted directions, of mean square one."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(
        torch.randn(size.features, size.d, generator=generator), dim=-1
    )
    found = []
    for _ in range(batches):
        chosen = torch.randint(size.features, (size.batch, 16), generator=generator)
        weights = torch.rand(size.batch, 16, generator=generator)
        x = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
        found.append(x / x.square().sum(-1).mean().sqrt())
    return found


def sides(size: Size, names: tuple[str, ...]) -> dict[str, Callable[[Tensor], None]]:
    """A step function of every trainer for each architecture; `ours/…@L0` starts from sparse activations.

    sparsify takes part where it is installed.
    """
    found: dict[str, Callable[[Tensor], None]] = {}
    for name in names:
        found[f"ours/{name}"] = ours(name, size)
        if name in ("standard", "gated"):
            found[f"ours/{name}@{2 * size.k}"] = ours(name, size, l0=2 * size.k)
        found[f"saelens/{name}"] = saelens(name, size)
    if "topk" in names and (theirs := sparsify(size)) is not None:
        found["sparsify/topk"] = theirs
    return found


def ours(name: str, size: Size, l0: int | None = None) -> Callable[[Tensor], None]:
    """The step that `steerserve train` makes. Args: l0: active features per token at the start."""
    values: dict[str, Any] = {
        "architecture": name,
        "d_sae": size.features,
        "batch_size": size.batch,
        "lr": LR,
    }
    if name in ("topk", "batchtopk", "matryoshka"):
        values["k"] = size.k
    settings = parse_settings({**values, "tokens": 10**9, "device": "cpu"})
    run = Run(settings, torch.zeros(size.d), 1.0, World())
    if l0 is not None:
        x = planted(size, 1)[0][:256]
        pre = x @ run.sae.parameters["encoder"].T
        run.sae.parameters["bias"].fill_(-float(pre.flatten().topk(l0 * len(x)).values[-1]))

    def step(x: Tensor) -> None:
        run.advance(x)

    return step


def saelens(name: str, size: Size) -> Callable[[Tensor], None]:
    """What SAELens' `SAETrainer._train_step` does, without its logging and its schedulers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sae_lens
        from sae_lens.saes.sae import TrainStepInput
    kinds = {
        "batchtopk": "BatchTopK",
        "gated": "Gated",
        "jumprelu": "JumpReLU",
        "matryoshka": "MatryoshkaBatchTopK",
        "standard": "Standard",
        "topk": "TopK",
    }
    options: dict[str, Any] = {"d_in": size.d, "d_sae": size.features}
    if name in ("topk", "batchtopk", "matryoshka"):
        options["k"] = size.k
    if name == "matryoshka":
        options["matryoshka_widths"] = [size.features // part for part in (16, 8, 4, 2, 1)]
    config = getattr(sae_lens, f"{kinds[name]}TrainingSAEConfig")(**options)
    sae = getattr(sae_lens, f"{kinds[name]}TrainingSAE")(config)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    coefficients = {key: c.value for key, c in sae.get_coefficients().items()}
    silent = torch.zeros(size.features)

    def step(x: Tensor) -> None:
        given = TrainStepInput(
            sae_in=x,
            coefficients=coefficients,
            dead_neuron_mask=silent > 1000,
            n_training_steps=0,
            is_logging_step=False,
        )
        out = sae.training_forward_pass(step_input=given)
        with torch.no_grad():
            fired = out.feature_acts.bool().float().sum(-2).bool()
            silent.add_(1).masked_fill_(fired.to_dense() if fired.is_sparse else fired, 0)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def sparsify(size: Size) -> Callable[[Tensor], None] | None:
    """What sparsify's `Trainer` does for one batch with Adam, or None where it is not installed."""
    # Its Triton kernels need a GPU; read when it is imported.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    try:
        from sparsify import SparseCoder, SparseCoderConfig
    except ImportError:
        return None
    sae = SparseCoder(size.d, SparseCoderConfig(num_latents=size.features, k=size.k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)
    silent = torch.zeros(size.features, dtype=torch.long)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=silent > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    return step
