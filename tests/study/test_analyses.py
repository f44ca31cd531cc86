from types import MappingProxyType

import numpy as np
import pytest
from scipy import stats

from rt_detectron.study.analyses import best_eps, fits
from rt_detectron.study.load import load_study
from rt_detectron.study.statistics import Quantity, compare

ACCURACY = Quantity("clean", "accuracy", "accuracy")


@pytest.fixture
def make_comparison(make_transfer_study, make_table, tmp_path):
    """``make_comparison({arm: (eps, source accuracy, [a score for each seed])})``."""

    def make(arms, baselines=MappingProxyType({})):
        make_transfer_study()
        text = (tmp_path / "study.yaml").read_text()
        start, end = text.index("  standard:"), text.index("transfers:")
        entries = []
        for name, (eps, source, _) in arms.items():
            keys = ["weights: std.pkl"]
            keys += [f"eps: {eps}"] * (eps is not None) + [f"source_accuracy: {source}"] * (
                source is not None
            )
            keys += [f"baseline: {baselines[name]}" for _ in range(name in baselines)]
            entries.append(f"  {name}: {{{', '.join(keys)}}}\n")
        (tmp_path / "study.yaml").write_text(text[:start] + "".join(entries) + text[end:])
        study = load_study("study.yaml")
        scores = {
            ("cifar10", name): {ACCURACY: dict(enumerate(values))} for name, (_, _, values) in arms.items()
        }
        return compare(study, [], make_table(scores))

    return make


def test_the_best_eps_and_those_that_may_be_as_good(make_comparison):
    comparison = make_comparison(
        {
            "standard": (0, None, [50.0, 51.0, 52.0]),
            "small": (0.1, None, [59.9, 61.5, 61.6]),  # 0.2 below on average
            "middle": (0.5, None, [60.0, 61.0, 62.5]),
            "large": (3, None, [40.0, 41.5, 42.0]),
        }
    )
    (best,) = best_eps(comparison, "accuracy")
    assert (best.line.arm, best.eps, best.candidates) == ("middle", 0.5, (0.1, 0.5))


def test_every_family_has_its_own_best_eps(make_comparison):
    arms = {
        "standard": (0, None, [50.0, 51.0]),
        "robust": (3, None, [60.0, 61.0]),
        "wide": (0, None, [70.0, 71.0]),
        "wide_robust": (3, None, [60.0, 61.0]),
        "alone": (None, None, [99.0, 99.0]),  # without an eps
    }
    comparison = make_comparison(arms, baselines={"wide": "wide", "wide_robust": "wide"})
    assert [entry.line.arm for entry in best_eps(comparison, "accuracy")] == ["robust", "wide"]


def test_with_a_single_seed_no_arm_is_distinguishable(make_comparison):
    arms = {"standard": (0, None, [50.0]), "robust": (3, None, [60.0])}
    (best,) = best_eps(make_comparison(arms), "accuracy")
    assert (best.eps, best.candidates) == (3, None)


def test_one_eps_alone_is_no_choice(make_comparison):
    arms = {"standard": (0, None, [50.0, 51.0]), "other": (0, None, [60.0, 61.0])}
    assert best_eps(make_comparison(arms), "accuracy") == []


def test_lines_across_eps_and_at_one_eps(make_comparison):
    generator = np.random.default_rng(1)
    values = iter(generator.normal(70, 3, 9))
    arms, baselines = {}, {}
    for family in ("standard", "wide", "wider"):
        for eps in (0, 1, 3):
            name = family if eps == 0 else f"{family}{eps}"
            arms[name] = (eps, float(generator.uniform(60, 80)), [next(values)])
            baselines[name] = family
    comparison = make_comparison(arms, baselines=baselines)
    found = {fit.group: fit for fit in fits(comparison, "accuracy")}
    assert list(found) == [
        "across eps, standard", "across eps, wide", "across eps, wider", "at eps 0", "at eps 1", "at eps 3",
    ]  # fmt: skip
    for group, members in (
        ("across eps, wide", ["wide", "wide1", "wide3"]),
        ("at eps 1", ["standard1", "wide1", "wider1"]),
    ):
        fit = found[group]
        x, y = np.array([(arms[name][1], arms[name][2][0]) for name in members]).T
        slope, intercept = np.polyfit(x, y, 1)  # the reference
        assert (fit.slope, fit.intercept) == pytest.approx((slope, intercept))
        residual = y - (slope * x + intercept)
        assert fit.r2 == pytest.approx(1 - residual.var() / y.var())
        error = np.sqrt((residual**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
        assert fit.interval == pytest.approx(stats.t.interval(0.95, len(x) - 2, slope, error))
        assert fit.ends == [(x.min(), pytest.approx(intercept + slope * x.min())),
                            (x.max(), pytest.approx(intercept + slope * x.max()))]  # fmt: skip


def test_two_points_are_no_line(make_comparison):
    arms = {"standard": (0, 70, [50.0]), "a": (1, 60, [60.0]), "b": (3, None, [60.0])}
    comparison = make_comparison(arms)
    assert fits(comparison, "accuracy") == []


def test_a_constant_score_has_a_slope_of_none(make_comparison):
    arms = {"standard": (0, 70, [50.0]), "a": (1, 60, [50.0]), "b": (3, 55, [50.0])}
    comparison = make_comparison(arms)
    (fit,) = fits(comparison, "accuracy")
    assert (fit.slope, fit.r2) == pytest.approx((0, 0), abs=1e-9)
