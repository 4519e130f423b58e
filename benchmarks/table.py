"""The tables of `benchmarks/README.md`, written between its markers from what was measured.

python -m benchmarks.table
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .command import RESULTS
from .tables.gpu import gpu_table
from .tables.harvest import harvest_table
from .tables.hf import hf_table
from .tables.million import million_table
from .tables.policies import admission_table, policies_table
from .tables.products import products_table
from .tables.recovery import recovery_table, synthetic_table
from .tables.serving import serving_table
from .tables.step import step_table
from .tables.training import training_table

__all__ = ["TABLES", "main"]

README = Path(__file__).with_name("README.md")
# The name of the file in `results/`, and of the markers.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "serving": serving_table,
    "hf": hf_table,
    "million": million_table,
    "gpu": gpu_table,
    "step": step_table,
    "products": products_table,
    "training": training_table,
    "harvest": harvest_table,
    "recovery-toy": recovery_table,
    "recovery-synth": synthetic_table,
    "admission": admission_table,
    "policies": policies_table,
}
_ABSENT = {"gpu": "Not measured: no GPU at hand."}


def main(
    results: Annotated[
        Path, typer.Option(help="The folder of the JSON files that the benchmarks kept.")
    ] = RESULTS,
    readme: Annotated[Path, typer.Option(help="The file whose tables are replaced.")] = README,
) -> None:
    """Replace what stands between the markers of the README by tables of what was measured."""
    text = readme.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        file = results / f"{name}.json"
        if file.exists():
            written = table(json.loads(file.read_text(encoding="utf-8")))
        else:
            written = _ABSENT.get(name, "Not measured yet.")
        text = _replace(text, name, written)
    readme.write_text(text, encoding="utf-8")


def _replace(text: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    replaced, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise typer.BadParameter(f"expected one pair of markers {begin} … {end}, found {count}")
    return replaced


if __name__ == "__main__":
    typer.run(main)
