"""A model of the zoo cut down to one block of each kind, and a bundle of it with a given policy."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import adatsq_trt
from adatsq_trt import zoo
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.policy import Policy

_LATER_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks|blocks|layers)\.[1-9]")
Rows = Callable[[Sequence[str]], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Source:
    """What is cut down.

    Attributes:
        model: of the zoo.
        config: changes of its configuration.
    """

    model: str
    config: Mapping[str, int]


FLUX = Source("digits-flux", {"num_layers": 1, "num_single_layers": 1})
WAN = Source("scenes-wan", {"num_layers": 1})
Z_IMAGE = Source("scenes-z-image", {"n_layers": 1})


def write_model(folder: Path, source: Source) -> None:
    """The model without its later blocks."""
    shutil.copytree(zoo.find_model(source.model), folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **source.config}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = read_tensors(weights)
    write_tensors(weights, {name: value for name, value in tensors.items() if not _LATER_BLOCK.match(name)})


def build(
    base: Path,
    name: str,
    source: Source,
    formats: str,
    rows: Rows,
    *,
    target: str = "sm120",
    layout: str | None = None,
    transform: str | None = None,
    with_plans: bool = False,
) -> Path:
    """Make a run.

    Args:
        base: receives "zoo", "policy.json" and "run".
        name: of the model.
        source: its source.
        formats: that the layers may have.
        rows: layers → their formats, for each step.
        target: target of the build.
        layout: of the bundle; None for the default.
        transform: of its weights and inputs.
        with_plans: compile them; most checks run none.

    Returns:
        The run directory.
    """
    from adatsq_trt.stages import bundle as bundle_stage
    from adatsq_trt.zoo.loading import load_model

    with pytest.MonkeyPatch.context() as patch:
        write_model(base / "zoo" / name, source)
        patch.setattr(zoo, "ZOO_FOLDER", base / "zoo")
        model = load_model(name)
        layers = tuple(model.adapter.quantizable_layers())
        policy = [tuple(row) for row in rows(layers)]
        Policy.from_steps(name, model.weights_sha256, layers, policy).save(base / "policy.json")
        if not with_plans:
            patch.setattr(bundle_stage, "_plans", lambda *_: ())
        adatsq_trt.build(
            name,
            target=target,
            layout=layout,
            transform=transform,
            output=base / "run",
            formats=formats,
            budget_bits=16,
            policy=base / "policy.json",
            steps=len(policy),
            calibration_samples=2,
            selection_samples=1,
            held_out_samples=1,
        )
    return base / "run"
