"""Usage: python -m scripts.docs_models: write docs/models.md, what each family of models has.

The facts are those of the registry (`adatsq_trt.models.families`), of the tests' tables, and of the last
`make bench-pipelines`.
"""

from __future__ import annotations

import re
from pathlib import Path

from adatsq_trt.files import read_json_model, write_bytes
from adatsq_trt.models.adapter import ModelAdapter
from adatsq_trt.models.families import families
from adatsq_trt.models.family import Family
from benchmarks.pipelines.run import RESULTS, Results, Row
from tests.cli.test_check_pipelines import SQUARE
from tests.lora_dialects import READ, SHOWN

_DIALECTS = [*((dialect, kind) for dialect, (kind, _) in READ.items()), *SHOWN]
DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
_HEAD = """# Models

What each pipeline of diffusers has here. This page is written by `python -m scripts.docs_models` from the registry of
families and from the tables of the tests; [adapters](adapters.md) says how to bring another one, and
[use your own checkpoint](how-to/own-checkpoint.md) what is refused.

- *build*: kinds of bundle for which a test goes from a saved pipeline with random weights to one that passes `check`.
- *sizes*: whether one bundle may have several (`--shapes`).
- *LoRA*: dialects of files that a test reads.
- *in the pipeline*: whether a bundle takes the transformer's place in the unmodified pipeline.
- *text served*: whether `serve` and `deploy triton --pipeline` take prompts.
- *image*: what `generate` is given beside the prompt (`--image`, `--mask`).
- *schedulers*: classes that are followed. *own* is the one that the pipeline comes with.
- *difference*: the largest of the loop's last latents from those of diffusers' own pipeline, relative to these, over
  the rows of `make bench-pipelines`.

A `WanPipeline` or `WanImageToVideoPipeline` with two transformers (Wan 2.2) is built for cpu and sm120 and goes into
the pipeline; it has one size, and is served where it takes text alone
([use your own checkpoint](how-to/own-checkpoint.md)).

| pipeline | transformer | build | sizes | LoRA | in the pipeline | text served | image | schedulers | difference |
|---|---|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The document."""
    rows = read_json_model(RESULTS, Results, "run 'make bench-pipelines'").rows
    return (
        _HEAD
        + "\n".join(_row(family, [row for row in rows if row.pipeline == family.pipeline]) for family in families())
        + "\n"
    )


def _row(family: Family, rows: list[Row]) -> str:
    adapter = family.adapter
    cells = (
        f"`{family.pipeline}`",
        f"`{family.transformer}`",
        ", ".join(_checked(family)) or "not tested",
        "several" if adapter.any_size is not ModelAdapter.any_size else "one",
        "; ".join(dialect for dialect, kind in _DIALECTS if kind is family) or "not tested",
        _said(adapter.pipeline_call is not ModelAdapter.pipeline_call),
        _said(family.text_call is not None and family.image_condition is None),
        _image(family),
        _schedulers(family, rows),
        f"{max(row.difference for row in rows):.1e}" if rows else "not measured",
    )
    return f"| {' | '.join(cells)} |"


def _checked(family: Family) -> list[str]:
    """Kinds of bundle on which `check` is tested in the default run."""
    own = family.pipeline.removesuffix("Pipeline").lower()
    return sorted({bundle for name, _, bundle in SQUARE if name.replace("-", "") == own})


def _image(family: Family) -> str:
    condition = family.image_condition
    if condition is None:
        return "none"
    return "an image and a mask" if condition.masked else "an image"


def _schedulers(family: Family, rows: list[Row]) -> str:
    own = next((row.scheduler for row in rows if row.case.endswith(", its own")), None)
    names = (f"{_short(name)}{' (own)' if name == own else ''}" for name in family.schedulers)
    return ", ".join(names)


def _short(scheduler: str) -> str:
    return re.sub(r"(Discrete|Multistep)?Scheduler$", "", scheduler)


def _said(there: bool) -> str:
    return "yes" if there else "no"


def main() -> None:
    """Write the page."""
    write_bytes(DOCUMENT, page().encode())


if __name__ == "__main__":
    main()
