"""A model with sentences and a guidance embedding, through all commands."""

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_sentences_and_a_guidance_embedding_go_all_the_way(cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    built = cli("build", "engine", "scenes-flux-dev", "--target", "sm120", *cli.small, "--steps", "4", "--output", run)
    assert built.code == 0, built.err
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    assert "a 7" in manifest["prompt_texts"]
    assert manifest["image"] == {"patches": 4, "channels": 3, "patch_size": 4}
    assert cli("check", run).code == 0
    assert cli("generate", run, "--samples", "2", "--prompt", "a 7", "--prompt", "5").code == 0
    assert "prompt 'a dog': not one of" in cli("generate", run, "--prompt", "a dog").refusal
