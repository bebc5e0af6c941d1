"""Number formats: the unit that a policy assigns to a (step, layer).

A format says how weights and activations are represented, what that costs in bits, and which targets accelerate it
through which path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from adatsq_trt.errors import UnknownNameError, UnsupportedFormatError


class Element(Enum):
    """The number grid of a tensor's elements."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    E4M3 = "e4m3"
    E2M1 = "e2m1"
    INT = "int"


class Granularity(Enum):
    """How many elements share a scale."""

    NONE = "none"
    CHANNEL = "channel"  # weights: one scale per output channel
    GROUP = "group"  # weights: one per output channel and `group_size` inputs; activations: the same along channels
    TENSOR = "tensor"  # activations: one static scale per (step, layer)
    TOKEN = "token"  # activations: one dynamic scale per token


@dataclass(frozen=True)
class Grid:
    """How one tensor of a linear layer is represented.

    Attributes:
        element: the number type.
        bits: bits of one element; integers are signed and symmetric: -qmax to qmax, qmax = 2^(bits-1) - 1.
        granularity: how scales are shared.
        group_size: elements along the input axis that share a scale, when granularity is GROUP; see `group_of`.
        scale_bits: bits of one stored scale.
    """

    element: Element
    bits: int
    granularity: Granularity = Granularity.NONE
    group_size: int = 0
    scale_bits: int = 0

    @property
    def maximum(self) -> float:
        """Largest magnitude on the grid."""
        if self.element is Element.INT:
            return float(2 ** (self.bits - 1) - 1)
        return {Element.E4M3: 448.0, Element.E2M1: 6.0}[self.element]

    def group_of(self, in_features: int, *, whole: bool = False) -> int | None:
        """Inputs of a layer that share a scale, for grids in groups: the largest group that divides its width.

        Integers may be in smaller groups than `group_size`; blocks of e2m1 have one size only.

        Args:
            in_features: K of the layer.
            whole: `group_size` is the only one, as enterprise TensorRT and the plugin's kernels have it.

        Returns:
            None where none divides K.
        """
        smaller = GROUPS if self.element is Element.INT and not whole else ()
        sizes = (self.group_size, *(size for size in smaller if size < self.group_size))
        return next((size for size in sizes if in_features % size == 0), None)

    @property
    def dynamic(self) -> bool:
        """Whether elements are integers of an activation whose scales are measured at every call."""
        return self.element is Element.INT and self.granularity in (Granularity.TOKEN, Granularity.GROUP)

    @property
    def is_float(self) -> bool:
        """Whether elements are plain floating-point numbers without a scale."""
        return self.element in (Element.FP32, Element.BF16, Element.FP16)


@dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    Attributes:
        name: as in policies and on the command line.
        weight: grid of the weights.
        activation: grid of the layer's input.
        weight_bits: nominal bits, without scales, as `mean_bits` counts them.
        activation_bits: nominal bits of the activation.
    """

    name: str
    weight: Grid
    activation: Grid

    @property
    def weight_bits(self) -> int:
        """Nominal weight bits, without scales."""
        return self.weight.bits

    @property
    def activation_bits(self) -> int:
        """Nominal activation bits, without scales."""
        return self.activation.bits

    @property
    def bits(self) -> float:
        """(nominal weight bits + nominal activation bits) / 2: the unit of `mean_bits` and `--budget-bits`."""
        return (self.weight_bits + self.activation_bits) / 2

    @property
    def static_activation(self) -> bool:
        """Whether the activation scale is measured at calibration, per (step, layer)."""
        return self.activation.granularity is Granularity.TENSOR or self.activation.element is Element.E2M1

    @property
    def scaled_activation(self) -> bool:
        """Whether a number for each (step, layer) enters the activation's scale: a static scale or a clipping ratio.

        8-bit integers with dynamic scales have none: the kernels that run them take none, and clipping gains nothing.
        """
        return self.static_activation or (self.activation.dynamic and self.activation_bits < 8)

    def stored_weight_bits(self, in_features: int) -> float:
        """Bits of one stored weight, its share of the scales included."""
        return self.weight.bits + _scale_share(self.weight, in_features)

    def moved_activation_bits(self, in_features: int) -> float:
        """Bits of one activation, its share of dynamic scales included."""
        return self.activation.bits + _scale_share(self.activation, in_features)


def _scale_share(grid: Grid, in_features: int) -> float:
    """Scale bits per element."""
    if grid.granularity is Granularity.GROUP:
        return grid.scale_bits / (grid.group_of(in_features) or grid.group_size)
    if grid.granularity in (Granularity.CHANNEL, Granularity.TOKEN):
        return grid.scale_bits / in_features
    return 0.0


GROUP = 64
GROUPS = (GROUP, 32, 16)  # of integer weights, the largest first: TensorRT-RTX keeps weights in 4 bits with each
NVFP4_BLOCK = 16


# Formats with one weight grid share a layer's bytes: their codes and scales are the same.
_INT_GROUP = {bits: Grid(Element.INT, bits, Granularity.GROUP, GROUP, 16) for bits in range(2, 8)}
_INT8_CHANNEL = Grid(Element.INT, 8, Granularity.CHANNEL, scale_bits=16)
_FP8_CHANNEL = Grid(Element.E4M3, 8, Granularity.CHANNEL, scale_bits=16)
_FP4_BLOCK = Grid(Element.E2M1, 4, Granularity.GROUP, NVFP4_BLOCK, 8)
_INT_TOKEN = {bits: Grid(Element.INT, bits, Granularity.TOKEN, scale_bits=32) for bits in range(3, 9)}
_PLAIN = {e: Grid(e, bits) for e, bits in ((Element.FP32, 32), (Element.BF16, 16), (Element.FP16, 16))}


def _simulated() -> Iterator[Format]:
    """The paper's grids, and every pair of them: integer weights, integer activations per token."""
    for weight in (*_INT_GROUP.values(), _INT8_CHANNEL):
        yield from (Format(f"w{weight.bits}a{bits}", weight, grid) for bits, grid in _INT_TOKEN.items())


def _weights_only() -> Iterator[Format]:
    """Integer weights in groups with 16-bit activations; those of 4 bits are `int4wo`."""
    yield from (Format(f"w{bits}a16", _INT_GROUP[bits], _PLAIN[Element.BF16]) for bits in (2, 3, 5, 6))


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp32", _PLAIN[Element.FP32], _PLAIN[Element.FP32]),
        Format("bf16", _PLAIN[Element.BF16], _PLAIN[Element.BF16]),
        Format("fp16", _PLAIN[Element.FP16], _PLAIN[Element.FP16]),
        Format("fp8", _FP8_CHANNEL, Grid(Element.E4M3, 8, Granularity.TENSOR, scale_bits=16)),
        Format("fp8a16", _FP8_CHANNEL, _PLAIN[Element.BF16]),
        Format("nvfp4", _FP4_BLOCK, _FP4_BLOCK),
        Format("nvfp4a16", _FP4_BLOCK, _PLAIN[Element.BF16]),
        Format("int4wo", _INT_GROUP[4], _PLAIN[Element.BF16]),
        Format("w8a8s", _INT8_CHANNEL, Grid(Element.INT, 8, Granularity.TENSOR, scale_bits=16)),
        Format("w8a16", _INT8_CHANNEL, _PLAIN[Element.BF16]),
        Format("w8a32", _INT8_CHANNEL, _PLAIN[Element.FP32]),
        *_simulated(),
        *_weights_only(),
    )
}

FORMAT_SETS: dict[str, tuple[str, ...]] = {
    "paper": ("w3a3", "w4a4", "w8a8"),
    "paper-fine": ("w3a3", "w4a4", "w5a5", "w6a6", "w8a8"),
    "paper-low": ("w2a3", "w2a4", "w3a3", "w4a4", "w8a8"),
    "paper-pairs": ("w2a3", "w2a4", "w3a3", "w3a4", "w4a3", "w3a5", "w4a4", "w4a5", "w5a4", "w4a6", "w5a5", "w6a6"),
    "grid": tuple(f"w{weight}a{activation}" for weight in (3, 4, 5, 6) for activation in (3, 4, 5, 6)),
    "blackwell": ("nvfp4", "nvfp4a16", "fp8", "fp8a16", "int4wo", "bf16"),
    "ada": ("int4wo", "fp8", "fp8a16", "bf16"),
    "hopper": ("w4a8", "int4wo", "w8a8", "w8a16", "fp8", "bf16"),
    "ampere": ("int4wo", "fp16"),
    "cpu": ("w8a8s", "w8a32", "fp32"),
}

# Budgets that leave room for a choice; for a list of formats halfway between the two cheapest.
_DEFAULT_BUDGETS = {
    **dict.fromkeys(("paper", "paper-fine", "paper-pairs", "grid"), 4.0),
    **{"paper-low": 3.0, "blackwell": 6.0, "ada": 9.0, "hopper": 7.0, "ampere": 12.0, "cpu": 14.0},
}


@dataclass(frozen=True)
class Target:
    """A kind of machine and the formats that its Q/DQ path accelerates.

    Attributes:
        name: as on the command line.
        formats: formats that Q/DQ graphs accelerate (TensorRT-RTX 1.7 for GPUs, ONNX Runtime for `cpu`).
        default_set: name of the set that `build engine` uses when none is asked for.
        compute_capability: SM number for GPUs, None for the CPU.
        plugin_formats: formats that layout `plugin` accelerates (enterprise TensorRT).
        tensorrt_formats: formats that Q/DQ graphs accelerate in enterprise TensorRT, by its vendor's account.
    """

    name: str
    formats: frozenset[str]
    default_set: str
    compute_capability: int | None
    plugin_formats: frozenset[str] = frozenset()
    tensorrt_formats: frozenset[str] = frozenset()

    def accelerated(self, layout: str, backend: str = "rtx") -> frozenset[str]:
        """Formats that a layout accelerates in plans of a backend."""
        if layout == PLUGIN_LAYOUT:
            return self.plugin_formats
        return self.tensorrt_formats if backend == "tensorrt" and self.compute_capability is not None else self.formats


PLUGIN_LAYOUT, PLUGIN_SET = "plugin", "hopper"
PLUGIN_FORMATS = frozenset({"w8a8", "w8a16", "w4a8", "int4wo", "fp16", "bf16", "fp8"})
_PLUGIN_WITHOUT_FP8 = PLUGIN_FORMATS - {"fp8"}
_TENSORRT = frozenset({"bf16", "fp16", "int4wo", "w8a8s"})
_RTX = frozenset({"bf16", "fp16", "int4wo"})
_RTX_SM89 = _RTX | {"fp8", "fp8a16"}
_RTX_SM120 = _RTX_SM89 | {"nvfp4", "nvfp4a16"}

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("sm80", _RTX, "ampere", 80, _PLUGIN_WITHOUT_FP8, _TENSORRT),
        Target("sm86", _RTX, "ampere", 86, _PLUGIN_WITHOUT_FP8, _TENSORRT),
        Target("sm89", _RTX_SM89, "ada", 89, PLUGIN_FORMATS, _TENSORRT | {"fp8"}),
        Target("sm90", frozenset(), "hopper", 90, PLUGIN_FORMATS, _TENSORRT | {"fp8"}),
        Target("sm120", _RTX_SM120, "blackwell", 120, PLUGIN_FORMATS, _TENSORRT | {"fp8", "nvfp4"}),
        Target("cpu", frozenset({"fp32", "w8a8s", "w8a32"}), "cpu", None),
    )
}


# Such a name and a group: `w4a4g32` is w4a4 with activations in groups of 32 channels.
_GROUPED = re.compile(rf"(w\d+a\d+)g({'|'.join(str(size) for size in GROUPS)})")
_GROUP_SCALE_BITS = 16


def format_named(name: str) -> Format:
    """Look a format up.

    Formats whose activations are integers with a scale per token also exist with scales per group of channels of each
    token: their names end with g and the group's size.

    Raises:
        UnknownNameError: no such format.
    """
    found = _lookup(name)
    if found is None:
        raise UnknownNameError("format", name, FORMATS)
    return found


def is_format(name: str) -> bool:
    """Whether there is a format of that name."""
    return _lookup(name) is not None


def _lookup(name: str) -> Format | None:
    match = _GROUPED.fullmatch(name)
    if match is None:
        return FORMATS.get(name)
    whole = FORMATS.get(match[1])
    if whole is None or whole.activation.granularity is not Granularity.TOKEN:
        return None
    grid = Grid(Element.INT, whole.activation.bits, Granularity.GROUP, int(match[2]), _GROUP_SCALE_BITS)
    return replace(whole, name=name, activation=grid)


def target_named(name: str) -> Target:
    """Look a target up.

    Raises:
        UnknownNameError: no such target.
    """
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    return TARGETS[name]


def resolve_formats(names: str) -> tuple[Format, ...]:
    """A set's name or a comma-separated list of formats → formats, cheapest first.

    Raises:
        UnknownNameError: neither a set nor formats.
    """
    if names in FORMAT_SETS:
        members: Iterable[str] = FORMAT_SETS[names]
    elif "," in names or is_format(names):
        members = dict.fromkeys(part.strip() for part in names.split(","))
    else:
        raise UnknownNameError("format or format set", names, [*FORMAT_SETS, *FORMATS])
    return tuple(sorted((format_named(name) for name in members), key=lambda f: (f.bits, f.name)))


def default_formats(targets: Sequence[Target], layout: str = "embedded", backend: str = "rtx") -> str:
    """Choose the candidates where none are asked for: the formats of one set that all targets accelerate.

    The set is the oldest target's, unless another target's leaves more; in layout `plugin` it is that of the kernels.

    Args:
        targets: at least one.
        layout: of the plans.
        backend: compiler of the plans.

    Returns:
        A set's name where all of it is accelerated, else a list.

    Raises:
        UnsupportedFormatError: several targets accelerate nothing in common.
    """
    ordered = sorted(targets, key=lambda target: target.compute_capability or math.inf)
    able = frozenset(FORMATS).intersection(*(target.accelerated(layout, backend) for target in targets))
    names = [PLUGIN_SET] if layout == PLUGIN_LAYOUT else [target.default_set for target in ordered]
    kept = {name: [member for member in FORMAT_SETS[name] if member in able] for name in names}
    best = max(names, key=lambda name: len(kept[name]))
    if len(kept[best]) == len(FORMAT_SETS[best]):
        return best
    if not kept[best]:
        if len(targets) > 1:
            raise UnsupportedFormatError(
                f"targets {', '.join(target.name for target in targets)} accelerate no format of their sets in common "
                f"in layout {layout}; build for each in a run of its own, or choose with --formats"
            )
        return best  # refused by name afterwards
    return ",".join(kept[best])


def default_budget(names: str) -> float:
    """The budget in mean bits that is used when none is asked for.

    Args:
        names: a format set's name or a comma-separated list of formats.
    """
    if names in _DEFAULT_BUDGETS:
        return _DEFAULT_BUDGETS[names]
    bits = sorted({fmt.bits for fmt in resolve_formats(names)})
    return sum(bits[:2]) / len(bits[:2])


def require_accelerated(
    formats: Iterable[Format], targets: Iterable[Target], layout: str = "embedded", backend: str = "rtx"
) -> None:
    """Refuse formats that one of the targets cannot accelerate in a layout with a backend.

    Raises:
        UnsupportedFormatError: names the formats and those that would do.
    """
    wanted = list(formats)
    for target in targets:
        able = target.accelerated(layout, backend)
        refused = [f.name for f in wanted if f.name not in able]
        if refused:
            other = PLUGIN_LAYOUT if layout != PLUGIN_LAYOUT else "embedded"
            here = " in this layout" if set(refused) <= target.accelerated(other) else ""
            elsewhere = f", or --layout {other}" if here else ""
            raise UnsupportedFormatError(
                f"target '{target.name}' does not accelerate {', '.join(refused)}{here}; it accelerates "
                f"{', '.join(sorted(able)) or 'nothing'}; choose among these with --formats{elsewhere}, or pass "
                "--simulate to study the policy without engines"
            )


def require_shapes(
    formats: Iterable[Format],
    layers: Iterable[tuple[str, int]],
    possible: Iterable[str] = FORMATS,
    *,
    whole_groups: bool = False,
) -> None:
    """Refuse formats in groups where none divides a layer's input width.

    Args:
        formats: the candidate formats.
        layers: (module path, in_features).
        possible: names of the formats that could be chosen instead.
        whole_groups: whether there are no smaller groups than a format's own (`Grid.group_of`).

    Raises:
        UnsupportedFormatError: names the layer, the width, the group and the formats that suit all layers.
    """
    layers = list(layers)

    def refused_by(fmt: Format) -> tuple[str, int, Grid] | None:
        grids = [grid for grid in (fmt.weight, fmt.activation) if grid.group_size]
        unfit = ((*layer, g) for layer in layers for g in grids if g.group_of(layer[1], whole=whole_groups) is None)
        return next(unfit, None)

    for fmt in formats:
        if (unfit := refused_by(fmt)) is None:
            continue
        name, width, grid = unfit
        least = grid.group_size if whole_groups or grid.element is not Element.INT else GROUPS[-1]
        suitable = [other for other in sorted(possible) if refused_by(format_named(other)) is None]
        raise UnsupportedFormatError(
            f"layer '{name}': in_features {width} is not a multiple of {least}, the smallest group of format "
            f"'{fmt.name}' here; choose formats that suit all layers with --formats: {', '.join(suitable) or 'none'}"
        )
