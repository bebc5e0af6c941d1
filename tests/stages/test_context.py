"""What all stages share."""

from pathlib import Path

import pytest

from adatsq_trt.stages.context import Context, Memory, layer_shapes
from adatsq_trt.stages.meter import resident_bytes
from tests.stages.tiny_run import make_model, tiny_context


def test_batches_have_seeds_of_their_own_for_every_seed_of_the_run(tmp_path: Path) -> None:
    seen: set[int] = set()
    for seed in (0, 1):
        with tiny_context(tmp_path / f"{seed}", seed=seed, held_out_samples=5) as context:
            batches = (context.calibration, context.selection, context.held_out, context.evaluation([0, 1, 0]))
            assert [len(batch.seeds) for batch in batches] == [2, 2, 5, 3]
            for batch in batches:
                assert seen.isdisjoint(batch.seeds)
                seen.update(batch.seeds)
            assert batches[3].prompts == (0, 1, 0)


def test_room_is_what_the_limit_leaves() -> None:
    assert Memory(0).room_bytes == 0
    plenty = Memory(resident_bytes() + (4 << 30), call_bytes=1 << 30)
    assert 2 << 30 < plenty.room_bytes < 3 << 30
    assert Memory(backward_bytes=5, projection_bytes=7).backward_bytes_of(3) == 26


def test_a_backward_pass_goes_by_block_where_the_whole_does_not_fit(tmp_path: Path) -> None:
    with tiny_context(tmp_path / "run", Memory(0, backward_bytes=1)) as context:
        assert context.by_block(projections=1)
        assert context.room_bytes == 0
    with tiny_context(tmp_path / "run", Memory(backward_bytes=1)) as context:
        assert not context.by_block(projections=1)


def test_a_key_with_weights_holds_their_declared_type(tmp_path: Path) -> None:
    with tiny_context(tmp_path / "run") as context:
        assert context.inputs(("steps", "seed")) == {"steps": 2, "seed": 0}
        assert context.inputs(("weights_sha256",)) == {"weights_sha256": "0" * 64, "base": "float32"}


def test_names_become_formats_targets_and_shapes(finished: Context) -> None:
    assert [fmt.name for fmt in finished.formats] == ["w8a8s", "fp32"]
    assert [target.name for target in finished.targets] == ["cpu"]
    adapter = make_model().adapter
    shapes = layer_shapes(adapter, dict.fromkeys(adapter.quantizable_layers(), 7))
    assert {shape.tokens for shape in shapes} == {7}
    assert tuple(shape.name for shape in shapes) == finished.layers


def test_sizes_are_the_model_s_own_and_others(tmp_path: Path) -> None:
    with tiny_context(tmp_path / "run", shapes=((1, 4, 4), (2, 4, 4), (1, 8, 4))) as context:
        sizes = context.sizes
        assert tuple(sizes) == ((4, 4), (8, 4)), context.model.scale.size(context.adapter.image)
        assert sizes[4, 4] is context.adapter
        assert context.model.scale.size(sizes[8, 4].image) == (8, 4)


@pytest.mark.parametrize("name", ["schedule", "layers", "calibration"])
def test_what_is_derived_is_made_once(finished: Context, name: str) -> None:
    assert getattr(finished, name) is getattr(finished, name)
