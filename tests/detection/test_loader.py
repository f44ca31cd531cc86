import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from rt_detectron.detection.loader import batches_from, resumable
from rt_detectron.utils.errors import InputError

RECORDS = [{"number": i, "width": 5 if i % 3 else 3, "height": 4} for i in range(20)]


def drawn(record: dict) -> dict:
    """As a mapper that augments: it draws from all three generators."""
    return {**record, "drawn": (torch.rand(()).item(), np.random.rand(), random.random())}


def build(sampler=None, mapper=drawn, grouped=True, workers=0, records=RECORDS, batch=4):
    return build_detection_train_loader(
        records,
        mapper=mapper,
        sampler=sampler or TrainingSampler(len(records), seed=3),
        total_batch_size=batch,
        aspect_ratio_grouping=grouped,
        num_workers=workers,
    )


def first(loader, count, start=0) -> list:
    return list(itertools.islice(batches_from(loader, start), count))


SAMPLERS = {
    "all": lambda: TrainingSampler(20, seed=3),
    "repeated": lambda: RepeatFactorTrainingSampler(torch.rand(20) + 0.5, seed=3),
    "a subset": lambda: RandomSubsetTrainingSampler(20, 0.5, seed_shuffle=3, seed_subset=4),
}


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_are_detectron2s_in_its_order(sampler, grouped):
    torch.manual_seed(0)
    ours = first(resumable(build(SAMPLERS[sampler](), grouped=grouped)), 9)
    torch.manual_seed(0)
    reference = itertools.islice(build(SAMPLERS[sampler](), grouped=grouped), 9)
    for batch, expected in zip(ours, reference, strict=True):
        assert [image["number"] for image in batch] == [image["number"] for image in expected]
        assert not grouped or len({image["width"] > image["height"] for image in batch}) == 1


def test_other_groups():
    loader = resumable(build())
    loader.group = lambda record: record["number"] % 5
    batches = first(loader, 9)
    assert all(len({image["number"] % 5 for image in batch}) == 1 for batch in batches)
    assert len({image["number"] for batch in batches for image in batch}) > 4
    assert first(loader, 4, start=5) == batches[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_it_begins_anywhere_and_leaves_the_global_random_numbers_alone(workers):
    whole = first(resumable(build()), 9)
    assert len({image["drawn"] for batch in whole for image in batch}) == 36
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert first(resumable(build(workers=workers)), 4, start=5) == whole[5:]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_processes_divide_the_batches_of_one(monkeypatch):
    whole = first(resumable(build()), 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        # Detectron2 has divided the batch already.
        assert first(resumable(build(batch=2)), 6) == [batch[rank::2] for batch in whole]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_another_one_goes_on_with_its_state(sampler):
    torch.manual_seed(0)
    loader = resumable(build(SAMPLERS[sampler]()))
    whole = first(loader, 6)
    torch.manual_seed(0)
    other = SAMPLERS[sampler]()
    other._seed = 5
    if sampler == "a subset":
        other._indexes_subset = other._indexes_subset.flip(0)
    resumed = resumable(build(other))
    assert first(resumed, 3, start=3) != whole[3:]
    resumed.load_state_dict(loader.state_dict())
    assert first(resumed, 3, start=3) == whole[3:]


def test_an_image_that_the_mapper_refuses_gives_its_place_to_another():
    def even(record):
        return None if record["number"] % 2 else drawn(record)

    batches = first(resumable(build(mapper=even)), 9)
    assert all(len(batch) == 4 for batch in batches)
    assert not any(image["number"] % 2 for batch in batches for image in batch)
    assert first(resumable(build(mapper=even)), 4, start=5) == batches[5:]
    with pytest.raises(InputError, match="none of 100 training images in a row can be used"):
        first(resumable(build(mapper=lambda record: None)), 1)


def test_images_without_a_size_are_not_grouped():
    records = [{"number": i} for i in range(8)]
    batches = first(resumable(build(records=records, sampler=TrainingSampler(8, seed=3))), 2)
    assert sorted(image["number"] for batch in batches for image in batch) == list(range(8))


def test_a_loader_of_another_kind_starts_over_and_says_so(caplog):
    loader = [1, 2, 3]
    assert resumable(loader) is loader
    assert list(batches_from(loader, 0)) == [1, 2, 3]
    assert not caplog.messages
    assert list(batches_from(loader, 2)) == [1, 2, 3]
    assert "list cannot go on in its middle: the images start over" in caplog.text
