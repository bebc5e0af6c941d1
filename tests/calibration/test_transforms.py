"""Transforms change neither a layer's output nor, where they are modelopt's too, what modelopt finds."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from adatsq_trt.calibration.trajectory import Samples
from adatsq_trt.calibration.transforms.graph_form import GraphForm, rotated_blocks
from adatsq_trt.calibration.transforms.low_rank import branch, rank_of
from adatsq_trt.calibration.transforms.make import TRANSFORMS, make_transforms
from adatsq_trt.calibration.transforms.smooth import smooth
from adatsq_trt.calibration.transforms.statistics import LayerGroup, largest_inputs, measure_groups
from adatsq_trt.config import Transform
from adatsq_trt.errors import DamagedFileError, UserError
from adatsq_trt.evaluation.methods import Peer
from adatsq_trt.evaluation.peers import apply_peer
from adatsq_trt.files import read_tensors, write_tensors
from adatsq_trt.formats import FORMATS
from adatsq_trt.models.simulated import SharedRounding, SimulatedLinear
from adatsq_trt.quantizers import fake_quantize_activation
from adatsq_trt.transforms import hadamard, load_transforms, save_transforms

STEPS, WIDTH = 3, 640
LAYERS = ("block.q", "block.k")


def random_group(seed: int, width: int = WIDTH) -> LayerGroup:
    """Two layers with one input whose channels differ a thousandfold, one of them always zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(96 * (i + 1), width, generator=generator) for i, name in enumerate(LAYERS)}
    largest = torch.rand(STEPS, width, generator=generator) * 10 ** (3 * torch.rand(width, generator=generator))
    largest[:, 0] = 0
    return LayerGroup(weights, largest)


@pytest.mark.parametrize("form", [None, GraphForm(torch.bfloat16), GraphForm(torch.float16, (16,))])
@pytest.mark.parametrize("name", TRANSFORMS)
@given(seed=st.integers(0, 2**16), width=st.sampled_from([16, 64, 192, 640]))
def test_in_full_precision_the_output_stays(name: str, form: GraphForm | None, seed: int, width: int) -> None:
    group = random_group(seed, width)
    transforms = make_transforms(name, [group], form)
    inputs = torch.randn(5, width, generator=torch.Generator().manual_seed(seed)) * group.largest.amax(dim=0)
    for layer, weight in group.weights.items():
        transform = transforms[layer]
        mapped = transform.input_map.inputs(inputs).double()
        got = functional.linear(mapped, transform.rounded_weight(weight).double())
        if transform.branch is not None:
            got += functional.linear(mapped, transform.branch.weight.double())
        exact = functional.linear(inputs.double(), weight.double())
        assert float((got - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_layer_with_an_exact_format_gives_its_output(name: str) -> None:
    group, exact = random_group(1), FORMATS["fp32"]
    linear = nn.Linear(WIDTH, 96)
    linear.weight.data = group.weights[LAYERS[0]]
    transform = make_transforms(name, [group])[LAYERS[0]]
    layer = SimulatedLinear(linear, {"fp32": transform.rounded_weight(linear.weight)}, SharedRounding(), transform)
    layer.active = exact
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def error() -> float:
        return float((layer(x) - linear(x)).norm() / linear(x).norm())

    assert error() < 1e-3
    layer.active = FORMATS["w4a4"]
    layer.weights["w4a4"] = layer.weights["fp32"]
    assert error() > 1e-2, "inputs are rounded"


@pytest.mark.parametrize("form", [None, GraphForm(torch.bfloat16)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_second_moment_is_that_of_the_mapped_input(name: str, form: GraphForm | None) -> None:
    input_map = TRANSFORMS[name].input_map(random_group(2), form)
    x = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)) * 7
    mapped = input_map.inputs(x)
    expected = mapped.mT @ mapped
    assert float((input_map.second_moment(x.mT @ x) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("width", [1, 2, 16, 64, 128, 640, 1152, 1536, 3072])
def test_hadamard_matrices_are_orthogonal_and_flat(width: int) -> None:
    matrix = hadamard(width)
    assert torch.allclose(matrix @ matrix.mT, torch.eye(width), atol=1e-5)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, width**-0.5))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graphs_hold_every_number_of_a_transform(name: str, dtype: torch.dtype) -> None:
    for transform in make_transforms(name, [random_group(5)], GraphForm(dtype)).values():
        given, branch = transform.input_map, transform.branch
        parts = [given.divisor, None if given.divisor is None else given.divisor.reciprocal(), given.rotation]
        parts += [] if branch is None else [branch.down, branch.up]
        for part in parts:
            assert part is None or torch.equal(part, part.to(dtype).float())
        if given.divisor is not None:
            published = make_transforms(name, [random_group(5)])[LAYERS[0]].input_map.divisor
            assert published is not None
            ratio = given.divisor / published
            near = published.log2().abs() < 8  # divisors go no further, so that float16 holds what they scale
            assert float(ratio[near].log2().abs().max()) <= 0.5 + 1e-5


@pytest.mark.parametrize(
    ("formats", "blocks"), [(("fp8", "bf16"), (128, 64, 16)), (("nvfp4", "fp8"), (16,)), (("nvfp4a16",), (128, 64, 16))]
)
def test_a_rotation_stays_within_blocks_that_have_a_scale(formats: tuple[str, ...], blocks: tuple[int, ...]) -> None:
    assert rotated_blocks(FORMATS[name] for name in formats) == blocks
    form = GraphForm(torch.bfloat16, blocks)
    assert [form.block_of(width) for width in (640, 192, 48)] == ([16] * 3 if blocks == (16,) else [128, 64, 16])


@pytest.mark.parametrize("width", [3, 36, 100])
def test_a_width_without_a_hadamard_matrix_is_refused(width: int) -> None:
    with pytest.raises(UserError, match=f"no Hadamard matrix of width {width} is known here"):
        hadamard(width)


def test_rotations_and_smoothing_spread_an_outlier() -> None:
    """What they are for: the rounded product of an input with one large channel errs less."""
    group = random_group(3)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(4)) * group.largest.amax(dim=0)
    weight, grid = group.weights[LAYERS[0]], FORMATS["w4a4"].activation

    def error(inputs: Tensor, weights: Tensor) -> float:
        rounded = fake_quantize_activation(inputs, grid)
        return float((functional.linear(rounded, weights) - functional.linear(inputs, weights)).square().mean())

    plain = error(x, weight)
    for name in ("smooth", "hadamard", "balance"):
        input_map = TRANSFORMS[name].input_map(group)
        assert error(input_map.inputs(x), input_map.weight(weight)) < 0.8 * plain, name


def test_the_branch_takes_the_largest_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    outer = torch.randn(128, 1, generator=generator) @ torch.randn(1, 128, generator=generator)
    weight = 50 * outer + torch.randn(128, 128, generator=generator)
    low_rank = branch(weight)
    assert low_rank.down.shape == (2, 128) == low_rank.up.mT.shape
    assert float((weight - low_rank.weight).norm()) < 1.5 * 128
    assert torch.equal(low_rank.down, low_rank.down.bfloat16().float())


@pytest.mark.parametrize(("shape", "rank"), [((3072, 3072), 32), ((128, 640), 2), ((96, 4096), 1), ((16, 16), 1)])
def test_the_rank_is_that_share_of_the_width(shape: tuple[int, int], rank: int) -> None:
    assert rank_of(*shape) == rank


def test_layers_that_share_an_input_are_one_group(samples: Samples, latents: Tensor) -> None:
    groups = measure_groups(samples, latents)
    layers = [layer for group in groups for layer in group.weights]
    assert sorted(layers) == sorted(samples.adapter.quantizable_layers())
    assert len(groups) < len(layers)
    for group in groups:
        kinds = {layer.rpartition(".")[2] for layer in group.weights}
        if "to_q" in kinds:
            assert {"to_q", "to_k", "to_v"} <= kinds
        assert group.largest.shape == (samples.schedule.steps, group.width)
        assert (group.largest > 0).any(dim=1).all()


def test_static_scales_are_for_the_mapped_inputs(samples: Samples, latents: Tensor) -> None:
    groups = measure_groups(samples, latents)
    transforms = make_transforms("smooth", groups)
    largest = largest_inputs(samples, latents, transforms)
    for index, layer in enumerate(samples.adapter.quantizable_layers()):
        group = next(group for group in groups if layer in group.weights)
        divisor = transforms[layer].input_map.divisor
        assert divisor is not None
        assert torch.allclose(largest[:, index], (group.largest / divisor).amax(dim=1), rtol=1e-5)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_survive_the_disk(tmp_path: Path, name: str) -> None:
    groups = [random_group(0), LayerGroup({"block.out": torch.randn(96, 64)}, torch.rand(STEPS, 64))]
    before = make_transforms(name, groups)
    save_transforms(tmp_path / "transforms.safetensors", before)
    after = load_transforms(tmp_path / "transforms.safetensors")
    assert sorted(after) == sorted(before)
    assert after[LAYERS[0]].input_map is after[LAYERS[1]].input_map, "one map for one input"
    for layer, transform in before.items():
        x = torch.randn(2, 64 if layer == "block.out" else WIDTH)
        assert torch.equal(after[layer].input_map.inputs(x), transform.input_map.inputs(x))
        assert after[layer].bits == transform.bits
        if transform.branch is not None:
            assert after[layer].branch is not None
            assert torch.equal(after[layer].branch.weight, transform.branch.weight)


def test_half_a_branch_is_named(tmp_path: Path) -> None:
    file = tmp_path / "transforms.safetensors"
    save_transforms(file, make_transforms("low-rank", [random_group(0)]))
    write_tensors(file, {name: t for name, t in read_tensors(file).items() if name != "block.q.up"})
    with pytest.raises(DamagedFileError, match=r"half a branch for layer 'block\.q'"):
        load_transforms(file)


def test_the_configuration_knows_all_transforms() -> None:
    assert list(get_args(Transform)) == list(TRANSFORMS)


# ------------------------------------------------------------------------------------------- beside modelopt


class Two(nn.Module):
    """One input, two layers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        for linear in (self.first, self.second):
            linear.weight.data = torch.randn(128, 128, generator=generator)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@pytest.fixture(scope="module")
def batch() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 128, generator=generator) * 10 ** torch.rand(128, generator=generator)


@pytest.mark.filterwarnings("ignore")
def test_smoothing_finds_modelopts_scales(batch: Tensor) -> None:
    ours, theirs = Two(), Two()
    apply_peer(Peer.SMOOTHQUANT, theirs, ["first"], (4, 4), 2, lambda: theirs(batch))
    divisor = smooth(LayerGroup({"first": ours.first.weight}, batch.abs().amax(dim=0)[None])).divisor
    assert divisor is not None
    product = divisor * theirs.first.input_quantizer.pre_quant_scale
    assert torch.allclose(product / product.mean(), torch.ones(128), rtol=1e-4), "up to one factor for all channels"


@pytest.mark.filterwarnings("ignore")
def test_the_branch_is_modelopts(batch: Tensor) -> None:
    theirs = Two()
    apply_peer(Peer.SVDQUANT, theirs, ["first"], (4, 4), 2, lambda: theirs(batch))
    quantizer = theirs.first.weight_quantizer
    low_rank = quantizer.svdquant_lora_b @ quantizer.svdquant_lora_a
    ours = branch(theirs.first.weight + low_rank)
    assert float((ours.weight - low_rank).norm() / low_rank.norm()) < 0.01, "bfloat16 apart"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", Peer)
def test_peers_round_each_token_and_each_group_and_no_other_layer(peer: Peer, batch: Tensor) -> None:
    model, exact = Two(), Two()
    apply_peer(peer, model, ["first"], (4, 4), 2, lambda: model(batch))
    x = batch[:4].clone()
    x[0] *= 100
    with torch.no_grad():
        rounded = model.first.input_quantizer(x)
        assert all(len(row.unique()) <= 15 for row in rounded), "a scale for each token"
        assert len(rounded.unique()) > 15
        weight = model.first.weight_quantizer(model.first.weight)
        assert all(len(group.unique()) <= 15 for group in weight.reshape(-1, 64))
        assert torch.equal(model.second(x), exact.second(x))
        assert not torch.allclose(model.first(x), exact.first(x), rtol=1e-3)
