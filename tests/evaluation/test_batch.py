"""The prompts that models are scored with."""

import torch

from adatsq_trt.evaluation.batch import make_batch
from adatsq_trt.models.flux import FluxAdapter
from adatsq_trt.zoo.loading import load_model
from adatsq_trt.zoo.scenes.prompts import COLUMNS, evaluation_prompts


def test_all_columns_are_asked_for_equally() -> None:
    adapter = load_model("scenes-flux-schnell").adapter
    batch = make_batch(adapter, 606)
    assert batch.judged
    assert {batch.columns.count(column) for column in COLUMNS} == {101}
    assert [adapter.prompts[i] for i in batch.prompts[:600]] == list(map(str, evaluation_prompts(600)))
    assert batch.prompts[600:] == batch.prompts[:6]


def test_black_pictures_show_nothing() -> None:
    batch = make_batch(load_model("scenes-flux-schnell").adapter, 12)
    assert batch.right(torch.zeros(12, 16, 16, 3)).tolist() == [0.0] * 12


def test_another_world_has_no_judge(untrained_flux: FluxAdapter) -> None:
    batch = make_batch(untrained_flux, 12)
    assert not batch.judged
    assert batch.prompts == (*range(10), 0, 1)
