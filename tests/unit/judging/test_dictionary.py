from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest
import torch
from sae_lens.synthetic import feature_uniqueness, mean_correlation_coefficient
from safetensors.torch import save_file

from steerserve.errors import CheckpointError
from steerserve.judging.dictionary import judge_dictionary, read_features


def rows(seed: int, count: int, width: int = 24) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("latents", [10, 16, 40])
def test_mcc_and_uniqueness_are_those_of_saelens(latents: int) -> None:
    decoder, known = rows(0, latents), rows(1, 16)
    found = judge_dictionary(decoder, known)
    assert found.mcc == pytest.approx(mean_correlation_coefficient(decoder, known), abs=1e-6)
    assert found.uniqueness == pytest.approx(feature_uniqueness(decoder, known))


def test_the_matching_is_the_best_of_all_permutations() -> None:
    decoder, known = rows(2, 5, 6), rows(3, 5, 6)
    cosine = torch.nn.functional.cosine_similarity(decoder[:, None], known[None], dim=-1).abs()
    best = max(sum(float(cosine[i, p[i]]) for i in range(5)) / 5 for p in permutations(range(5)))
    assert judge_dictionary(decoder, known).mcc == pytest.approx(best, abs=1e-6)


def test_a_dictionary_in_another_order_and_scale_is_recovered_whole() -> None:
    known = rows(4, 16)
    decoder = torch.cat([3 * known[torch.randperm(16)], rows(5, 8)])
    found = judge_dictionary(decoder, known)
    assert (found.mmcs, found.mcc) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_a_latent_that_points_the_other_way_is_no_recovery_by_mmcs() -> None:
    known = torch.eye(4)
    assert judge_dictionary(-known, known).mmcs == 0.0


def test_a_file_of_features_of_another_width_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "known.safetensors"
    save_file({"features": rows(0, 4)}, path)
    assert read_features(path, 24).shape == (4, 24)
    with pytest.raises(CheckpointError, match=r"`features` \[K, 32\]"):
        read_features(path, 32)


def test_a_planted_feature_of_length_zero_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "known.safetensors"
    save_file({"features": torch.zeros(2, 8)}, path)
    with pytest.raises(CheckpointError, match="row of zeros"):
        read_features(path, 8)
