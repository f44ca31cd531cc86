import pytest

from rt_detectron.study.statistics import Summary, aggregate, paired_differences, scores_of, summarize


def test_summarize_by_hand():
    # deviations from 4: -2, 0, 2; squares sum to 8; 8 / (3 - 1) = 4
    assert summarize([2.0, 4.0, 6.0]) == Summary(n=3, mean=4.0, sd=2.0)


def test_single_value_has_no_spread():
    assert summarize([7.5]) == Summary(n=1, mean=7.5, sd=None)


def test_differences_are_paired_by_seed_not_by_position():
    arm = {2: {"box AP": 30.0}, 1: {"box AP": 11.0}, 5: {"box AP": 99.0}}
    baseline = {1: {"box AP": 10.0}, 2: {"box AP": 27.0}, 3: {"box AP": 0.0}, 5: {"mask AP": 1.0}}
    assert paired_differences(arm, baseline, "box AP") == [1.0, 3.0]


def test_aggregate_pairs_within_one_setting():
    scores = {
        ("mask_rcnn", 0.02): {
            "standard": {1: {"box AP": 20.0, "mask AP": 18.0}, 2: {"box AP": 24.0, "mask AP": 20.0}},
            "robust": {1: {"box AP": 21.0, "mask AP": 17.0}, 2: {"box AP": 28.0, "mask AP": 19.0}},
        },
        ("mask_rcnn", 0.01): {"standard": {}, "robust": {1: {"box AP": 50.0}}},
    }
    baseline, robust, empty, alone = aggregate(scores, "standard")
    assert baseline.score["box AP"].mean == 22.0
    assert baseline.change == {}
    assert robust.differences == {"box AP": [1.0, 4.0], "mask AP": [-1.0, -1.0]}
    assert robust.change["box AP"].mean == 2.5
    assert robust.change["box AP"].sd == pytest.approx(4.5**0.5)  # (1.5^2 + 1.5^2) / 1
    assert robust.change["mask AP"] == Summary(2, -1.0, 0.0)
    assert empty.seeds == ()
    assert empty.score == {}
    assert alone.score["box AP"].n == 1
    assert alone.change == {}  # the other setting's baseline is not borrowed


def test_undefined_ap_is_no_score():
    metrics = {"bbox": {"AP": float("nan"), "AP50": 3, "APs": 9.0}, "segm": {"AP": None}}
    assert scores_of(metrics) == {"box AP50": 3.0}
