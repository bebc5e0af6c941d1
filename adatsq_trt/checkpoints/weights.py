"""Weights of a diffusers component on disk: which file holds which tensor, and whether they are whole.

Everything here looks at headers and hashes only; a pickle is never opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from adatsq_trt.errors import DamagedFileError, MismatchError, MissingFileError, UserError
from adatsq_trt.files import read_json_model, sha256

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_STEMS = ("diffusion_pytorch_model", "model")  # of diffusers and of transformers
_TYPES = ("BF16", "F16", "F32", "F64")  # as safetensors calls them
_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "download or save the model again"
ValueT = TypeVar("ValueT")


class _ShardIndex(BaseModel):
    """`*.safetensors.index.json`: tensor → name of the file that holds it."""

    weight_map: dict[str, str]


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one component.

    Attributes:
        files: those that hold tensors, sorted.
        shapes: tensor → its shape.
        places: tensor → its file.
        dtypes: tensor → safetensors' name of its type, such as "BF16".
        index: the file that lists the shards, where there are several.
        variant: a part of the files' names, such as "fp16", or None.
        prefix: of the names in the files, which tensors have here without it.
    """

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Path]
    dtypes: Mapping[str, str]
    index: Path | None = None
    variant: str | None = None
    prefix: str = ""

    @property
    def all_files(self) -> tuple[Path, ...]:
        """The index too."""
        return self.files if self.index is None else (self.index, *self.files)


def refuse_pickle(file: Path) -> None:
    """Refuse a file that could run code when it is opened.

    Raises:
        UserError: says how to convert it.
    """
    if file.suffix in PICKLES:
        raise UserError(
            f"'{file}' is a pickle, which can run code when it is opened, so it is never read; load it where you trust "
            "it and save it again with diffusers' save_pretrained(FOLDER, safe_serialization=True), or use a "
            ".safetensors file"
        )


class Prefixed(Mapping[str, Tensor]):
    """Tensors of several components, by "<component>.<tensor>"."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Join some components."""
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of the component that its name begins with."""
        part, _, rest = name.partition(".")
        return self._parts[part][rest]

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return (f"{part}.{name}" for part, own in self._parts.items() for name in own)

    def __len__(self) -> int:
        """How many there are."""
        return sum(map(len, self._parts.values()))


def joined_weights(parts: Mapping[str, WeightFiles]) -> WeightFiles:
    """The weight files of several components as those of one, whose tensors are "<component>.<tensor>"."""

    def named(values: Mapping[str, Mapping[str, ValueT]]) -> dict[str, ValueT]:
        return {f"{part}.{name}": value for part, own in values.items() for name, value in own.items()}

    return WeightFiles(
        tuple(file for own in parts.values() for file in own.files),
        named({part: own.shapes for part, own in parts.items()}),
        named({part: own.places for part, own in parts.items()}),
        named({part: own.dtypes for part, own in parts.items()}),
    )


def find_weights(folder: Path) -> WeightFiles:
    """The safetensors files of a component's folder, with their headers.

    Raises:
        MissingFileError: there are none, or a shard of the index is not there.
        DamagedFileError: the index or a header cannot be read, or a shard lacks a tensor of the index.
        UserError: the weights are there as a pickle only, or in several variants.
    """
    found = [(variant, file) for stem in _STEMS for variant, file in _candidates(folder, stem)]
    variants = {variant for variant, _ in found}
    if len(variants) > 1 and None not in variants:
        raise UserError(
            f"'{folder}' has weights in {len(variants)} variants ({', '.join(sorted(map(str, variants)))}), expected "
            f"{_STEMS[0]}.safetensors or one variant; leave the files of one there"
        )
    for variant, file in found:
        if variant is None or None not in variants:
            return replace(_shards(file) if file.suffix == ".json" else read_headers([file]), variant=variant)
    for file in sorted(folder.glob("*")):
        refuse_pickle(file)
    raise MissingFileError(
        f"'{folder}' has no weights: expected {_STEMS[0]}.safetensors or its index with shards; {_AGAIN}"
    )


def _candidates(folder: Path, stem: str) -> Iterator[tuple[str | None, Path]]:
    """Indices of shards, then single files, each with its variant, as diffusers and transformers name them."""
    for pattern in (rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json", rf"{stem}(?:\.(\w+))?\.safetensors"):
        for file in sorted(folder.glob(f"{stem}*")):
            if file.is_file() and (match := re.fullmatch(pattern, file.name)):
                yield match[1], file


def _shards(index: Path) -> WeightFiles:
    where = read_json_model(index, _ShardIndex, _AGAIN).weight_map
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name:
            raise DamagedFileError(f"'{index}' names the shard '{name}', expected a file beside it; {_AGAIN}")
        refuse_pickle(index.parent / name)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise MissingFileError(
            f"'{index.parent / missing[0]}' is missing: '{index.name}' lists {len(names)} shards, {len(missing)} of "
            f"them are not there; {_AGAIN}"
        )
    found = read_headers([index.parent / name for name in names])
    for tensor, name in where.items():
        got = found.places.get(tensor)
        if got is None or got.name != name:
            raise DamagedFileError(
                f"'{index.parent / name}' does not hold '{tensor}', which '{index.name}' expects there; {_AGAIN}"
            )
    return replace(found, index=index)


def read_headers(files: Sequence[Path]) -> WeightFiles:
    """Names and shapes of the tensors in some safetensors files.

    Raises:
        DamagedFileError: a file is truncated or not safetensors, or two hold the same tensor.
    """
    from safetensors import SafetensorError, safe_open

    shapes, places, dtypes = dict[str, tuple[int, ...]](), dict[str, Path](), dict[str, str]()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name in places:
                        raise DamagedFileError(f"'{file}' holds '{name}', as does '{places[name].name}'; {_AGAIN}")
                    part = opened.get_slice(name)
                    shapes[name], places[name], dtypes[name] = tuple(part.get_shape()), file, part.get_dtype()
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"'{file}' is not a complete safetensors file ({error}); {_AGAIN}") from error
    return WeightFiles(tuple(sorted(files)), shapes, places, dtypes)


def require_shapes(weights: WeightFiles, model: nn.Module, config: Path) -> None:
    """Refuse weights that are not those of the configured model: diffusers only warns, and fills gaps at random.

    Args:
        weights: of the component.
        model: made from the configuration, on any device.
        config: the configuration, as messages name it.

    Raises:
        DamagedFileError: a tensor is missing, too much, or of another shape; names it and its file.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights.shapes:
            raise DamagedFileError(
                f"'{weights.files[0].parent}' has no tensor '{name}', which '{config}' expects as {list(shape)}; "
                f"{_AGAIN}"
            )
        if weights.shapes[name] != shape:
            raise DamagedFileError(
                f"'{weights.places[name]}' holds '{name}' as {list(weights.shapes[name])}, '{config}' expects "
                f"{list(shape)}; {_AGAIN}"
            )
    extra = sorted(set(weights.shapes) - set(expected))
    if extra:
        raise DamagedFileError(
            f"'{weights.places[extra[0]]}' holds '{extra[0]}', which a model of '{config}' does not have; {_AGAIN}"
        )


def refuse_eight_bits(weights: WeightFiles) -> None:
    """Refuse weights that are quantized already, and say nothing of it in their configuration.

    Raises:
        MismatchError: names the first tensor.
    """
    for name, dtype in weights.dtypes.items():
        if name.endswith(".weight") and dtype not in _TYPES:
            raise MismatchError(
                f"'{weights.places[name]}' holds '{name}' as {dtype}, expected {', '.join(_TYPES)}: it is quantized "
                "already; give the checkpoint in 16 or 32 bits"
            )


def verified_sha256(file: Path) -> str:
    """Hash of a file, compared with the one that the hub published where the download has kept that.

    Raises:
        DamagedFileError: the file is not what was published.
    """
    got, expected = sha256(file), _published_sha256(file)
    if expected is not None and got != expected:
        raise DamagedFileError(
            f"'{file}' was altered or is incomplete: got sha256 {got}, the hub published {expected}; delete it and "
            "download it again"
        )
    return got


def _published_sha256(file: Path) -> str | None:
    """The hub's cache names a large file by its hash; a download to a folder keeps it in a file of metadata."""
    resolved = file.resolve()
    if resolved.parent.name == "blobs" and _SHA256.fullmatch(resolved.name):
        return resolved.name
    for folder in file.absolute().parents:
        metadata = folder / ".cache" / "huggingface" / "download" / f"{file.absolute().relative_to(folder)}.metadata"
        if metadata.is_file():
            lines = metadata.read_text(encoding="utf-8", errors="replace").splitlines()
            etag = lines[1].strip() if len(lines) > 1 else ""
            return etag if _SHA256.fullmatch(etag) else None
    return None


def require_finite(tensors: Iterable[tuple[str, Tensor]], source: Path) -> None:
    """Refuse weights that are NaN or infinite: every figure after them would be.

    Raises:
        DamagedFileError: names the first tensor and says how many of its numbers are not finite.
    """
    for name, value in tensors:
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise DamagedFileError(
                f"'{source}': weight '{name}' has {bad} of {value.numel()} numbers that are NaN or infinite; it may "
                "have been saved in a type that is too small (fp16), or its training diverged; use another checkpoint"
            )
