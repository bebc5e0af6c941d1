"""The table of formats, the sets and what targets accept."""

import pytest

from adatsq_trt.errors import UnknownNameError, UnsupportedFormatError
from adatsq_trt.formats import (
    FORMAT_SETS,
    FORMATS,
    TARGETS,
    default_formats,
    format_named,
    is_format,
    require_accelerated,
    require_shapes,
    resolve_formats,
    target_named,
)


@pytest.mark.parametrize(
    ("name", "bits", "stored_weight", "moved_activation"),
    [
        ("fp32", 32, 32, 32),
        ("bf16", 16, 16, 16),
        ("fp8", 8, 8 + 16 / 128, 8),
        ("nvfp4", 4, 4.5, 4.5),
        ("int4wo", 10, 4.25, 16),
        ("w8a8s", 8, 8 + 16 / 128, 8),
        ("w8a8", 8, 8 + 16 / 128, 8 + 32 / 128),
        ("w4a8", 6, 4.25, 8 + 32 / 128),
        ("w3a3", 3, 3.25, 3 + 32 / 128),
        ("w6a6", 6, 6.25, 6 + 32 / 128),
    ],
)
def test_bits(name: str, bits: float, stored_weight: float, moved_activation: float) -> None:
    fmt = FORMATS[name]
    assert fmt.bits == bits
    assert fmt.stored_weight_bits(128) == stored_weight
    assert fmt.moved_activation_bits(128) == moved_activation


def test_static_activations_are_those_without_a_scale_per_token() -> None:
    assert {f.name for f in FORMATS.values() if f.static_activation} == {"fp8", "nvfp4", "w8a8s"}


@pytest.mark.parametrize(
    ("name", "width", "moved"),
    [("w4a4g64", 128, 4.25), ("w4a4g32", 128, 4.5), ("w3a5g16", 128, 6), ("w4a4g64", 96, 4.5), ("w4a4g64", 80, 5)],
)
def test_activations_in_groups_count_the_scales_of_the_group_that_divides_the_layer(
    name: str, width: int, moved: float
) -> None:
    fmt, whole = format_named(name), FORMATS[name.partition("g")[0]]
    assert (fmt.name, fmt.bits, fmt.weight) == (name, whole.bits, whole.weight)
    assert fmt.moved_activation_bits(width) == moved
    assert [f.name for f in resolve_formats(f"w4a5,{name}")] == sorted(
        [name, "w4a5"], key=lambda n: format_named(n).bits
    )
    assert [f.name for f in resolve_formats(name)] == [name]


@pytest.mark.parametrize("name", ["w4a4g8", "w4a4g", "w9a4g64", "fp8g64", "w8a8sg64", "int4wog64", "w4a4g64g64"])
def test_groups_are_of_integers_per_token_and_have_three_sizes(name: str) -> None:
    assert not is_format(name)
    with pytest.raises(UnknownNameError, match=name):
        format_named(name)


def test_a_number_for_each_step_and_layer_is_a_static_scale_or_clips_few_bits() -> None:
    kinds = {name: format_named(name).scaled_activation for name in ("fp8", "nvfp4", "w8a8s", "w4a4", "w4a6g16")}
    assert all(kinds.values())
    assert not any(FORMATS[name].scaled_activation for name in ("w8a8", "w4a8", "int4wo", "bf16", "fp32"))


@pytest.mark.parametrize(("name", "largest"), [("fp8", 448), ("nvfp4", 6), ("w8a8", 127), ("w4a4", 7), ("w3a3", 3)])
def test_largest_magnitude_on_the_grid(name: str, largest: float) -> None:
    assert FORMATS[name].activation.maximum == largest


@pytest.mark.parametrize("name", FORMAT_SETS)
def test_sets_come_cheapest_first(name: str) -> None:
    formats = resolve_formats(name)
    assert {f.name for f in formats} == set(FORMAT_SETS[name])
    assert [f.bits for f in formats] == sorted(f.bits for f in formats)


def test_lists_are_read_like_sets_and_duplicates_count_once() -> None:
    assert [f.name for f in resolve_formats("bf16, nvfp4,fp8,bf16")] == ["nvfp4", "fp8", "bf16"]
    assert [f.name for f in resolve_formats("w4a4")] == ["w4a4"]


@pytest.mark.parametrize("names", ["blackwel", "", "fp8,fp7", "fp8,"])
def test_unknown_names_are_refused(names: str) -> None:
    with pytest.raises(UnknownNameError):
        resolve_formats(names)


def test_lookups_refuse_unknown_names() -> None:
    assert format_named("fp8") is FORMATS["fp8"]
    assert target_named("sm89") is TARGETS["sm89"]
    with pytest.raises(UnknownNameError, match="did you mean 'sm120'"):
        target_named("sm12")
    with pytest.raises(UnknownNameError, match="format"):
        format_named("fp9")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_every_target_accelerates_its_default_set(target) -> None:
    layout = "embedded" if target.formats else "plugin"
    require_accelerated(resolve_formats(target.default_set), [target], layout)
    assert target.formats | target.plugin_formats <= set(FORMATS)


def test_the_layout_decides_what_is_accelerated() -> None:
    formats, hopper = resolve_formats("w4a8,fp8"), [TARGETS["sm90"]]
    require_accelerated(formats, hopper, "plugin")
    with pytest.raises(UnsupportedFormatError, match=r"w4a8, fp8 in this layout; .* nothing; .* or --layout plugin,"):
        require_accelerated(formats, hopper)
    with pytest.raises(UnsupportedFormatError, match=r"'sm80' does not accelerate fp8; .* w4a8, w8a16, w8a8; "):
        require_accelerated(formats, [TARGETS["sm80"]], "plugin")
    with pytest.raises(UnsupportedFormatError, match=r"nvfp4 in this layout; .* or --layout embedded,"):
        require_accelerated(resolve_formats("nvfp4"), [TARGETS["sm120"]], "plugin")


def test_formats_without_an_accelerated_path_are_refused_with_those_that_have_one() -> None:
    targets = [TARGETS["sm120"], TARGETS["sm89"]]
    with pytest.raises(
        UnsupportedFormatError, match=r"'sm89' does not accelerate nvfp4, nvfp4a16; .* bf16, fp16, fp8, fp8a16, int4wo;"
    ):
        require_accelerated(resolve_formats("blackwell"), targets)


@pytest.mark.parametrize(
    ("targets", "layout", "backend", "expected"),
    [
        (("sm120",), "embedded", "rtx", "blackwell"),
        (("sm89", "sm120"), "embedded", "rtx", "ada"),
        (("sm120", "sm89"), "shared", "rtx", "ada"),
        (("sm120", "sm80"), "embedded", "rtx", "ampere"),
        (("sm80", "sm86"), "embedded", "tensorrt", "ampere"),
        (("sm120", "cpu"), "embedded", "tensorrt", "w8a8s"),
        (("sm120",), "plugin", "rtx", "hopper"),
        (("sm90",), "plugin", "rtx", "hopper"),
        (("sm80",), "plugin", "rtx", "w4a8,int4wo,w8a8,w8a16,bf16"),
        (("sm120", "sm86"), "plugin", "rtx", "w4a8,int4wo,w8a8,w8a16,bf16"),
        (("sm90",), "embedded", "rtx", "hopper"),  # refused by name afterwards
    ],
)
def test_default_formats_are_what_all_targets_accelerate(
    targets: tuple[str, ...], layout: str, backend: str, expected: str
) -> None:
    chosen = [TARGETS[name] for name in targets]
    assert default_formats(chosen, layout, backend) == expected
    if expected != "hopper" or layout == "plugin":
        require_accelerated(resolve_formats(expected), chosen, layout, backend)


@pytest.mark.parametrize(
    "names",
    ["fp8,fp8a16", "nvfp4,nvfp4a16", "w8a8s,w8a8,w8a16,w8a32,w8a3", "int4wo,w4a3,w4a8", "w2a16,w2a3", "w6a16,w6a8"],
)
def test_formats_that_differ_in_activations_alone_share_their_weights(names: str) -> None:
    formats = resolve_formats(names)
    assert len({fmt.weight for fmt in formats}) == 1
    assert len({fmt.activation for fmt in formats}) == len(formats)


def test_the_grid_has_every_pair_of_its_widths() -> None:
    pairs = {(fmt.weight_bits, fmt.activation_bits) for fmt in resolve_formats("grid")}
    assert pairs == {(weight, activation) for weight in (3, 4, 5, 6) for activation in (3, 4, 5, 6)}


def test_a_layer_has_the_largest_group_that_divides_its_width() -> None:
    int4, fp4 = FORMATS["int4wo"].weight, FORMATS["nvfp4"].weight
    assert [int4.group_of(width) for width in (64, 96, 128, 80, 100)] == [64, 32, 64, 16, None]
    assert [int4.group_of(width, whole=True) for width in (64, 96)] == [64, None]
    assert [fp4.group_of(width) for width in (64, 96, 80, 72)] == [16, 16, 16, None]
    assert FORMATS["int4wo"].stored_weight_bits(96) == 4 + 16 / 32


def test_layers_that_no_group_divides_are_refused_with_the_formats_that_suit() -> None:
    formats = resolve_formats("w4a4,nvfp4")
    require_shapes(formats, [("ff", 128), ("odd", 96), ("small", 80)])
    require_shapes(resolve_formats("fp8,w8a8"), [("ff", 77)])
    layers, possible = [("ok", 64), ("ff", 72)], ("fp8", "w8a8", "int4wo", "nvfp4")
    for names, least in (("w4a4", 16), ("nvfp4", 16)):
        message = rf"'ff': in_features 72 is not a multiple of {least}, .* '{names}' here; .* all layers .*: fp8, w8a8$"
        with pytest.raises(UnsupportedFormatError, match=message):
            require_shapes(resolve_formats(names), layers, possible)
    with pytest.raises(UnsupportedFormatError, match=r"'odd': in_features 96 is not a multiple of 64, .* nvfp4, w8a8$"):
        require_shapes(resolve_formats("int4wo"), [("odd", 96)], possible, whole_groups=True)
