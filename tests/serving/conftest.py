"""The real Triton server with two bundles, started once for the tests that leave it as it is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.server import Installation, Ports, Server, free_ports
from adatsq_trt.policy import Policy
from tests.cli.conftest import CommandLine
from tests.engines.conftest import make_bundle

# The clients come with `make test-serving`.
collect_ignore_glob = [] if find_spec("tritonclient") and find_spec("aiohttp") else ["test_*.py"]
TINY, DIGITS = "tiny", "digits-flux"
# One bucket with scales at every step, and one without, in which requests meet at any step.
DIGITS_POLICY = ("fp8", "fp8", "int4wo", "int4wo", "int4wo", "int4wo")
SERVER_FOLDER = Path(sys.prefix) / "tritonserver"  # where make test-serving puts the wheel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BundleFiles:
    """Two layers, four steps, four buckets."""
    return make_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> BundleFiles:
    """The zoo's model with a policy of two buckets, built by the console script."""
    folder = tmp_path_factory.mktemp("digits")
    save_policy(folder / "policy.json")
    options = ("--simulate", "--formats", "fp8,int4wo", "--steps", "6", *CommandLine.samples)
    ended = CommandLine.process(
        "build", "engine", DIGITS, *options, "--policy", folder / "policy.json", "--output", folder / "run"
    )
    assert ended.code == 0, ended.err
    return BundleFiles.open(folder / "run")


def save_policy(path: Path) -> None:
    from adatsq_trt.zoo.loading import load_model

    model = load_model(DIGITS)
    layers = list(model.adapter.quantizable_layers())
    rows = [[name] * len(layers) for name in DIGITS_POLICY]
    Policy.from_steps(DIGITS, model.weights_sha256, layers, rows).save(path)


@pytest.fixture(scope="session")
def repository(tiny: BundleFiles, digits: BundleFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with both; for reading."""
    folder = tmp_path_factory.mktemp("serving") / "repository"
    write_repository([Deployment(TINY, tiny, step_model=True), Deployment(DIGITS, digits, step_model=True)], folder)
    return folder


@pytest.fixture(scope="session")
def installation() -> Installation:
    """The server out of the wheel."""
    return Installation.find(SERVER_FOLDER)


@contextmanager
def started(
    repository: Path, installation: Installation, models: tuple[str, ...], *options: str, ports: Ports | None = None
) -> Iterator[Server]:
    """A server with some models."""
    with Server(repository, ports or free_ports(), installation, options) as server:
        server.wait_until_ready(models)
        yield server


@pytest.fixture(scope="session")
def server(repository: Path, installation: Installation) -> Iterator[Server]:
    """A server with all models; for tests that leave it as it is."""
    with started(repository, installation, (TINY, f"{TINY}_step", DIGITS, f"{DIGITS}_step")) as running:
        yield running


@pytest.fixture
def start(installation: Installation) -> Iterator[Callable[..., Server]]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:
        yield lambda repository, models, *options, ports=None: stack.enter_context(
            started(repository, installation, models, *options, ports=ports)
        )
