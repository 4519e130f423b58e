from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens.evals import ExplainedVarianceCalculator

from steerserve.judging.judged import Judged
from steerserve.judging.reconstruction import density_histogram, judge_reconstruction
from tests.support.saes import load_sae, make_switch


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "standard", "layer_norm"])
def test_the_numbers_are_those_of_saelens_own_encode_and_decode(
    kind: str, saes: dict[str, Judged], folders: dict[str, Path], stream: torch.Tensor
) -> None:
    theirs = load_sae(folders[kind])
    with torch.no_grad():
        f = theirs.encode(stream)
        back = theirs.decode(f)
    calculator = ExplainedVarianceCalculator()
    calculator.add_batch(back, stream)
    found = judge_reconstruction(saes[kind], [stream[:7], stream[7:]])
    assert found.evaluation.explained_variance == pytest.approx(calculator.compute(), abs=1e-5)
    error, square = (stream - back).square().sum().item(), stream.square().sum().item()
    assert found.evaluation.r2 == pytest.approx(1 - error / square, abs=1e-5)
    assert found.evaluation.l0 == pytest.approx(float((f > 0).sum(1).float().mean()))
    rate = (f > 0).float().mean(0)
    assert found.dense_share == pytest.approx(float((rate > 0.1).float().mean()))


def test_a_switch_is_decoded_with_its_routers_probability(tmp_path: Path, stream: torch.Tensor) -> None:
    from steerserve.judging.judged import open_judged

    folder = make_switch(tmp_path / "switch", 1)
    weights = torch.load(folder / "ae.pt", weights_only=True)
    judged = open_judged(folder)
    p = ((stream - weights["b_router"]) @ weights["router.weight"].T).softmax(-1)
    pre = ((stream - weights["b_dec"]) @ weights["encoder.weight"].T).relu().view(len(stream), 4, -1)
    own = pre[torch.arange(len(stream)), p.argmax(1)]
    top = own.topk(8)
    f = torch.zeros_like(own).scatter_(1, top.indices, top.values)
    rows = weights["decoder"].view(4, -1, 64)[p.argmax(1)]
    back = p.amax(1, keepdim=True) * torch.einsum("nf,nfd->nd", f, rows) + weights["b_dec"]
    torch.testing.assert_close(judged.reconstruct(stream), back, atol=1e-4, rtol=1e-4)
    found = judge_reconstruction(judged, [stream])
    assert found.evaluation.r2 == pytest.approx(
        1 - float((stream - back).square().sum() / stream.square().sum()), abs=1e-5
    )


def test_the_histogram_is_numpys_of_the_live_features() -> None:
    rate = torch.tensor([0.0, 0.001, 0.0011, 0.02, 0.3, 1.0])
    found = density_histogram(rate, 2000)
    counts, edges = np.histogram(np.log10(rate[1:].double().numpy()), bins=np.array(found.edges))
    assert found.counts == counts.tolist()
    assert found.edges == edges.tolist()
    assert (found.edges[0], found.edges[-1], sum(found.counts)) == (-4, 0, 5)
