"""A load run: many requests by many clients, some malformed, some cancelled, and a server that is killed half-way."""

from __future__ import annotations

import random
import re
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict

from adatsq_trt.engines.runtime import Bundle
from adatsq_trt.engines.triton_server.server import HOST, Ports, Server
from benchmarks.serving.client import Client, GoneError, GrpcClient, HttpClient, RefusedError

SEEDS, MAX_SAMPLES = 48, 3
RETRY_SECONDS, GIVE_UP_SECONDS = 0.2, 120
HUGE_PROMPT = 10**6
# What is wrong with a malformed request → (its values, what the sentence has to say).
MALFORMED = {
    "prompt": ({"prompt": HUGE_PROMPT, "seed": 1}, f"prompt {HUGE_PROMPT}: the bundle holds"),
    "seed": ({"prompt": 0, "seed": -5}, "seed: got -5, expected 0 to"),
    "steps": ({"prompt": 0, "seed": 1, "steps": 999}, "steps: got 999, the bundle's policy is for"),
    "output": ({"prompt": 0, "seed": 1, "output": "gif"}, "unknown output 'gif'; choose one of"),
    "counts": ({"prompt": [0, 0], "seed": 1}, "got 2 prompts and 1 seeds, expected one seed for every prompt"),
    "missing": ({"prompt": 0}, "the request has no seed; give one"),
    "model": ({"prompt": 0, "seed": 1, "model": "nobody"}, "Request for unknown model: 'nobody'"),
}


class LoadResult(BaseModel):
    """Result of a load run.

    Attributes:
        requests: all, of which the next four are parts.
        answered: with latents.
        refused: malformed ones that got the sentence that they should.
        cancelled: by the client.
        wrong_answers: latents that are not those of the loop in process, or an answer to a malformed request.
        errors_without_message: refusals that do not say what is wrong.
        asked_again: how often a client met no server, after the kill.
        mean_batch: requests in a call of the denoiser, on average.
        joined_places: calls that joined requests at different steps.
        resident_bytes: of the server and its models, after the restart's warm-up and at the end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests: int
    answered: int
    refused: int
    cancelled: int
    wrong_answers: int
    errors_without_message: int
    asked_again: int
    mean_batch: float
    joined_places: int
    resident_bytes: tuple[int, int]
    seconds: float

    def table(self) -> str:
        """All figures, one to a line."""
        first, last = self.resident_bytes
        rows = {
            **self.model_dump(exclude={"resident_bytes", "mean_batch", "seconds"}),
            "mean batch": f"{self.mean_batch:.2f}",
            "resident after warm-up": f"{first / 1e6:.0f} MB",
            "resident at the end": f"{last / 1e6:.0f} MB ({(last - first) / first:+.1%})",
            "requests per second": f"{self.requests / self.seconds:.0f}",
        }
        return "\n".join(f"{name.replace('_', ' '):<24}{value:>16}" for name, value in rows.items())


@dataclass
class _Tally:
    counts: dict[str, int] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def add(self, name: str) -> None:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1

    def __getitem__(self, name: str) -> int:
        return self.counts.get(name, 0)

    @property
    def done(self) -> int:
        return sum(
            self[name] for name in ("answered", "refused", "cancelled", "wrong_answers", "errors_without_message")
        )


class LoadRun:
    """Sends the requests and judges the answers."""

    def __init__(self, bundles: Mapping[str, Bundle], requests: int, clients: int) -> None:
        """Compute what every answer has to be.

        Args:
            bundles: loop model's name → its bundle.
            requests: how many.
            clients: how many at a time; every other one speaks gRPC.
        """
        self._requests, self._clients = requests, clients
        self._models = sorted(bundles)
        self._prompts = {name: bundle.manifest.prompts for name, bundle in bundles.items()}
        self._expected = {
            (name, quantized): self._denoise(bundle, quantized)
            for name, bundle in bundles.items()
            for quantized in (True, False)
        }
        self._tally = _Tally()

    def _denoise(self, bundle: Bundle, quantized: bool) -> np.ndarray:
        """Latents of all seeds, [SEEDS, ...]."""
        prompts = [seed % bundle.manifest.prompts for seed in range(SEEDS)]
        return bundle.denoise(bundle.noise(range(SEEDS)), bundle.conditioning(prompts), quantized=quantized)

    def run(self, server: Server, restart: Callable[[], Server]) -> LoadResult:
        """Send everything; kill the server half-way and start another.

        Args:
            server: is killed.
            restart: starts one on the same ports.
        """
        begun = time.monotonic()
        with ThreadPoolExecutor(self._clients) as pool:
            work = [pool.submit(self._client, server.ports, index) for index in range(self._clients)]
            self._wait_for(self._requests // 2, work)
            server.process.kill()
            server.stop()
            server = restart()
            self._wait_for(self._requests * 2 // 3, work)
            warm = resident_bytes(server)
            for one in work:
                one.result()
        seconds = time.monotonic() - begun
        calls, steps, places = (
            metric(server.ports, f"adatsq_{name}_total")
            for name in ("denoiser_calls", "generation_steps", "joined_places")
        )
        counts = {
            name: self._tally[name]
            for name in ("answered", "refused", "cancelled", "wrong_answers", "errors_without_message", "asked_again")
        }
        return LoadResult(
            requests=self._tally.done,
            **counts,
            mean_batch=steps / calls,
            joined_places=int(places),
            resident_bytes=(warm, resident_bytes(server)),
            seconds=seconds,
        )

    def _wait_for(self, done: int, work: Sequence) -> None:
        while self._tally.done < done and not any(one.done() for one in work):
            time.sleep(0.05)

    def _client(self, ports: Ports, index: int) -> None:
        client: Client = GrpcClient(ports) if index % 2 else HttpClient(ports)
        try:
            for number in range(index, self._requests, self._clients):
                self._until_served(client, random.Random(number))
        finally:
            client.close()

    def _until_served(self, client: Client, rng: random.Random) -> None:
        """One request; again while there is no server."""
        draw, deadline = rng.random(), time.monotonic() + GIVE_UP_SECONDS
        model, state = rng.choice(self._models), rng.getstate()
        while True:
            rng.setstate(state)
            try:
                if draw < 0.05:
                    self._tally.add(self._malformed(client, model, rng))
                elif draw < 0.1 and isinstance(client, GrpcClient):
                    client.start(model, **self._values(model, rng))
                    time.sleep(rng.random() * 0.02)
                    client.cancel()
                    self._tally.add("cancelled")
                else:
                    self._tally.add(self._good(client, model, rng))
                return
            except GoneError:
                self._tally.add("asked_again")
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_SECONDS)

    def _values(self, model: str, rng: random.Random) -> dict[str, object]:
        seeds = rng.sample(range(SEEDS), rng.randint(1, MAX_SAMPLES))
        prompts = [seed % self._prompts[model] for seed in seeds]
        return {"prompt": prompts, "seed": seeds, "quantized": rng.random() < 0.9}

    def _good(self, client: Client, model: str, rng: random.Random) -> str:
        values = self._values(model, rng)
        try:
            got = client.latents(model, **values)
        except RefusedError:
            return "errors_without_message"
        expected = self._expected[model, values["quantized"]][values["seed"]].ravel()
        return "answered" if np.array_equal(got, expected) else "wrong_answers"

    def _malformed(self, client: Client, model: str, rng: random.Random) -> str:
        values, sentence = MALFORMED[rng.choice(list(MALFORMED))]
        own_stream = "model" in values  # with others in its stream, server 2.51 may abort; docs/serving.md
        try:
            if own_stream:
                client.close()
            client.latents(**{"model": model, **values})
        except RefusedError as error:
            return "refused" if re.search(sentence, str(error)) else "errors_without_message"
        finally:
            if own_stream:
                client.close()
        return "wrong_answers"


def resident_bytes(server: Server) -> int:
    """Resident memory of the server and the processes of its models."""
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))


def metric(ports: Ports, name: str) -> float:
    """Sum of a metric over all its labels."""
    with urllib.request.urlopen(f"http://{HOST}:{ports.metrics}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))
