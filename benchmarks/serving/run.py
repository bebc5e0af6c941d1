"""Cost of serving and gain of batching, measured on the real Triton server with one bundle.

    python -m benchmarks.serving.run BUNDLE [--server FOLDER] [--requests 2000] [--rounds 30] [--work FOLDER]
        [--output FILE]

The model of middle size is the Flux of 161 M parameters of benchmarks/engines, made in --work or reused there. Writes
results.json beside this file, or --output, and prints it. Times want an idle machine; the results say how busy it was.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import tritonclient.grpc as triton
from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.runtime import TIME_INPUT, Bundle
from adatsq_trt.engines.triton_server.repository import Deployment, write_repository
from adatsq_trt.engines.triton_server.server import HOST, Installation, Ports, Server, free_ports
from adatsq_trt.files import write_json_model
from adatsq_trt.solver import guide
from benchmarks.engines.run import make_bundle
from benchmarks.serving.client import GrpcClient, HttpClient
from benchmarks.serving.load import LoadResult, LoadRun, metric

RESULTS = Path(__file__).with_name("results.json")
NAME, MID_SIZE, CLIENTS, LOAD_CLIENTS, WARM_UP = "model", "flux-mid", 8, 16, 2
MID_SIZE_SECONDS = 600  # for one generation on a slow machine
SINGLE = {"prompt": 0, "seed": 1}
BATCHING_ROUNDS = 3
BUSY = "the machine was busy, see load_average: every time here, and so every difference of times, is in doubt"
GOALS = "at most 1 ms per step for one client, at most 5 % on the model of middle size, a batching gain of at least 1.5"


class Results(BaseModel):
    """Content of results.json. Times are medians over `rounds`, one sample per request, guidance on.

    The model of middle size has a third of the rounds.

    Differences and ratios are medians too, of figures that were measured in the same round.

    Attributes:
        load_average: processes that wanted a processor in the minute before, this program not among them; well below
            1 on an idle machine.
        loop_ms: the loop in this process.
        grpc_ms: the same by one client over a gRPC stream.
        http_ms: the same by one client over HTTP.
        overhead_ms_per_step: (grpc_ms - loop_ms) / steps.
        step_model_overhead_ms_per_step: of a client that runs the loop itself and calls the step model.
        overhead_mid_size: (grpc_ms - loop_ms) / loop_ms on the model of middle size.
        mid_size_loop_ms: its loop in this process.
        batching_gain: time of requests in sequence over that of the same requests by eight clients at a time.
        backend_gain: time of eight loops of one sample over that of one loop of eight, in this process: the most that
            the backend gains from a batch.
        mean_batch: requests in a call of the denoiser, while eight clients asked.
        requests: of the load run, as the next two.
        notes: advice to read before these figures are used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    steps: int
    cores: int
    load_average: float
    rounds: int
    loop_ms: float
    grpc_ms: float
    http_ms: float
    overhead_ms_per_step: float
    step_model_overhead_ms_per_step: float
    overhead_mid_size: float
    mid_size_loop_ms: float
    batching_gain: float
    backend_gain: float
    mean_batch: float
    requests: int
    wrong_answers: int
    errors_without_message: int
    load: LoadResult
    notes: tuple[str, ...]


def milliseconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Time each function, [rounds]; calls are interleaved and rotated, so that a change of the machine meets all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = deque(functions)
    for number in range(rounds + WARM_UP):
        for name in names:
            begun = time.perf_counter()
            functions[name]()
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - begun) * 1e3)
        names.rotate()
    return {name: np.array(values) for name, values in times.items()}


def median(values: np.ndarray | Sequence[float]) -> float:
    return float(np.median(values))


def loop(bundle: Bundle, samples: int = 1) -> np.ndarray:
    """The loop in this process."""
    return bundle.denoise(bundle.noise([1] * samples), bundle.conditioning([0] * samples))


def loop_over_step_model(bundle: Bundle, client: triton.InferenceServerClient) -> np.ndarray:
    """The loop in the client, which calls the step model at every step."""
    latents, conditioning, schedule = bundle.noise([1]), bundle.conditioning([0]), bundle.schedule
    for step in range(schedule.steps):
        inputs = bundle.step_inputs(step, latents, conditioning, bundle.manifest.guidance)
        rows = len(inputs.pop(TIME_INPUT))
        arrays = {"step": np.full((rows, 1), step, np.int32), **inputs}
        tensors = [
            triton.InferInput(name, a.shape, "INT32" if name == "step" else "FP32").set_data_from_numpy(a)
            for name, a in arrays.items()
        ]
        prediction = client.infer(f"{NAME}_step", tensors).as_numpy("velocity")
        latents = schedule.advance(latents, guide(prediction, 1, bundle.manifest.guidance), step)
    return latents


def single_client(bundle: Bundle, ports: Ports, rounds: int) -> dict[str, np.ndarray]:
    """The same generation in four ways; all have to give the same latents."""
    http, stepwise = HttpClient(ports), triton.InferenceServerClient(f"{HOST}:{ports.grpc}")
    with GrpcClient(ports) as grpc:
        ways = {
            "loop": lambda: loop(bundle),
            "grpc": lambda: grpc.latents(NAME, **SINGLE),
            "http": lambda: http.latents(NAME, **SINGLE),
            "step model": lambda: loop_over_step_model(bundle, stepwise),
        }
        results = [np.ravel(way()) for way in ways.values()]
        if not all(np.array_equal(results[0], other) for other in results[1:]):
            raise SystemExit("the served latents are not those of the loop in process")
        times = milliseconds({**ways, "eight samples": lambda: loop(bundle, CLIENTS)}, rounds)
    stepwise.close()
    return times


def batching(ports: Ports, each: int) -> tuple[float, float]:
    """Gain of eight clients at a time over the same requests in sequence, and the mean batch meanwhile."""

    def ask(_: int) -> None:
        with GrpcClient(ports) as client:
            for seed in range(each):
                client.latents(NAME, prompt=0, seed=seed)

    def seconds(clients: int) -> float:
        begun = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(ask, range(CLIENTS)))
        return time.perf_counter() - begun

    def counted() -> np.ndarray:
        time.sleep(2)  # models send their metrics now and then
        names = ("adatsq_generation_steps_total", "adatsq_denoiser_calls_total")
        return np.array([metric(ports, name) for name in names])

    seconds(CLIENTS)
    gains, batches = [], []
    for _ in range(BATCHING_ROUNDS):
        alone, before = seconds(1), counted()
        gains.append(alone / seconds(CLIENTS))
        steps, calls = counted() - before
        batches.append(steps / calls)
    return median(gains), median(batches)


def served(
    path: Path, installation: Installation, stack: ExitStack, step_model: bool
) -> tuple[Bundle, Server, Callable[[], Server]]:
    """The bundle in this process and in a server, and what starts another on the same ports."""
    bundle, ports = stack.enter_context(Bundle.open(path)), free_ports()
    repository = Path(stack.enter_context(TemporaryDirectory()), "repository")
    write_repository([Deployment(NAME, BundleFiles.open(path), step_model)], repository, link=True)

    def start() -> Server:
        server = stack.enter_context(Server(repository, ports, installation))
        server.wait_until_ready((NAME, *([f"{NAME}_step"] if step_model else [])))
        return server

    return bundle, start(), start


def mid_size(work: Path, installation: Installation, rounds: int) -> dict[str, np.ndarray]:
    """The loop of the model of middle size in this process and served."""
    make_bundle(MID_SIZE, work / MID_SIZE)
    with ExitStack() as stack:
        bundle, server, _ = served(work / MID_SIZE, installation, stack, step_model=False)
        with GrpcClient(server.ports, MID_SIZE_SECONDS) as grpc:
            ways = {"loop": lambda: loop(bundle), "grpc": lambda: grpc.latents(NAME, **SINGLE)}
            return milliseconds(ways, rounds)


def measure(path: Path, installation: Installation, requests: int, rounds: int, work: Path) -> Results:
    """Everything, in turn."""
    load_average = os.getloadavg()[0]
    with ExitStack() as stack:
        bundle, server, restart = served(path, installation, stack, step_model=True)
        times = single_client(bundle, server.ports, rounds)
        gain, mean_batch = batching(server.ports, each=max(rounds // 3, 1))
        load = LoadRun({NAME: bundle}, requests, LOAD_CLIENTS).run(server, restart)
    middle = mid_size(work, installation, max(rounds // 3, 1))
    steps = bundle.policy.steps
    return Results(
        model=bundle.manifest.model,
        steps=steps,
        cores=len(os.sched_getaffinity(0)),
        load_average=load_average,
        rounds=rounds,
        loop_ms=median(times["loop"]),
        grpc_ms=median(times["grpc"]),
        http_ms=median(times["http"]),
        overhead_ms_per_step=median(times["grpc"] - times["loop"]) / steps,
        step_model_overhead_ms_per_step=median(times["step model"] - times["loop"]) / steps,
        overhead_mid_size=median(middle["grpc"] / middle["loop"]) - 1,
        mid_size_loop_ms=median(middle["loop"]),
        batching_gain=gain,
        backend_gain=median(CLIENTS * times["loop"] / times["eight samples"]),
        mean_batch=mean_batch,
        requests=load.requests,
        wrong_answers=load.wrong_answers,
        errors_without_message=load.errors_without_message,
        load=load,
        notes=(
            f"the goals are {GOALS}",
            "batching_gain is bounded by backend_gain, what ONNX Runtime gains from a batch of eight on this processor",
            "clients and server share the processors",
            "in the load run the kill half-way costs a start of the server, in which nothing is answered",
            *((BUSY,) if load_average > 0.5 else ()),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure serving with the real Triton server.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--server", type=Path, help="folder into which nvidia-pytriton was installed")
    parser.add_argument("--requests", type=int, default=2000, help="of the load run")
    parser.add_argument("--rounds", type=int, default=30, help="repetitions of every timing")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-serving"), help="for the model of middle size")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    installation = Installation.find(arguments.server)
    results = measure(arguments.bundle, installation, arguments.requests, arguments.rounds, arguments.work)
    write_json_model(arguments.output, results)
    print(results.model_dump_json(indent=2))
    print(results.load.table())


if __name__ == "__main__":
    main()
