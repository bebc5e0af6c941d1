"""From proposals to the policy that is deployed."""

from adatsq_trt.files import read_json_model
from adatsq_trt.search.select import SearchResult
from adatsq_trt.stages import judging, search
from adatsq_trt.stages.context import Context


def test_what_is_told_beside_the_chosen_policy_has_held_out_figures(finished: Context) -> None:
    found = read_json_model(search.stage(finished).folder / search.RESULT, SearchResult)
    uniforms = [i for i, point in enumerate(found.points) if point.kind == "uniform"]
    told = {found.chosen, *uniforms, *(i for i in (found.layer_only, found.time_only) if i is not None)}
    assert all(found.points[i].held_out_error is not None for i in told)
    assert {found.points[i].kind for i in (found.layer_only, found.time_only) if i is not None} <= set(
        judging.STATIC_KINDS
    )
    assert found.unlimited is None, "assignments are not limited"


def test_each_policy_calls_the_model_once_in_each_step_of_a_batch(finished: Context) -> None:
    found = read_json_model(search.stage(finished).folder / search.RESULT, SearchResult)
    distinct = len({point.formats for point in found.points})
    assert found.denoiser_calls >= finished.settings.steps * distinct
    assert found.denoiser_calls % finished.settings.steps == 0
