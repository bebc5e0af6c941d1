"""The real Triton server with two bundles, started once for the tests that leave it as it is."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import TIME_INPUT, Bundle
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.server import HOST, Installation, Ports, Server, free_ports
from adatsq_trt.policy import Policy
from adatsq_trt.zoo import zoo_models
from tests.cli.conftest import CommandLine
from tests.engines.conftest import make_bundle

if TYPE_CHECKING:
    from tritonclient.http import InferenceServerClient, InferInput

# The clients come with `make test-serving`.
collect_ignore_glob = [] if all(map(find_spec, ("tritonclient", "aiohttp", "openai"))) else ["test_*.py"]
TINY, DIGITS = "tiny", "digits-flux"
# One bucket with scales at every step, and one without, in which requests meet at any step.
DIGITS_POLICY = ("fp8", "fp8", "int4wo", "int4wo", "int4wo", "int4wo")
ZOO_POLICY = ("fp8", "fp8", "bf16")
LOADING_SECONDS = 300  # a model's load takes as long as the machine needs
SERVER_FOLDER = Path(sys.prefix) / "tritonserver"  # where make test-serving puts the wheel


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> BundleFiles:
    """Two layers, four steps, four buckets."""
    return make_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> BundleFiles:
    """The zoo's smallest model with a policy of two buckets."""
    folder = tmp_path_factory.mktemp("digits")
    save_policy(DIGITS, DIGITS_POLICY, folder)
    return build(DIGITS, DIGITS_POLICY, folder)


@pytest.fixture(scope="session")
def zoo(digits: BundleFiles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BundleFiles]:
    """Every model that ships with the package, two built at a time."""
    others = {name: tmp_path_factory.mktemp(name) for name in zoo_models() if name != DIGITS}
    for name, folder in others.items():  # in turn: diffusers does not load models in several threads
        save_policy(name, ZOO_POLICY, folder)
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda name: build(name, ZOO_POLICY, others[name]), others)
        return {DIGITS: digits, **dict(zip(others, built, strict=True))}


def save_policy(name: str, policy: Sequence[str], folder: Path) -> None:
    """A policy with one format for all layers at each step."""
    from adatsq_trt.zoo.loading import load_model

    model = load_model(name)
    layers = list(model.adapter.quantizable_layers())
    rows = [[fmt] * len(layers) for fmt in policy]
    Policy.from_steps(name, model.weights_sha256, layers, rows).save(folder / "policy.json")


def build(name: str, policy: Sequence[str], folder: Path) -> BundleFiles:
    """A model of the zoo with the policy in a folder, built by the console script."""
    options = ("--simulate", "--formats", ",".join(dict.fromkeys(policy)), "--steps", str(len(policy)))
    files = ("--policy", folder / "policy.json", "--output", folder / "run")
    ended = CommandLine.process("build", "engine", name, *options, *CommandLine.samples, *files)
    assert ended.code == 0, ended.err
    return BundleFiles.open(folder / "run")


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


def connect(server: Server) -> "InferenceServerClient":
    """The vendor's client, for loading and unloading."""
    from tritonclient.http import InferenceServerClient

    return InferenceServerClient(f"{HOST}:{server.ports.http}", network_timeout=LOADING_SECONDS)


def step_request(bundle: Bundle, step: int, seed: int) -> dict[str, np.ndarray]:
    """What a step model takes for one sample with guidance."""
    inputs = bundle.step_inputs(step, bundle.noise([seed]), bundle.conditioning([1]), 2.0)
    del inputs[TIME_INPUT]
    return {"step": np.full((2, 1), step, np.int32), **inputs}


def infer_inputs(tensors: Mapping[str, np.ndarray]) -> "list[InferInput]":
    """The same for the vendor's HTTP client."""
    from tritonclient.http import InferInput

    kinds = {"f": "FP32", "i": "INT32"}
    return [
        InferInput(name, value.shape, kinds[value.dtype.kind]).set_data_from_numpy(value)
        for name, value in tensors.items()
    ]


def process_of(model: str, below: int) -> psutil.Process:
    """The process of a model, below that of a server."""
    for child in psutil.Process(below).children(recursive=True):
        if child.status() != psutil.STATUS_ZOMBIE and any(
            part.endswith(f"/{model}/1/model.py") for part in child.cmdline()
        ):
            return child
    raise AssertionError(f"{model} has no process")


def until(holds: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
