"""The processor in the place of plans: the cpu graphs, with the target's type where a plan takes and gives tensors."""

from functools import cached_property

import numpy as np
import onnxruntime
import torch

from adatsq_trt.engines.backends.base import StepRunner
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.engines.generation import Arrays, as_array
from adatsq_trt.graph_index import GraphFile


class CastingSteps(StepRunner):
    """Rows, positions, scales and velocities are rounded to the type that the plans have them in."""

    def __init__(self, files: BundleFiles) -> None:
        super().__init__(files)
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        together = files.manifest.layout in ("switch", "plugin")
        self._targets = [
            graph
            for graph in files.index.graphs
            if graph.variant == "target" and (graph.assignment is None) == together
        ]

    def run(self, step: int, inputs: Arrays, size: tuple[int, ...] | None = None) -> np.ndarray:
        assignment = self._files.policy.step_assignments[step]
        target = next(g for g in self._targets if g.assignment in (None, assignment))
        graph = self._files.graph("cpu", target.assignment)
        given = {**{n: as_array(v) for n, v in inputs.items()}, **self._files.controls(graph, step, size)}
        types = self._types
        feed = {name: _rounded(value, types[name]) for name, value in given.items()}
        return _rounded(self._session(graph).run(None, feed)[0], target.outputs[0].dtype)

    @cached_property
    def _types(self) -> dict[str, str]:
        """Of the target graphs' inputs."""
        found = {}
        for graph in self._targets:
            others = [graph.assignment_input, graph.selector_input, *graph.scale_inputs.values()]
            for signature in (*graph.inputs, *graph.position_inputs, *filter(None, others)):
                found[signature.name] = signature.dtype
        return found

    def _session(self, graph: GraphFile) -> onnxruntime.InferenceSession:
        if graph.path not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.x64quantprecision", "1")
            self._sessions[graph.path] = onnxruntime.InferenceSession(self._files.graph_path(graph), options)
        return self._sessions[graph.path]

    def _free(self) -> None:
        self._sessions.clear()


def _rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    if dtype in ("float", "int32"):
        return value
    return np.asarray(torch.from_numpy(np.ascontiguousarray(value)).to(getattr(torch, dtype)).float().numpy())
