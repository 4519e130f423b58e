"""`steerserve eval`: several SAEs of one language model, judged on the same material."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from steerserve.errors import ConfigError
from steerserve.sae import Hook
from steerserve.training.shards import ShardReader

from .dictionary import read_features
from .hooked import accelerator, parse_site
from .judged import Judged, open_judged
from .page import to_html
from .report import to_json
from .run import judge_all
from .settings import JudgeSettings
from .texts import check_new, read_labelled, read_prompts
from .verdict import Judgement, Material, Verdict

__all__ = ["eval_command"]

_DEFAULTS = JudgeSettings()
_HELP = {name: info.description for name, info in JudgeSettings.model_fields.items()}


def eval_command(
    model: Annotated[str, typer.Argument(help="Language model: a folder in Hugging Face's layout.")],
    sae: Annotated[
        list[str], typer.Option(help="An SAE to judge, PATH or NAME=PATH. May be given several times.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for report.json and report.html.")],
    texts: Annotated[
        Path | None,
        typer.Option(help="JSONL with `text`, and `label` for everything that needs concepts."),
    ] = None,
    shards: Annotated[
        Path | None, typer.Option(help="Harvested activations to reconstruct, in place of the texts'.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts to steer, a line each or a .jsonl; without them steering is left out."),
    ] = None,
    known: Annotated[
        Path | None, typer.Option(help="Safetensors with planted `features` [K, d] to compare decoders with.")
    ] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="For SAEs whose files name no hook.")] = None,
    hook: Annotated[str, typer.Option(help="resid_post or resid_pre of that layer.")] = "resid_post",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; the accelerator if there is one.")] = None,
    tokens: Annotated[int, typer.Option(help=_HELP["tokens"])] = _DEFAULTS.tokens,
    text_tokens: Annotated[int, typer.Option(help=_HELP["text_tokens"])] = _DEFAULTS.text_tokens,
    splice_texts: Annotated[int, typer.Option(help=_HELP["splice_texts"])] = _DEFAULTS.splice_texts,
    held_out: Annotated[float, typer.Option(help=_HELP["held_out"])] = _DEFAULTS.held_out,
    steer_tokens: Annotated[int, typer.Option(help=_HELP["steer_tokens"])] = _DEFAULTS.steer_tokens,
    temperature: Annotated[float, typer.Option(help=_HELP["temperature"])] = _DEFAULTS.temperature,
    steer_features: Annotated[int, typer.Option(help=_HELP["steer_features"])] = _DEFAULTS.steer_features,
    seed: Annotated[int, typer.Option(help=_HELP["seed"])] = _DEFAULTS.seed,
) -> None:
    """Judge SAEs of MODEL: reconstruction, the model's loss, concepts, and steering against its controls.

    Writes report.json and report.html, one page that needs no network.
    """
    check_new(out)
    settings = _settings(
        tokens=tokens,
        text_tokens=text_tokens,
        splice_texts=splice_texts,
        held_out=held_out,
        steer_tokens=steer_tokens,
        temperature=temperature,
        steer_features=steer_features,
        seed=seed,
    )
    place = device or accelerator()
    saes = _open(sae, place)
    material = Material(
        model,
        texts=read_labelled(texts, labelled=False) if texts else (),
        shards=ShardReader(shards) if shards else None,
        prompts=read_prompts(prompts) if prompts else (),
        known=read_features(known, saes[0].d_in) if known else None,
        hook=None if layer is None else Hook(layer, parse_site(hook)),
        device=place,
    )
    judgement = judge_all(saes, material, settings)
    report = to_json(judgement)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "report.html").write_text(to_html(report), encoding="utf-8")
    _tell(judgement, out)


def _settings(**values: float) -> JudgeSettings:
    try:
        return JudgeSettings(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise ConfigError(f"expected --{name}: {first['msg']}, got {first['input']!r}") from None


def _open(named: Sequence[str], device: str) -> list[Judged]:
    """The SAEs, with names that differ: a folder called like another is told by its parent's name too."""
    opened = []
    for value in named:
        name, equals, path = value.partition("=")
        # A path may hold an equals sign; it then exists as it stands.
        given = bool(equals) and not Path(value).exists()
        opened.append(open_judged(Path(path if given else value), name if given else None, device))
    counts = Counter(judged.name for judged in opened)
    return [judged if counts[judged.name] == 1 else _renamed(judged) for judged in opened]


def _renamed(judged: Judged) -> Judged:
    return replace(judged, name=f"{judged.folder.resolve().parent.name}/{judged.name}")


def _tell(judgement: Judgement, out: Path) -> None:
    """The main numbers, and where the rest is."""
    rows = [_row(verdict) for verdict in judgement.verdicts]
    known = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(*known)
    for row in rows:
        table.add_row(*(row[name] for name in known))
    console = Console()
    console.print(table)
    console.print(f"{out / 'report.html'}", highlight=False, soft_wrap=True)


def _row(verdict: Verdict) -> dict[str, str]:
    found, spliced = verdict.reconstruction.evaluation, verdict.spliced
    concepts = verdict.labelled.concepts if verdict.labelled else []
    latent, probe = ([getattr(one, part).f1 for one in concepts] for part in ("latent", "probe"))
    methods = verdict.steering.by_method() if verdict.steering else {}
    scores = {name: axes.overall for name, axes in methods.items()}
    rivals = {name: score for name, score in scores.items() if name not in ("sae", "unsteered")}
    best = max(rivals, key=lambda name: rivals[name], default="")
    return {
        "SAE": verdict.judged.name,
        "EV": f"{found.explained_variance:.3f}",
        "R²": f"{found.r2:.3f}",
        "L0": f"{found.l0:.1f}",
        "dead": f"{found.dead_fraction:.1%}",
        "CE score": f"{spliced.ce_score:.3f}" if spliced else "",
        "latent F1": f"{sum(latent) / len(latent):.3f}" if latent else "",
        "probe F1": f"{sum(probe) / len(probe):.3f}" if probe else "",
        "steering": f"{scores['sae']:.2f}" if scores else "",
        "best control": f"{best} {rivals[best]:.2f}" if best else "",
    }
