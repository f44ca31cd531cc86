"""Panoptic quality, against masks compared one by one."""

from itertools import product

import numpy as np
import pytest

from rt_detectron.evaluation.panoptic import match_segments


def by_hand(labels, truth, ids, segments):
    """Kirillov et al.'s definition, mask by mask."""
    counts = {category: [0.0, 0, 0, 0] for category in (1, 2, 3)}
    void, hit_labels, hit = labels == 0, set(), set()
    for each, (number, category) in product(truth, segments.items()):
        if each["iscrowd"] or each["category_id"] != category:
            continue
        true, found = labels == each["id"], (ids == number) & ~void
        iou = (true & found).sum() / (true | found).sum()
        if iou > 0.5:
            counts[category][0] += iou
            counts[category][1] += 1
            hit_labels.add(each["id"])
            hit.add(number)
    for each in truth:
        if not each["iscrowd"] and each["id"] not in hit_labels:
            counts[each["category_id"]][3] += 1
    for number, category in segments.items():
        crowd = [e["id"] for e in truth if e["iscrowd"] and e["category_id"] == category]
        excused = ((ids == number) & (void | np.isin(labels, crowd))).sum()
        if number not in hit and excused <= 0.5 * (ids == number).sum():
            counts[category][2] += 1
    return [[category, *values] for category, values in counts.items() if any(values)]


@pytest.mark.parametrize("seed", range(8))
def test_matches_equal_those_by_hand(seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 7, (3, 3))
    labels = np.kron(coarse, np.ones((12, 12), int))
    ids = np.where(rng.random(labels.shape) < 0.08, rng.integers(0, 7, labels.shape), labels) * 10
    ids = np.roll(ids, seed % 3, 1)
    truth = [
        {
            "id": int(number),
            "category_id": int(number) % 3 + 1,
            "area": int((labels == number).sum()),
            "iscrowd": int(number) == 6,
        }
        for number in np.unique(labels[labels > 0])
    ]
    segments = {int(number): int(number) // 10 % 3 + 1 for number in np.unique(ids[ids > 0])}
    segments[next(iter(segments))] = 3  # of a wrong class
    found = match_segments(labels, truth, ids, segments)
    expected = by_hand(labels, truth, ids, segments)
    assert sum(each[2] for each in found) > 0
    np.testing.assert_allclose(np.array(found), np.array(expected))
