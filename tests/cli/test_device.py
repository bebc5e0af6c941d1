"""`--device`: what cannot be computed on is refused before anything is written."""

from pathlib import Path

import pytest

SEARCH = ("search", "digits-flux", "--simulate", "--formats", "w4a4,w8a8", "--steps", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "gpu"), "--device gpu: expected 'auto', 'cpu', 'cuda', or 'cuda:N' for the GPU of that number"),
        (("--device", "cuda:99"), "--device cuda:99: "),  # whether this machine has GPUs or not
        (("--device", "cuda", "--ray", "local"), "--device cuda: with --ray the workers' processors compute"),
    ],
)
def test_a_wrong_device_is_refused_before_anything_is_written(
    cli, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in cli(*SEARCH, "--output", tmp_path / "run", *options).refusal
    assert list(tmp_path.iterdir()) == []


def test_the_processor_can_be_asked_for(cli, tmp_path: Path) -> None:
    samples = ("--calibration-samples", "1", "--selection-samples", "2", "--held-out-samples", "2")
    ended = cli(*SEARCH, *samples, "--output", tmp_path / "run", "--device", "cpu")
    assert ended.code == 0, ended.err
    assert (tmp_path / "run" / "search" / "policy.json").is_file()
