"""Changes that a LoRA file makes: which layers, by how much, and that nothing in the file is lost.

Trainers name layers as diffusers does or as the model's authors do. Diffusers' converters read the latter, but some of
them drop tensors or strengths without a word. So strengths are multiplied in before, and every tensor must arrive.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from adatsq_trt.checkpoints.lora_strength import PEFT_PREFIX, layer_strength, read_peft_config
from adatsq_trt.checkpoints.tracing import sources, trace
from adatsq_trt.errors import DamagedFileError, MismatchError, one_line
from adatsq_trt.models.family import Family

_MATRICES = {"lora_A": "down", "lora_down": "down", "lora.down": "down"}
_MATRICES |= {"lora_B": "up", "lora_up": "up", "lora.up": "up"}
_MATRIX = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _MATRICES))})(?:\.default)?\.(weight|bias)")
_BESIDE = re.compile(r"(.+?)\.(alpha|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
_PREFIX = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})?(?:transformer\.|(?:model\.)?diffusion_model\.)?")
_FLAT = re.compile(r"lora_transformer_|lora_unet__?")  # then a name with underscores for dots
_NUMBER = re.compile(r"\d+")
_TEXT = ("text_encoder", "lora_te", "te1_", "te2_", "te3_", "lora_qwen3", "cond_stage_model.", "conditioner.")
_METHODS = {
    "dora_scale": "magnitudes of DoRA as kohya's trainers write them",
    "lokr_": "LoKr, Kronecker products",
    "hada_": "LoHa, Hadamard products",
    "lora_mid": "a Tucker decomposition",
    "oft_": "OFT, rotations",
    "_norm.scale": "norms of a control LoRA, whose base takes more channels",
}
# What Wan's trainers call a difference, and what that is added to.
_DIFFERENCE = re.compile(r"(.+)\.(diff|diff_b|diff_m)")
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


@dataclass(frozen=True)
class LayerChange:
    """W + up · down and b + bias; with magnitudes, every row of the sum has that length.

    Attributes:
        up: float32 [N, rank], alpha / rank multiplied in.
        down: float32 [rank, K].
        bias: float32 [N], likewise, or None.
        magnitude: float32 [N], or None.
    """

    up: Tensor
    down: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Changes:
    """All that a file does.

    Attributes:
        layers: linear layer → its change.
        differences: parameter → what is added to it, float32.
        left_out: tensors of text encoders.
        keys: linear layer → tensors of the file that its change was made of; one may be of several layers.
        unmatched: tensors for which the transformer has no linear layer, where a part of the file may match.
    """

    layers: Mapping[str, LayerChange]
    differences: Mapping[str, Tensor]
    left_out: tuple[str, ...]
    keys: Mapping[str, tuple[str, ...]]
    unmatched: tuple[str, ...] = ()


_Layers = dict[str, dict[str, Tensor]]  # layer → "down", "up", "bias", "magnitude", "alpha"


def read_changes(family: Family, transformer: nn.Module, file: Path, partial: bool = False) -> Changes:
    """Read a LoRA file for a transformer, whose weights may be on the meta device.

    Args:
        family: of the transformer.
        transformer: whose layers have the file's names, or those that diffusers makes of them.
        file: the LoRA.
        partial: list what is no change of a linear layer that the transformer has, instead of refusing or adding it.

    Raises:
        MismatchError: it changes what the transformer does not have, or does so in a way that is not followed.
        DamagedFileError: diffusers does not understand it.
    """
    tensors, metadata = _read(file)
    left_out = tuple(key for key in tensors if key.startswith(_TEXT))
    layers, others = _group(file, {key: tensors[key] for key in tensors if key not in left_out})
    own = _OwnNames(transformer)
    config = read_peft_config(file, metadata, list(layers))
    for name, parts in layers.items():
        plain = _PREFIX.sub("", name, count=1)
        if name.startswith(PEFT_PREFIX) and own.path(name) and config is None and "alpha" not in parts:
            raise MismatchError(
                f"--lora '{file}' was saved by peft, which keeps its strength in adapter_config.json; put that file "
                "beside it"
            )
        _multiply(parts, layer_strength(file, name, plain, parts, config))
    differences = {key: others.pop(key) for key in list(others) if _DIFFERENCE.fullmatch(key)}
    foreign = {name: parts for name, parts in layers.items() if own.path(name) is None}
    keys = _keys_by_layer(tensors)
    found = [(path, name, parts, keys[name]) for name, parts in layers.items() if (path := own.path(name)) is not None]
    converted, unmatched = _convert(family, file, foreign, others, keys, partial)
    found += [(path, path, parts, own_keys) for path, (parts, own_keys) in converted.items()]
    changes, made_of = dict[str, LayerChange](), dict[str, tuple[str, ...]]()
    modules = dict(transformer.named_modules())
    for path, name, parts, own_keys in found:
        if path in changes:
            raise MismatchError(f"--lora '{file}' changes '{path}' twice, the second time as '{name}'; save it again")
        if partial and not isinstance(modules.get(path), nn.Linear):
            unmatched += own_keys
            continue
        changes[path], made_of[path] = _layer_change(family, file, path, parts, modules.get(path)), own_keys
    if partial:
        unmatched, differences = (*unmatched, *differences), {}
    if not changes and not differences:
        raise MismatchError(
            f"--lora '{file}' changes nothing in a {family.transformer}; give one that was trained for it"
        )
    differences = _differences(family, file, differences, transformer)
    return Changes(changes, differences, left_out, made_of, tuple(dict.fromkeys(unmatched)))


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import safe_open

    tensors = dict[str, Tensor]()
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 - not a dict
            value = opened.get_tensor(key)
            if not value.is_floating_point() and value.numel() > 1:  # alpha may be an integer
                raise MismatchError(
                    f"--lora '{file}' holds '{key}' as {value.dtype}: it is quantized already; give one in 16 or "
                    "32 bits"
                )
            tensors[key] = value.float()
        return tensors, opened.metadata() or {}


def _group(file: Path, tensors: Mapping[str, Tensor]) -> tuple[_Layers, dict[str, Tensor]]:
    """The parts of every layer's change, and what is none."""
    layers, others = _Layers(), dict[str, Tensor]()
    for key, value in tensors.items():
        for mark, method in _METHODS.items():
            if mark in key:
                raise MismatchError(
                    f"--lora '{file}' holds '{key}': {method}, which is not followed; give a plain LoRA, or a "
                    "checkpoint that it is merged into"
                )
        if (match := _MATRIX.fullmatch(key)) and match[3] == "weight":
            part = _MATRICES[match[2]]
        elif match and _MATRICES[match[2]] == "up":
            part = "bias"
        elif match := _BESIDE.fullmatch(key):
            part = "alpha" if match[2] == "alpha" else "magnitude"
        else:
            others[key] = value
            continue
        if part in layers.setdefault(match[1], {}):
            raise MismatchError(f"--lora '{file}' holds '{key}' twice, under another name too; save it again")
        layers[match[1]][part] = value
    for name, parts in layers.items():
        missing = [part for part in ("down", "up") if part not in parts]
        if missing:
            raise MismatchError(
                f"--lora '{file}': '{name}' has {', '.join(sorted(parts))} but no matrix '{missing[0]}'; give a whole "
                "file"
            )
        for part in ("down", "up"):
            if not (parts[part].ndim and parts[part].numel()):
                raise DamagedFileError(
                    f"--lora '{file}': the matrix '{part}' of '{name}' is of {[*parts[part].shape]}, expected a matrix "
                    "with numbers in it; save the LoRA again"
                )
    return layers, others


def _keys_by_layer(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The layers that tensors are named after, with these."""
    keys = dict[str, tuple[str, ...]]()
    for key in tensors:
        if match := _MATRIX.fullmatch(key) or _BESIDE.fullmatch(key):
            keys[match[1]] = (*keys.get(match[1], ()), key)
    return keys


def _multiply(parts: dict[str, Tensor], strength: float) -> None:
    """W + strength · up · down, with a bias likewise; alpha = rank says nothing any more."""
    parts.pop("alpha", None)
    for part in {"up", "bias"} & set(parts):
        parts[part] = parts[part] * strength


class _OwnNames:
    """Which layers of a file are called as diffusers calls them, with dots or with underscores."""

    def __init__(self, transformer: nn.Module) -> None:
        paths = [path for path, module in transformer.named_modules() if isinstance(module, nn.Linear)]
        self._paths = {path.replace(".", "_"): path for path in paths} | {path: path for path in paths}
        self._patterns = {_NUMBER.sub("0", name) for name in self._paths}

    def path(self, name: str) -> str | None:
        """The layer's path, which another number of blocks may not have; None for a name of another kind."""
        candidates = (_PREFIX.sub("", name, count=1), _FLAT.sub("", name, count=1))
        exact = (self._paths[candidate] for candidate in candidates if candidate in self._paths)
        similar = (candidate for candidate in candidates if _NUMBER.sub("0", candidate) in self._patterns)
        return next(exact, None) or next(similar, None)


# ------------------------------------------------------------------------------------- authors' and trainers' names


def _convert(
    family: Family,
    file: Path,
    layers: _Layers,
    others: Mapping[str, Tensor],
    keys: Mapping[str, tuple[str, ...]],
    partial: bool,
) -> tuple[dict[str, tuple[dict[str, Tensor], tuple[str, ...]]], tuple[str, ...]]:
    """Diffusers' conversion of other names than its own.

    Args:
        family: of the transformer.
        file: for messages.
        layers: in other names.
        others: tensors that are named after no layer.
        keys: layer in the file → its tensors there.
        partial: give back what changes nothing instead of refusing it.

    Returns:
        The transformer's layer → the parts of its change and the file's tensors for it; and tensors for none.

    Raises:
        DamagedFileError: it does not know them.
        MismatchError: a tensor is left over, or arrives where the transformer has no layer.
    """
    if not layers and not others:
        return {}, ()
    pipeline = family.load_pipeline_class()
    if not hasattr(pipeline, "lora_state_dict"):
        raise MismatchError(
            f"--lora '{file}' holds '{next(iter((*layers, *others)))}', which is no name of a layer in a "
            f"{family.transformer}: diffusers has no converter for LoRAs of a {family.pipeline}; give one in its own "
            "names"
        )
    given = _spelled(family, file, layers, others)
    expected = sources(given.values())
    try:
        converted = dict(pipeline.lora_state_dict(given))
    except Exception as error:  # what is raised depends on the dialect
        raise DamagedFileError(
            f"--lora '{file}' is not a LoRA that diffusers understands ({one_line(error)}); give another file"
        ) from error
    found, strange = _group(file, {_PREFIX.sub("", key, count=1): converted[key] for key in converted})
    arrived = (value for parts in found.values() for value in parts.values())
    lost = sorted(expected - sources(arrived))
    if (lost or strange) and not partial:
        raise MismatchError(
            f"--lora '{file}' holds '{(lost or sorted(strange))[0]}', which changes nothing in a {family.transformer} "
            "as diffusers reads it; give a LoRA that was trained for this model"
        )

    def in_file(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(key for name in sorted(names) for key in keys.get(name.rpartition(" (")[0], (name,)))

    plain = {
        path: ({part: value.as_subclass(Tensor) for part, value in parts.items()}, in_file(sources(parts.values())))
        for path, parts in found.items()
    }
    return plain, in_file(lost)


def _spelled(family: Family, file: Path, layers: _Layers, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a converter is given them, traced by their names in the file."""
    given = {key: trace(value, key) for key, value in others.items()}
    for name, parts in layers.items():
        for part, value in parts.items():
            key = _spell(family, name, part)
            if key in given:
                raise MismatchError(
                    f"--lora '{file}' holds '{key}' twice, the second time of '{name}', with another prefix; save it "
                    "again"
                )
            given[key] = trace(value, f"{name} ({part})")
    return given


def _spell(family: Family, name: str, part: str) -> str:
    """A part of a layer's change as diffusers' converter for the architecture looks for it."""
    in_one_word = _FLAT.match(name)
    layer = family.lora_layer(name) if in_one_word else f"diffusion_model.{_PREFIX.sub('', name, count=1)}"
    if part in ("up", "down"):
        return family.lora_key(layer, part)
    return f"{layer}.lora_up.bias" if part == "bias" else f"{layer}.{part}"


# ------------------------------------------------------------------------------------------------------- what arrives


def _layer_change(
    family: Family, file: Path, path: str, parts: Mapping[str, Tensor], linear: nn.Module | None
) -> LayerChange:
    """One layer's change, which fits the layer."""
    if not isinstance(linear, nn.Linear):
        raise MismatchError(
            f"--lora '{file}' changes '{path}', which this {family.transformer} does not have as a linear layer; give "
            "one that was trained for this model"
        )
    up, down, magnitude, bias = parts["up"], parts["down"], parts.get("magnitude"), parts.get("bias")
    got = {"down": [*down.shape], "up": [*up.shape]}
    expected = {"down": [len(down), linear.in_features], "up": [linear.out_features, len(down)]}
    for part, value in (("bias", bias), ("magnitude", magnitude)):
        if value is not None:
            got[part], expected[part] = [*value.shape], [linear.out_features]
    for part, shape in got.items():
        if shape != expected[part]:
            raise MismatchError(
                f"--lora '{file}' does not fit this {family.transformer}: '{path}' has the matrix '{part}' of {shape}, "
                f"expected {expected[part]}; give one that was trained for this model"
            )
    if bias is not None and linear.bias is None:
        raise MismatchError(
            f"--lora '{file}' changes the bias of '{path}', which this {family.transformer} does not have; give one "
            "that was trained for this model"
        )
    return LayerChange(up, down, bias, magnitude)


def _differences(
    family: Family, file: Path, tensors: Mapping[str, Tensor], transformer: nn.Module
) -> dict[str, Tensor]:
    """Differences of whole parameters, in the names that Wan's trainers use, by parameter."""
    result, shapes = dict[str, Tensor](), {name: tuple(value.shape) for name, value in transformer.named_parameters()}
    for path, module in transformer.named_modules():
        if isinstance(module, nn.Linear):  # of a stored one the weight is no parameter
            shapes[f"{path}.weight"] = (module.out_features, module.in_features)
    for key, value in tensors.items():
        match = _DIFFERENCE.fullmatch(key)
        assert match is not None
        name = family.own_name(_PREFIX.sub("", f"{match[1]}.{_DIFFERENCES[match[2]]}", count=1))
        if shapes.get(name) != value.shape:
            raise MismatchError(
                f"--lora '{file}' holds '{key}' of {list(value.shape)}, which fits no weight of this "
                f"{family.transformer}; give one that was trained for this model"
            )
        if name in result:
            raise MismatchError(f"--lora '{file}' changes '{name}' twice, the second time as '{key}'; save it again")
        result[name] = value
    return result
