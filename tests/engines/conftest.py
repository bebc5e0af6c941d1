"""A bundle by hand: two residual blocks of one linear layer each, three assignments, four steps."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from adatsq_trt.engines.bundle import (
    GRAPH_FOLDER,
    POLICY_NAME,
    PROMPTS_NAME,
    REFERENCE_NAME,
    SCALES_NAME,
    BundleFiles,
    ImageSpec,
    Manifest,
    ScheduleRecord,
    write_manifest,
)
from adatsq_trt.engines.exported import EXPORTED_NAME, SCALES_PREFIX, Exported, array_hash
from adatsq_trt.export.conditions import with_subgraphs
from adatsq_trt.export.constant_hashes import HashedConstants
from adatsq_trt.export.switch import switch
from adatsq_trt.files import write_json_model
from adatsq_trt.formats import FORMATS
from adatsq_trt.graph_index import CONSTANTS_NAME, WEIGHTS_NAME, ConstantHashes, GraphFile, GraphIndex, TensorSignature
from adatsq_trt.policy import Policy
from adatsq_trt.quantizers import (
    dequantize_weight,
    fake_quantize_activation,
    quantize_nearest,
    static_activation_scale,
)
from adatsq_trt.schedule import initial_noise

WIDTH, TOKENS, PROMPTS, ROWS = 16, 4, 3, 12
LAYERS = ("blocks.0.linear", "blocks.1.linear")
# The first two have the same scale inputs, so that their graphs can be mistaken for each other.
ASSIGNMENTS = (("fp8", "w8a8s"), ("w8a8s", "fp8"), ("bf16", "fp8"))
STEP_ASSIGNMENTS = (0, 1, 2, 0)
SIGMAS = (1.0, 0.8, 0.6, 0.3, 0.0)
GUIDANCE = 2.0
NOISE = 2.0**-16  # as the exporter's
_INPUTS = {"hidden_states": ("batch", TOKENS, WIDTH), "pooled": ("batch", WIDTH), "timestep": ("batch",)}


class TinyModel:
    """The model's weights and its fake-quantized arithmetic in PyTorch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for _ in LAYERS]
        self.biases = [torch.randn(WIDTH, generator=generator).bfloat16().float() / 2 for _ in LAYERS]

    def codes(self, layer: int, name: str):
        return quantize_nearest(self.weights[layer], FORMATS[name])

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        row: tuple[str, ...] | None,
        fixed: list[float] | None = None,
        outputs: dict[str, np.ndarray] | None = None,
        noise: float = 0.0,
    ) -> tuple[np.ndarray, list[float]]:
        """Output and static activation scales (0 where a format has none), measured unless they are given.

        Layer outputs go into `outputs`; `noise` disturbs the layers' inputs.
        """
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}
        x, scales = given["hidden_states"] + (given["pooled"] * given["timestep"][:, None])[:, None], []
        for i in range(len(LAYERS)):
            weight, activation = self.weights[i], x
            scales.append(0.0)
            if row is not None:
                fmt = FORMATS[row[i]]
                scale = None
                if fmt.static_activation:
                    measured = static_activation_scale(x.abs().max(), fmt.activation)
                    scale = measured if fixed is None else torch.tensor(fixed[i])
                weight = dequantize_weight(self.codes(i, row[i]), fmt)
                disturbed = x + noise * x.square().mean(-1, keepdim=True).sqrt() * torch.randn(
                    WIDTH, generator=torch.Generator().manual_seed(i)
                )
                activation = fake_quantize_activation(disturbed, fmt.activation, scale)
                scales[i] = 0.0 if scale is None else float(scale)
            output = activation @ weight.T + self.biases[i]
            if outputs is not None:
                outputs[LAYERS[i]] = output.numpy()
            x = x + output
        return x.numpy(), scales


class GraphWriter:
    """Writes the model as ONNX: `target` in bfloat16 with Q/DQ nodes, `cpu` and `reference` in float32."""

    def __init__(self, model: TinyModel, store: bytearray) -> None:
        self.model, self.store = model, store

    def write(self, folder: Path, variant: str, assignment: int | None) -> GraphFile:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.target = variant == "target"
        self.kind = TensorProto.BFLOAT16 if self.target else TensorProto.FLOAT
        row = None if assignment is None else ASSIGNMENTS[assignment]
        x = self._embed()
        for i in range(len(LAYERS)):
            x = self._block(i, x, row, last=i == len(LAYERS) - 1)
        scales = {
            layer: TensorSignature(name=f"{layer}.scale", dtype="bfloat16" if self.target else "float", shape=())
            for layer, name in zip(LAYERS, row or (), strict=bool(row))
            if FORMATS[name].static_activation
        }
        inputs = {**_INPUTS, **{signature.name: () for signature in scales.values()}}
        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info(name, self.kind, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info("velocity", self.kind, _INPUTS["hidden_states"])],
            self.constants,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        path = f"assignment_{assignment:03d}.{variant}.onnx" if row else "reference.cpu.onnx"
        (folder / path).write_bytes(proto.SerializeToString(deterministic=True))
        kind = "bfloat16" if self.target else "float"
        return GraphFile(
            path=path,
            variant=variant,
            assignment=assignment,
            inputs=tuple(TensorSignature(name=name, dtype=kind, shape=shape) for name, shape in _INPUTS.items()),
            outputs=(TensorSignature(name="velocity", dtype=kind, shape=_INPUTS["hidden_states"]),),
            scale_inputs=scales,
        )

    def _node(self, op: str, inputs: list[str], output: str, module: str, **attributes: int) -> str:
        node = helper.make_node(op, inputs, [output], name=f"{module}/{output}", **attributes)
        entry = node.metadata_props.add()
        entry.key, entry.value = "adatsq.module", module
        self.nodes.append(node)
        return output

    def _constant(self, name: str, array: np.ndarray, external: bool = False) -> str:
        tensor = numpy_helper.from_array(array, name)
        if external:
            if tensor.raw_data not in self.store:  # as the exporter does: the same bytes once
                self.store.extend(tensor.raw_data)
            offset = self.store.index(tensor.raw_data)
            entries = {"location": WEIGHTS_NAME, "offset": offset, "length": len(tensor.raw_data)}
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
        self.constants.append(tensor)
        return name

    def _real(self, name: str, value: np.ndarray | float) -> str:
        return self._constant(name, np.asarray(value, ml_dtypes.bfloat16 if self.target else np.float32))

    def _embed(self) -> str:
        time = self._node("Unsqueeze", ["timestep", self._constant("last", np.array([-1]))], "time", "embed")
        shift = self._node("Mul", ["pooled", time], "shift", "embed")
        column = self._node("Unsqueeze", [shift, self._constant("middle", np.array([1]))], "column", "embed")
        return self._node("Add", ["hidden_states", column], "embedded", "embed")

    def _block(self, i: int, x: str, row: tuple[str, ...] | None, last: bool) -> str:
        layer = LAYERS[i]
        quantized = row is not None
        activation = self._activation(layer, x, row[i]) if quantized else x
        turned = self._transposed_weight(i, layer, row[i] if quantized else None)
        product = self._node("MatMul", [activation, turned], f"{layer}.product", layer)
        bias = self._real(f"{layer}.bias", self.model.biases[i].numpy())
        output = self._node("Add", [product, bias], f"{layer}.output", layer)
        return self._node("Add", [x, output], "velocity" if last else f"blocks.{i}.output", f"blocks.{i}")

    def _transposed_weight(self, i: int, layer: str, name: str | None) -> str:
        if name == "w8a8s" and not self.target:
            # ONNX Runtime 1.31 fuses DequantizeLinear → Transpose → MatMul to a product with wrong scales.
            codes, scale = self._int8(i, layer)
            turned = self._node("Transpose", [codes], f"{layer}.turned_codes", layer, perm=[1, 0])
            return self._node("DequantizeLinear", [turned, scale], f"{layer}.dequantized", layer, axis=1)
        weight = self._weight(i, layer, name)
        return self._node("Transpose", [weight], f"{layer}.turned", layer, perm=[1, 0])

    def _int8(self, i: int, layer: str) -> tuple[str, str]:
        weight = self.model.codes(i, "w8a8s")
        codes = self._constant(f"{layer}.weight", weight.codes.numpy(), external=True)
        return codes, self._real(f"{layer}.weight_scale", weight.scales[:, 0].numpy())

    def _weight(self, i: int, layer: str, name: str | None) -> str:
        if name is None:
            return self._constant(f"{layer}.weight", self.model.weights[i].numpy(), external=True)
        weight = self.model.codes(i, name)
        if weight.scales is None:
            values = weight.codes.float().numpy()
            return self._constant(
                f"{layer}.weight", values.astype(ml_dtypes.bfloat16 if self.target else np.float32), external=True
            )
        if name == "w8a8s":
            codes, scale = self._int8(i, layer)
            return self._node("DequantizeLinear", [codes, scale], f"{layer}.dequantized", layer, axis=0)
        points = weight.codes.float().numpy().astype(ml_dtypes.float8_e4m3fn)
        codes, scales = self._constant(f"{layer}.weight", points, external=True), weight.scales[:, 0].numpy()
        if self.target:
            scale = self._real(f"{layer}.weight_scale", scales)
            return self._node("DequantizeLinear", [codes, scale], f"{layer}.dequantized", layer, axis=0)
        wide = self._node("Cast", [codes], f"{layer}.wide", layer, to=TensorProto.FLOAT)
        scale = self._real(f"{layer}.weight_scale", scales[:, None])
        return self._node("Mul", [wide, scale], f"{layer}.dequantized", layer)

    def _activation(self, layer: str, x: str, name: str) -> str:
        if name == "bf16":
            if self.target:
                return x
            narrow = self._node("Cast", [x], f"{layer}.narrow", layer, to=TensorProto.BFLOAT16)
            return self._node("Cast", [narrow], f"{layer}.activation", layer, to=TensorProto.FLOAT)
        scale = f"{layer}.scale"
        if self.target or name == "w8a8s":
            zero = f"{layer}.zero"
            kind = TensorProto.FLOAT8E4M3FN if name == "fp8" else TensorProto.INT8
            self.constants.append(helper.make_tensor(zero, kind, [], [0]))
            if not self.target:  # the grid is symmetric: -128 is not on it
                lowest = self._node("Mul", [scale, self._real(f"{layer}.low", -127.0)], f"{layer}.lowest", layer)
                x = self._node("Max", [x, lowest], f"{layer}.bounded", layer)
            codes = self._node("QuantizeLinear", [x, scale, zero], f"{layer}.codes", layer)
            return self._node("DequantizeLinear", [codes, scale], f"{layer}.activation", layer)
        ratio = self._node("Div", [x, scale], f"{layer}.ratio", layer)
        limits = [self._real(f"{layer}.low", -448.0), self._real(f"{layer}.high", 448.0)]
        clipped = self._node("Clip", [ratio, *limits], f"{layer}.clipped", layer)
        codes = self._node("Cast", [clipped], f"{layer}.codes", layer, to=TensorProto.FLOAT8E4M3FN)
        wide = self._node("Cast", [codes], f"{layer}.points", layer, to=TensorProto.FLOAT)
        return self._node("Mul", [wide, scale], f"{layer}.activation", layer)


def write_switch(folder: Path, variant: str, files: list[GraphFile]) -> GraphFile:
    """The graph of all assignments, made by the exporter's own pass."""
    own = [file for file in files if file.variant == variant]
    models = [onnx.load(folder / file.path, load_external_data=False) for file in own]
    shaped = [ir.from_proto(onnx.shape_inference.infer_shapes(model)) for model in models]
    together = ir.to_proto(switch(shaped, LAYERS, ASSIGNMENTS, constants_outside=variant == "cpu"))
    (folder / f"switch.{variant}.onnx").write_bytes(together.SerializeToString(deterministic=True))
    return GraphFile(
        path=f"switch.{variant}.onnx",
        variant=variant,
        assignment=None,
        inputs=own[0].inputs,
        outputs=own[0].outputs,
        scale_inputs={layer: signature for file in own for layer, signature in file.scale_inputs.items()},
        assignment_input=TensorSignature(name="assignment", dtype="int32", shape=()),
    )


def make_bundle(folder: Path) -> BundleFiles:
    """Write the whole bundle and open it."""
    model, store = TinyModel(), bytearray()
    graphs = folder / GRAPH_FOLDER
    graphs.mkdir(parents=True)
    writer = GraphWriter(model, store)
    files = [writer.write(graphs, variant, i) for i in range(len(ASSIGNMENTS)) for variant in ("target", "cpu")]
    files.append(writer.write(graphs, "reference", None))
    files += [write_switch(graphs, variant, files) for variant in ("target", "cpu")]
    (graphs / WEIGHTS_NAME).write_bytes(bytes(store))
    index = GraphIndex(
        base_type="bfloat16", graphs=tuple(files), weight_bytes=len(store), blocks=("blocks.0", "blocks.1")
    )
    write_json_model(graphs / "index.json", index)
    write_json_model(graphs / CONSTANTS_NAME, hash_constants(graphs, files, bytes(store)))
    policy = Policy.from_steps("tiny", "0" * 64, LAYERS, [ASSIGNMENTS[i] for i in STEP_ASSIGNMENTS])
    policy.save(folder / POLICY_NAME)
    prompts = _write_tensors(folder, model)
    schedule = ScheduleRecord(
        sigmas=SIGMAS, timesteps=tuple(s * 1000 for s in SIGMAS[:-1]), scheduler_config={"shift": 1.0}
    )
    arrays = {PROMPTS_NAME: {name: array_hash(array) for name, array in prompts.items()}}
    exported = Exported(policy=policy, guidance=GUIDANCE, schedule=schedule, prompt_texts=(), arrays=arrays)
    write_json_model(folder / EXPORTED_NAME, exported)
    manifest = Manifest(
        model="tiny",
        architecture="TinyModel",
        backend="rtx",
        targets=("sm120",),
        base_type="bfloat16",
        formats=("fp8", "bf16", "w8a8s"),
        schedule=schedule,
        guidance=GUIDANCE,
        latent_shape=(TOKENS, WIDTH),
        image=ImageSpec(patches=2, channels=4),
        prompts=PROMPTS,
        plans=(),
        versions={},
    )
    write_manifest(folder, manifest)
    return BundleFiles.open(folder)


def hash_constants(graphs: Path, files: list[GraphFile], store: bytes) -> ConstantHashes:
    """What the exporter notes down of its graphs' constants."""
    models = [onnx.load(graphs / file.path, load_external_data=False) for file in files]
    places = {
        (int(place["offset"]), int(place["length"]))
        for model in models
        for graph in with_subgraphs(model.graph)
        for place in ({entry.key: entry.value for entry in t.external_data} for t in graph.initializer)
        if place
    }
    hashed = HashedConstants({start: sha256(store[start : start + size]).digest() for start, size in places})
    for file, model in zip(files, models, strict=True):
        rows = ASSIGNMENTS if file.assignment is None else ASSIGNMENTS[file.assignment : file.assignment + 1]
        columns = zip(LAYERS, zip(*rows, strict=True), strict=True)
        single = {layer: column[0] for layer, column in columns if len(set(column)) == 1}
        hashed.add(model, file.variant, {} if file.variant == "reference" else single)
    return hashed.record


def _write_tensors(folder: Path, model: TinyModel) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    reference, steps = {"in_features": np.full(len(LAYERS), WIDTH)}, len(STEP_ASSIGNMENTS)
    spread = np.zeros(steps, np.float32)
    scales = {name: np.full((steps, len(LAYERS)), np.nan, np.float32) for name in ("fp8", "w8a8s")}
    for step, assignment in enumerate(STEP_ASSIGNMENTS):
        inputs = {
            "hidden_states": rng.standard_normal((ROWS, TOKENS, WIDTH), dtype=np.float32),
            "pooled": rng.standard_normal((ROWS, WIDTH), dtype=np.float32),
            "timestep": np.full(ROWS, SIGMAS[step], np.float32),
        }
        row = ASSIGNMENTS[assignment]
        layers: dict[str, np.ndarray] = {}
        output, used = model.run(inputs, row, outputs=layers)
        for i, name in enumerate(row):
            if FORMATS[name].static_activation:
                scales[name][step, i] = used[i]
        reference.update({f"step_{step:03d}.input.{name}": value for name, value in inputs.items()})
        reference[f"step_{step:03d}.output"] = output
        reference[f"step_{step:03d}.full_precision"] = model.run(inputs, None)[0]
        spread[step] = _relative(model.run(inputs, row, noise=NOISE)[0], output)
        # Every step is the first of its bucket.
        reference.update({f"step_{step:03d}.layer.{name}": value[::2].copy() for name, value in layers.items()})
    reference["spread.outputs"] = spread
    prompts = {
        "conditional.pooled": rng.standard_normal((PROMPTS, WIDTH), dtype=np.float32),
        "unconditional.pooled": rng.standard_normal((1, WIDTH), dtype=np.float32),
    }
    reference.update(_loop_reference(model, prompts["conditional.pooled"], prompts["unconditional.pooled"], scales))
    reference.update({f"{SCALES_PREFIX}{name}": table for name, table in scales.items()})
    (folder / REFERENCE_NAME).parent.mkdir()
    for name, tensors in ((REFERENCE_NAME, reference), (SCALES_NAME, scales), (PROMPTS_NAME, prompts)):
        save_file(tensors, folder / name)
    return prompts


def _loop_reference(
    model: TinyModel, conditional: np.ndarray, unconditional: np.ndarray, scales: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Two samples' latents, quantized and not."""
    prompts, seeds = np.array([0, 2]), np.array([5, 6])
    pooled = np.concatenate([conditional[prompts], np.repeat(unconditional, 2, axis=0)])
    loops = {}
    for name in ("quantized", "full_precision", "disturbed"):
        latents = [initial_noise(seeds.tolist(), (TOKENS, WIDTH))]
        for step, assignment in enumerate(STEP_ASSIGNMENTS):
            row = ASSIGNMENTS[assignment] if name != "full_precision" else None
            fixed = [float(scales[f][step, i]) if f in scales else 0.0 for i, f in enumerate(row or ())]
            time = np.full(4, SIGMAS[step], np.float32)
            inputs = {"hidden_states": np.concatenate([latents[-1]] * 2), "pooled": pooled, "timestep": time}
            noise = NOISE if name == "disturbed" else 0.0
            guided, free = np.split(model.run(inputs, row, fixed, noise=noise)[0], 2)
            velocity = free + np.float32(GUIDANCE) * (guided - free)
            latents.append(latents[-1] + np.float32(SIGMAS[step + 1] - SIGMAS[step]) * velocity)
        loops[f"loop.{name}"] = np.stack(latents)
    pairs = zip(loops.pop("loop.disturbed")[1:], loops["loop.quantized"][1:], strict=True)
    spread = np.array([_relative(*pair) for pair in pairs], np.float32)
    return {**loops, "loop.prompts": prompts, "loop.seeds": seeds, "spread.loop": spread}


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> BundleFiles:
    """For tests that only read."""
    return make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def own_bundle(tmp_path: Path) -> BundleFiles:
    """For tests that damage it."""
    return make_bundle(tmp_path / "run" / "bundle")
