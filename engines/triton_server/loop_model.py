"""The loop model: Triton server's Python backend around a bundle, the whole denoising loop in one process.

Step-level batching happens here, in the process that runs the denoiser: a call between two models of the server costs
about half a millisecond, and that at every step. `execute` only queues; a thread joins the requests, runs the steps and
answers.

Runs inside the server only, which provides `triton_python_backend_utils`.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

import numpy as np
import triton_python_backend_utils as server

from adatsq_trt.engines.triton_server.batching import Generation, StepBatcher
from adatsq_trt.engines.triton_server.python_backend import (
    failure,
    make_response,
    most_samples,
    open_bundle,
    open_pipeline,
    read_tensors,
    refusal,
)
from adatsq_trt.engines.triton_server.requests import Request, read_request, render
from adatsq_trt.errors import AdatsqError, UserError

log = logging.getLogger(__name__)
_FINAL = server.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_METRICS_EVERY_SECONDS = 0.5  # every update is a message to the server


@dataclass(frozen=True)
class _Job:
    """A request that can be run, and where its messages go."""

    request: Request
    sender: Any

    @property
    def generation(self) -> Generation:
        return self.request.generation


class TritonPythonModel:
    """Model that the Python backend loads: requests in, messages out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle, and the pipeline around it if there is one, and start the thread that runs them.

        Raises:
            TritonModelException: they cannot be opened; with the sentence that says why.
        """
        self._bundle, parameters = open_bundle(args)
        self._pipeline = open_pipeline(args, parameters, self._bundle)
        self._decode = self._bundle.decode if self._pipeline is None else self._pipeline.decode
        self._steps = self._bundle.policy.steps
        self._max_samples = most_samples(self._bundle, int(parameters["max_samples"]))
        self._batcher = StepBatcher(self._bundle, self._max_samples)
        self._metrics = _Metrics(args["model_name"])
        self._arrived: SimpleQueue[_Job | None] = SimpleQueue()
        self._waiting: deque[_Job] = deque()
        self._running: dict[Generation, _Job] = {}
        self._stopping = False
        self._thread = Thread(target=self._work, name="denoiser")
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Queue what can be run and refuse what cannot."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                accepted = read_request(
                    read_tensors(request), request.parameters(), self._bundle, self._max_samples, self._pipeline
                )
            except UserError as error:
                _send(sender, refusal(str(error), server.TritonError.INVALID_ARG), _FINAL)
            except Exception as error:  # whatever the text encoders raise: the server goes on
                _send(sender, failure("reading the request", error), _FINAL)
            else:
                self._arrived.put(_Job(accepted, sender))

    def finalize(self) -> None:
        """Finish what has been accepted, then give the memory back."""
        self._arrived.put(None)
        self._thread.join()
        self._bundle.close()

    def _work(self) -> None:
        """Receive, admit, advance, answer, until `finalize`."""
        while self._running or self._waiting or not self._stopping:
            try:
                self._receive(block=not (self._running or self._waiting))
                self._admit()
                self._drop_cancelled()
                if self._running:
                    self._advance()
            except Exception as error:  # without this thread nobody would be answered any more
                self._give_up(error)
        self._metrics.flush()

    def _give_up(self, error: Exception) -> None:
        """Answer all that has been accepted."""
        for job in (*self._running.values(), *self._waiting):
            _send(job.sender, failure("the request", error), _FINAL)
        self._running.clear()
        self._waiting.clear()

    def _receive(self, block: bool) -> None:
        """Take in what has arrived; the last is None."""
        if block:
            self._metrics.flush()
        try:
            while (job := self._arrived.get(block)) is not None:
                self._waiting.append(job)
                block = False
            self._stopping = True
        except Empty:
            pass

    def _admit(self) -> None:
        """First come, first served, while all samples that run fit into one call."""
        room = self._max_samples - sum(generation.samples for generation in self._running)
        while self._waiting and (room := room - self._waiting[0].generation.samples) >= 0:
            job = self._waiting.popleft()
            self._running[job.generation] = job

    def _drop_cancelled(self) -> None:
        for generation, job in list(self._running.items()):
            if job.sender.is_cancelled():
                self._end(generation, refusal("cancelled by the client", server.TritonError.CANCELLED))

    def _advance(self) -> None:
        """One call of the denoiser, and the messages that follow from it."""
        chosen = self._batcher.choose(list(self._running))
        steps = [generation.step for generation in chosen]
        try:
            self._batcher.advance(chosen)
            self._metrics.count(self._assignment(chosen[0], steps[0]), steps)
        except Exception as error:  # whatever the libraries below raise: the server goes on
            for generation in chosen:
                self._end(generation, failure(f"step {steps[0]}", error))
            return
        for generation, step in zip(chosen, steps, strict=True):
            try:
                self._report(generation)
            except Exception as error:  # one that cannot be drawn costs the others nothing
                if generation in self._running:
                    self._end(generation, failure(f"step {step}", error))

    def _assignment(self, generation: Generation, step: int) -> str:
        return str(self._bundle.policy.step_assignments[step]) if generation.quantized else "full precision"

    def _report(self, generation: Generation) -> None:
        """The last message, or one of progress where it was asked for; latents are looked at where a message has them.

        Raises:
            AdatsqError: latents or images have NaN or infinity.
        """
        request, finished = self._running[generation].request, generation.step == self._steps
        if not (finished or request.progress):
            return
        done = generation.step - 1
        tensors = {"step": np.array([done], np.int32), "bucket": np.array([self._bundle.bucket(done)], np.int32)}
        if finished or request.preview:
            latents = generation.latents
            if not np.isfinite(latents).all():
                raise AdatsqError("the latents have NaN or infinity; ask for less guidance, or for another prompt")
            tensors[request.output] = render(self._decode, latents, request.output)
        if finished:
            self._end(generation, make_response(tensors))
        else:
            _send(self._running[generation].sender, make_response(tensors), flags=0)

    def _end(self, generation: Generation, response: Any) -> None:
        _send(self._running.pop(generation).sender, response, _FINAL)


def _send(sender: Any, response: Any, flags: int) -> None:
    """Send a message; one that cannot be sent must not end the thread that serves all others."""
    try:
        sender.send(response, flags=flags)
    except Exception:
        log.exception("a message could not be sent")


class _Metrics:
    """Counters on the server's metrics endpoint, sent now and then."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._families = {
            name: server.MetricFamily(name=f"adatsq_{name}_total", description=text, kind=server.MetricFamily.COUNTER)
            for name, text in (
                ("denoiser_calls", "Calls of the denoiser"),
                ("generation_steps", "Steps that requests took in these calls"),
                ("joined_places", "Calls that joined requests at different steps of the loop"),
            )
        }
        self._metrics: dict[tuple[str, str], Any] = {}
        self._pending: Counter[tuple[str, str]] = Counter()
        self._sent = monotonic()

    def count(self, assignment: str, steps: list[int]) -> None:
        """Note a call of the denoiser with an assignment, and the steps at which its requests were."""
        self._pending["denoiser_calls", assignment] += 1
        self._pending["generation_steps", assignment] += len(steps)
        self._pending["joined_places", assignment] += len(set(steps)) > 1
        if monotonic() - self._sent > _METRICS_EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what has been noted; counters that cannot be sent must not cost anybody a picture."""
        pending, self._pending, self._sent = self._pending, Counter(), monotonic()
        try:
            for key, value in pending.items():
                if key not in self._metrics:
                    labels = {"model": self._model, "assignment": key[1]}
                    self._metrics[key] = self._families[key[0]].Metric(labels=labels)
                self._metrics[key].increment(value)
        except Exception:
            log.exception("counters could not be sent")
