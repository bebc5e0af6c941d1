"""`adatsq-trt deploy triton`: what it writes, and what it refuses."""

from pathlib import Path

import pytest

from tests.engines.conftest import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("deploy") / "bundle").folder


def test_repository(cli, bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "repository"
    ended = cli("deploy", "triton", bundle, bundle, "--name", "a", "--name", "b", "--step-model", "--output", output)
    assert ended.code == 0, ended.err
    assert ended.out == f"{output}: a, b; start it as {output / 'README.md'} says\n"
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["a", "a_step", "b", "b_step"]


REFUSALS = {
    "twice": (["{}", "{}"], "two models would be served as 'tiny'; give each bundle a --name of its own"),
    "names": (["{}", "--name", "a", "--name", "b"], "got 2 times --name for 1 bundles"),
    "name": (["{}", "--name", "a b"], "--name 'a b': expected letters"),
    "plans": (["{}", "--backend", "rtx"], "has no plans for --backend rtx"),
    "plans of tensorrt": (["{}", "--backend", "tensorrt"], "the server's TensorRT backend runs those of tensorrt only"),
    "steps of tensorrt": (
        ["{}", "--backend", "tensorrt", "--step-model"],
        "serves single steps only; leave --step-model",
    ),
    "tensorrt twice": (["{}", "{}", "--backend", "tensorrt"], "two models would be served as 'tiny'"),
    "pipeline": (["{}", "--pipeline", "{}"], "model_index.json' does not exist; name the folder of a pipeline"),
    "no bundle": (["{}/onnx"], "is not a bundle and holds none"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_write_nothing(cli, bundle: Path, tmp_path: Path, name: str) -> None:
    arguments, message = REFUSALS[name]
    given = [argument.format(bundle) for argument in arguments]
    assert message in cli("deploy", "triton", *given, "--output", tmp_path / "repository").refusal
    assert list(tmp_path.iterdir()) == []
