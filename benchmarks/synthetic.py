"""A small SynthSAEBench, built by `sae_lens.synthetic`: features in hierarchies, rare and correlated ones.

SynthSAEBench-16k (arXiv:2602.14687) at a sixteenth of its features and a quarter of its width: 1,024 features
in 192 dimensions, eight trees, an SAE of 256 latents. Judged by SAELens' own metrics.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerserve.training.trainer import Trained

__all__ = ["D_IN", "D_SAE", "OurAdapter", "batches", "build_world", "judge"]

FEATURES, D_IN, D_SAE = 1024, 192, 256
_JUDGED = 50_000
_JUDGED_SEED = 1_000_003


@dataclass(frozen=True)
class OurAdapter:
    """Our SAE with the attributes that SAELens' judge asks for; takes samples in the data's own scale."""

    trained: Trained

    @property
    def W_dec(self) -> Tensor:
        return self.trained.sae.parameters["decoder"].detach()

    def eval(self) -> None:
        """Nothing changes: there is no mode of training."""

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.trained.sae.encode(x * self.trained.scale)

    @torch.no_grad()
    def decode(self, f: Tensor) -> Tensor:
        return self.trained.sae.decode(f) / self.trained.scale


def build_world(seed: int) -> Any:
    """The generator of samples. Returns: a `sae_lens.synthetic.SyntheticModel`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import synthetic
    config = synthetic.SyntheticModelConfig(
        num_features=FEATURES,
        hidden_dim=D_IN,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(
            exponent=0.5, max_prob=0.4, min_prob=5e-4
        ),
        hierarchy=synthetic.HierarchyConfig(
            total_root_nodes=8,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            mutually_exclusive_min_depth=0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=synthetic.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=seed,
    )
    with contextlib.redirect_stderr(io.StringIO()):
        return synthetic.SyntheticModel(config)


def batches(world: Any, size: int, seed: int) -> Iterator[Tensor]:
    """[size, d] without end; the same seed gives the same batches, whatever else draws random numbers."""
    state = torch.Generator().manual_seed(seed).get_state()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            batch = world.sample(size)
            state = torch.get_rng_state()
        yield batch


def judge(world: Any, sae: Any) -> dict[str, float]:
    """SAELens' `eval_sae_on_synthetic_data` on 50,000 samples that nobody was trained on."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_JUDGED_SEED)
        found = eval_sae_on_synthetic_data(
            sae, world.feature_dict, world.activation_generator, num_samples=_JUDGED, batch_size=5000
        )
    return {
        "f1": found.classification.f1_score,
        "mcc": found.mcc,
        "explained_variance": float(found.explained_variance),
        "uniqueness": found.uniqueness,
        "l0": found.sae_l0,
        "dead": found.dead_latents,
        "true_l0": found.true_l0,
    }
