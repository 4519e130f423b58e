"""Measure what the cards promise, on samples that chose nothing, and write the table into the demo's README.

python -m demo.evaluate
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from demo.cards import FEATURES, read_cards
from demo.choose import ablation, clamp
from demo.corpus.sentences import DOMAINS
from demo.passages import fresh_passages
from demo.prompts import DOMAIN_PROMPTS, NEUTRAL_PROMPTS
from demo.steer import TEMPERATURE, TOKENS, Ask, Steered, asks, prepare_environment, share
from steerserve.judging.judged import open_judged
from steerserve.judging.run import judge_all
from steerserve.judging.settings import JudgeSettings
from steerserve.judging.verdict import Material
from steerserve.sae import open_sae

__all__ = ["Detected", "Measured", "detect", "measure", "write_results"]

SAMPLES = 4
BASE_SAMPLES = 16
# Other random numbers than those by which the cards were chosen.
FRESH = 1_000_000


@dataclass(frozen=True)
class Measured:
    """Shares of one domain among continuations, and how surprising they are to the unsteered model.

    Attributes:
        base, clamped: share on neutral prompts, unsteered and with the domain's feature clamped.
        before, ablated: share on the domain's own prompts, unsteered and with its features ablated.
        surprise: mean nats per token of the clamped text under the unsteered model.
    """

    base: float
    clamped: float
    before: float
    ablated: float
    surprise: float


def measure(demo: Path) -> tuple[dict[str, Measured], float]:
    """Every domain's shares, and the surprise of unsteered text, in nats per token."""
    cards = read_cards(demo)
    with Steered(demo / "model", demo / "sae") as steered:
        plain = _fresh(asks(NEUTRAL_PROMPTS, samples=BASE_SAMPLES))
        base = steered.texts(plain)
        usual = steered.surprise(plain, base)
        found = {
            domain: _measure_one(steered, domain, cards[domain], share(base, domain)) for domain in DOMAINS
        }
    return found, usual


@dataclass(frozen=True)
class Detected:
    """How well single features tell a domain's passages from all others, judged as `steerserve eval` does.

    Attributes:
        passages: how many were judged, half of them to choose on. ce_score: of the SAE, on some of them.
        feature, f1: of each domain: the feature whose mean over a passage tells it best, and its held-out F1.
    """

    passages: int
    ce_score: float
    feature: dict[str, int]
    f1: dict[str, float]


def detect(demo: Path) -> Detected:
    """Judge the SAE on passages that nothing was trained or chosen on."""
    texts = fresh_passages()
    material = Material(str(demo / "model"), texts=texts)
    settings = JudgeSettings(tokens=100_000)
    verdict = judge_all([open_judged(demo / "sae", "demo", "cpu")], material, settings).verdicts[0]
    assert verdict.labelled is not None
    assert verdict.spliced is not None
    concepts = {concept.label: concept for concept in verdict.labelled.concepts}
    return Detected(
        len(texts),
        verdict.spliced.ce_score,
        {domain: concepts[domain].text_feature for domain in DOMAINS},
        {domain: concepts[domain].latent_text.f1 for domain in DOMAINS},
    )


def write_results(demo: Path) -> None:
    """Write `README.md` and `results.json` beside the assets."""
    found, usual = measure(demo)
    detected = detect(demo)
    rows = {domain: vars(measured) for domain, measured in found.items()}
    results = {"unsteered_surprise": usual, "domains": rows, "passages": vars(detected)}
    (demo / "results.json").write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    (demo / "README.md").write_text(_readme(demo, found, usual, detected), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("sae_weights/demo"), help="folder of the assets")
    given = parser.parse_args()
    prepare_environment()
    write_results(given.demo)
    print((given.demo / "README.md").read_text(encoding="utf-8"))


def _fresh(wanted: list[Ask]) -> list[Ask]:
    return [replace(ask, seed=ask.seed + FRESH) for ask in wanted]


def _measure_one(steered: Steered, domain: str, card: dict[str, Any], base: float) -> Measured:
    held = clamp(card["feature"], card["clamp"]["value"])
    clamped = _fresh(asks(NEUTRAL_PROMPTS, held, samples=SAMPLES))
    texts = steered.texts(clamped)
    own = 2 * SAMPLES
    shares = steered.shares(
        {
            "before": (domain, _fresh(asks(DOMAIN_PROMPTS[domain], samples=own))),
            "ablated": (domain, _fresh(asks(DOMAIN_PROMPTS[domain], ablation(card["ablate"]), samples=own))),
        }
    )
    return Measured(
        base, share(texts, domain), shares["before"], shares["ablated"], steered.surprise(clamped, texts)
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _readme(demo: Path, found: dict[str, Measured], usual: float, detected: Detected) -> str:
    cards = read_cards(demo)
    sae = open_sae(demo / "sae")
    assert sae.manifest is not None
    assert sae.hook is not None
    summary = sae.manifest.training
    files = (path for part in ("model", "sae") for path in (demo / part).iterdir())
    size = sum(path.stat().st_size for path in files) / 2**20
    return TEMPLATE.format(
        size=f"{size:.0f}",
        hook=sae.hook.name,
        d_sae=sae.d_sae,
        ev=f"{summary['explained_variance']:.3f}",
        r2=f"{summary['r2']:.3f}",
        l0=f"{summary['l0']:.1f}",
        dead=f"{summary['dead_fraction']:.1%}",
        neutral=len(NEUTRAL_PROMPTS),
        samples=SAMPLES,
        base_samples=BASE_SAMPLES,
        own=len(DOMAIN_PROMPTS["legal"]),
        own_samples=2 * SAMPLES,
        tokens=TOKENS,
        temperature=TEMPERATURE,
        usual=f"{usual:.2f}",
        features=FEATURES,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        rows="\n".join(_row(domain, cards[domain], found[domain], detected) for domain in DOMAINS),
        passages=f"{detected.passages:,}",
        ce_score=f"{detected.ce_score:.3f}",
    )


def _row(domain: str, card: dict[str, Any], measured: Measured, detected: Detected) -> str:
    first = card["features"][0]
    best = max(card["features"], key=lambda item: float(item["f1"]))
    cells = [
        domain,
        f"**{detected.f1[domain]:.2f}** ({detected.feature[domain]})",
        str(card["feature"]),
        f"{first['f1']:.2f}",
        f"{best['f1']:.2f} ({best['feature']})",
        f"{card['clamp']['value']:g} × max",
        f"{measured.base:.0%}",
        f"**{measured.clamped:.0%}**",
        f"{measured.surprise:.1f}",
        str(len(card["ablate"])),
        f"{measured.before:.0%}",
        f"**{measured.ablated:.0%}**",
    ]
    return f"| {' | '.join(cells)} |"


TEMPLATE = """\
# The demo's model and SAE

A Llama-architecture language model trained on a corpus that this repository generates, and a BatchTopK SAE
trained on what the plugin captured at `{hook}` while vLLM ran it. {size} MB together.
`make demo-assets` (`python -m demo.build`) writes all of it from a fixed seed; `python -m demo.evaluate`
measures again and writes this page.

| file | what |
|---|---|
| `model/` | config, tokenizer, chat template, weights in bfloat16, and the log of the training |
| `sae/` | the SAE in SAELens' layout, `manifest.json` with labels, `stats.safetensors` with each maximum |
| `{features}` | for each domain its features with their scores, the clamp to use, and what to ablate |
| `results.json` | the table below |
| `zoo/` | untuned SAEs to open, serve and compare: six architectures there, BatchTopK at every other layer |

The SAE has {d_sae} features. On held-out tokens: explained variance {ev}, R² {r2}, L0 {l0}, dead {dead}. CE
score {ce_score} on passages.

| domain | passages | feature | F1 | best F1 | clamp | base | clamped | surprise | ablated | before | after |
|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}

* passages: F1 of the feature in brackets by its mean over a passage, a stretch of sentences of one domain.
  Feature and threshold are chosen on half of {passages} passages and judged on the other half; what
  `python -m demo.passages` and `steerserve eval` say ([how](../../demo/passages.py)).
* F1: of the feature to clamp as a detector of the domain, token by token on held-out documents; best F1: of
  any. A single word seldom tells its domain.
* base, clamped: share of continuations of {neutral} neutral prompts × {samples} samples that the
  grammar's own labeller gives to the domain (base: × {base_samples} samples).
* ablated: how many features; before, after: the domain's share on its own {own} prompts × {own_samples}
  samples.
* surprise: nats per token of the clamped text under the unsteered model, which finds its own text {usual}.
* {tokens} tokens each, at temperature {temperature}; seeds other than those by which the clamps were chosen.
* Measured on {machine}.
"""


if __name__ == "__main__":
    main()
