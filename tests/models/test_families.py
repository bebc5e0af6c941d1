"""The registry of families: one line each, and a user's own beside or in the place of the package's."""

import pytest

from adatsq_trt.errors import MismatchError
from adatsq_trt.models import families
from adatsq_trt.models.flux import FluxAdapter, FluxFamily
from adatsq_trt.models.wan import WanFamily


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", list(families.families()))


class ControlFamily(FluxFamily):
    """Another pipeline of a transformer that is known."""

    pipeline = "FluxControlPipeline"


def test_families_are_found_by_pipeline_and_by_transformer() -> None:
    for family in families.families():
        assert families.family_of_pipeline(family.pipeline) is family
        first = families.family_of_transformer(family.transformer)
        assert first is not None
        assert first.adapter.model_class is family.adapter.model_class
        assert family.load_pipeline_class().__name__ == family.pipeline
        assert f"{family.pipeline} ({family.transformer})" in families.known_families()
    assert (
        families.family_of_pipeline("SanaPipeline") is families.family_of_transformer("SanaTransformer2DModel") is None
    )


def test_a_second_pipeline_of_a_transformer_leaves_the_first_in_its_place() -> None:
    families.register_family(ControlFamily())
    found = families.family_of_pipeline("FluxControlPipeline")
    assert found is not None
    assert found.adapter is FluxAdapter
    own = families.family_of_transformer("FluxTransformer2DModel")
    assert own is not None
    assert own.pipeline == "FluxPipeline"


def test_a_family_takes_the_place_of_one_with_its_pipeline() -> None:
    count, own = len(families.families()), WanFamily()
    families.register_family(own)
    families.register_family(own)
    assert families.family_of_pipeline("WanPipeline") is own
    assert len(families.families()) == count


def test_a_class_is_no_family() -> None:
    with pytest.raises(MismatchError, match="expected an object of a class that derives from Family"):
        families.register_family(FluxFamily)  # type: ignore[arg-type]


def test_options_of_schedulers_are_those_of_a_class() -> None:
    """Without it they would be those of no class, and be followed by nobody."""

    class Flat(FluxFamily):
        scheduler_options = {"use_dynamic_shifting": False}  # type: ignore[dict-item]  # noqa: RUF012

    with pytest.raises(MismatchError, match=r"got 'use_dynamic_shifting' → False, expected a class of schedulers"):
        families.register_family(Flat())
