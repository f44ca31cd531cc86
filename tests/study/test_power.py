import math

import numpy as np
import pytest
from scipy import stats

from rt_detectron.study.power import POWER, _describe, runs_needed
from rt_detectron.study.statistics import Sample


def test_that_many_runs_find_the_difference(monkeypatch):
    """By simulation of Student's t test, at the number of runs that is given and at one less."""
    draw = np.random.default_rng(0)
    n = runs_needed(0.6, 0.4)
    for runs, least, most in ((n, POWER - 0.02, 1), (n - 1, 0, POWER + 0.01)):
        arms = draw.normal([[0], [0.6]], 0.4, (4000, 2, runs))
        found = (stats.ttest_ind(arms[:, 0], arms[:, 1], axis=1).pvalue < 0.05).mean()
        assert least < found < most


def test_images_are_a_limit_that_runs_cannot_pass():
    assert runs_needed(0.3, 0.1, image_variance=0.04) is None
    assert runs_needed(0.3, 0.1, image_variance=0.008) > runs_needed(0.3, 0.1)


def test_power_is_told_from_finished_trials():
    samples = [Sample("seeds", {1: 1.0, 2: 1.4}, None), Sample("seeds", {1: 2.0, 2: 2.2, 3: 2.1}, None)]
    sd = math.sqrt((0.08 + 0.02) / 3)
    text = _describe(samples, 0.3, None, "box AP")
    assert text.startswith(f"{runs_needed(0.3, sd)} seeds of each arm resolve 0.3 box AP in 80% of studies")
    assert "with 3 degrees of freedom; sd by the test images unknown" in text
    assert _describe([], 0.3, None, "box AP").startswith("unknown until an arm has two finished trials")
    assert f"{runs_needed(0.3, 0.5)} seeds" in _describe([], 0.3, 0.5, "box AP")
    drawn = np.random.default_rng(0).normal(0, 1, (2, 1, 200))
    far = [Sample("seeds", sample.values, images) for sample, images in zip(samples, drawn, strict=True)]
    assert "no number of seeds resolves 0.3 box AP, the choice of test images alone" in _describe(
        far, 0.3, None, "box AP"
    )


@pytest.mark.parametrize("difference", [0.2, 1.0])
def test_smaller_differences_need_more_runs(difference):
    assert runs_needed(difference, 0.3) > runs_needed(2 * difference, 0.3)
