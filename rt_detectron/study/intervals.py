"""Intervals of differences between arms. They cover the choice of runs and of test images.

An arm's runs are its checkpoints (each the mean of its fine-tunings), or the fine-tunings of its only
checkpoint. The variance of a difference has two parts, which are estimated separately:

- between runs: the sample variance of each arm's runs. An arm with at most two takes the variance that is
  pooled over all arms of its pool, since one or two values say nearly nothing about a spread.
- of the test images: they are the same for all arms, and their choice moves all arms together. It comes from
  resampled images; see :func:`image_covariance`.

A difference divided by the square root of its variance is compared with Student's t, with the degrees of
freedom of Satterthwaite (1946), https://doi.org/10.2307/3002019.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.stats import qmc

CONFIDENCE = 0.95
FEW = 2  # runs; an arm with no more takes the pooled variance
_DRAWS = 2**12  # quasi-random points for simultaneous intervals; their quantile is then good to about 0.005
_NODES, _NODE_WEIGHTS = (np.polynomial.legendre.leggauss(40)[i] / 2 + (0.5, 0.0)[i] for i in (0, 1))


@dataclass(frozen=True)
class Contrasts:
    """Weighted sums of the means of arms, such as differences, with their standard errors.

    Attributes:
        estimate: (..., C).
        se: (..., C) standard errors; NaN where neither runs nor images say anything.
        df: (..., C) degrees of freedom.
        covers_runs: (..., C) bool, whether ``se`` has the variance between runs.
        correlation: (..., C, C) of the estimates.
    """

    estimate: np.ndarray
    se: np.ndarray
    df: np.ndarray
    covers_runs: np.ndarray
    correlation: np.ndarray

    def interval(self, critical: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(low, high), each (..., C). ``critical``: multiples of ``se``; by default t, for each alone."""
        if critical is None:
            critical = stats.t.ppf((1 + CONFIDENCE) / 2, self.df)
        return self.estimate - critical * self.se, self.estimate + critical * self.se

    @property
    def p(self) -> np.ndarray:
        """(..., C) two-sided p-values, for each alone. NaN without a standard error, and for one of 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            t = np.where(self.se > 0, np.abs(self.estimate) / self.se, np.nan)
        return 2 * stats.t.sf(t, self.df)


def contrasts(
    runs: np.ndarray,
    weights: np.ndarray,
    images: np.ndarray | None = None,
    image_df: float = np.inf,
    pools: np.ndarray | None = None,
) -> Contrasts:
    """Contrasts of A arms with at most R runs each. The leading dimensions, if any, are separate problems.

    Args:
        runs: (..., A, R) one value for each run, NaN beyond an arm's last.
        weights: (C, A) a contrast in each row, such as (-1, 0, 1): the third arm minus the first.
        images: (..., A, A) covariance of the arms' means over the choice of test images; None if unknown.
        image_df: degrees of freedom of ``images``: the number of images, or of resamples, minus 1.
        pools: (A,) the arms with equal numbers share a pooled variance; None: all do.
    """
    pools = np.zeros(runs.shape[-2], int) if pools is None else pools
    found = np.isfinite(runs)
    n = found.sum(-1)
    values = np.where(found, runs, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = values.sum(-1) / n
        squares = (np.where(found, runs - mean[..., None], 0.0) ** 2).sum(-1)
        own_variance = squares / (n - 1)
        same_pool = (pools[:, None] == pools).astype(float)  # (A, A)
        pooled_df = np.maximum(n - 1, 0) @ same_pool
        pooled = (squares @ same_pool) / pooled_df
        few = n <= FEW
        of_mean = np.where(few, pooled, own_variance) / n  # (..., A)

        # A mean of an arm that takes no part must not make the contrast undefined.
        estimate = np.where(weights != 0, weights * mean[..., None, :], 0.0).sum(-1)
        parts = np.where(weights != 0, weights**2 * of_mean[..., None, :], 0.0)  # (..., C, A)
        between = parts.sum(-1)
        covers_runs = np.isfinite(between)
        own = np.where(few[..., None, :], 0.0, parts**2 / (n - 1)[..., None, :]).sum(-1)
        for pool in np.unique(pools):
            shared = np.where(few[..., None, :] & (pools == pool), parts, 0.0).sum(-1)
            df = pooled_df[..., np.flatnonzero(pools == pool)[0], None]
            own = own + np.where(shared > 0, shared**2 / df, 0.0)

        covariance = np.einsum("ca,...a,da->...cd", weights, np.nan_to_num(of_mean), weights)
        variance = np.where(covers_runs, between, 0.0)
        squared_df = np.where(covers_runs, own, 0.0)
        if images is not None:
            of_images = np.einsum("ca,...ab,db->...cd", weights, images, weights)
            # Estimated, so that a variance may come out negative, and a covariance too large.
            shared = np.maximum(np.diagonal(of_images, axis1=-2, axis2=-1), 0.0)
            largest = np.sqrt(shared[..., :, None] * shared[..., None, :])
            covariance = covariance + np.clip(of_images, -largest, largest)
            variance = variance + shared
            squared_df = squared_df + shared**2 / image_df
        else:
            variance = np.where(covers_runs, variance, np.nan)
        df = np.where(squared_df > 0, variance**2 / squared_df, np.inf)
        scale = np.sqrt(np.where(variance > 0, variance, 1.0))
        correlation = covariance / scale[..., :, None] / scale[..., None, :]
    return Contrasts(estimate, np.sqrt(variance), df, covers_runs, correlation)


def image_covariance(draws: list[np.ndarray]) -> np.ndarray:
    """Covariance of the arms' means over the choice of test images, as far as all runs share it.

    That a run is good on some images and another run on others is part of the variance between runs already.
    So of an arm with several runs, only pairs of different runs count.

    Args:
        draws: for each of A arms, (runs, B): its runs' scores on B resamples of the images, the same for all.

    Returns:
        (A, A).
    """
    deviations = [of_arm - of_arm.mean(axis=1, keepdims=True) for of_arm in draws]
    means = np.stack([of_arm.mean(axis=0) for of_arm in deviations])
    resamples = means.shape[1]
    covariance = means @ means.T / (resamples - 1)
    for arm, of_arm in enumerate(deviations):
        n = len(of_arm)
        if n > 1:
            own = (of_arm**2).sum() / (resamples - 1)
            covariance[arm, arm] = max(0.0, (n**2 * covariance[arm, arm] - own) / (n * (n - 1)))
    return covariance


def simultaneous(
    correlation: np.ndarray, df: np.ndarray, one_sided: bool = False, confidence: float = CONFIDENCE
) -> np.ndarray:
    """Critical values with which C intervals together hold all true values with probability ``confidence``.

    For differences to one baseline these are Dunnett's (1955). Variances may differ, so each contrast has its
    own degrees of freedom (Hasler and Hothorn 2008, https://doi.org/10.1002/bimj.200710466).

    Args:
        correlation: (C, C) of the estimates.
        df: (C,) degrees of freedom of each.

    Returns:
        (C,) multiples of the standard errors.
    """
    if len(df) == 1:
        return stats.t.ppf(confidence if one_sided else (1 + confidence) / 2, df)
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    root /= np.linalg.norm(root, axis=1, keepdims=True)
    points = _normal_points(len(df)) @ root.T
    largest = np.sort(points.max(axis=1) if one_sided else np.abs(points).max(axis=1))
    different, which = np.unique(np.asarray(df, float), return_inverse=True)
    return _quantiles(largest, different, confidence)[which]


def _quantiles(largest: np.ndarray, df: np.ndarray, confidence: float) -> np.ndarray:
    """(C,) quantiles of ``largest`` divided by an independent chi over the root of its degrees of freedom."""
    # Beyond 10,000 degrees of freedom the quantile is the normal distribution's to three digits.
    df = np.minimum(df, 1e4)[:, None]
    chi = np.sqrt(stats.chi2.ppf(_NODES, df) / df)
    low, high = np.zeros(len(df)), np.full(len(df), 2 * largest[-1] / chi.min())
    for _ in range(26):  # bisection
        middle = (low + high) / 2
        holds = np.searchsorted(largest, middle[:, None] * chi) @ _NODE_WEIGHTS / len(largest)
        low, high = np.where(holds < confidence, middle, low), np.where(holds < confidence, high, middle)
    return (low + high) / 2


_points: dict[int, np.ndarray] = {}


def _normal_points(dimensions: int) -> np.ndarray:
    """(_DRAWS, dimensions) quasi-random standard normal points, always the same."""
    if dimensions not in _points:
        sampler = qmc.MultivariateNormalQMC(np.zeros(dimensions), seed=np.random.default_rng(0))
        _points[dimensions] = sampler.random(_DRAWS)
    return _points[dimensions]


def discoveries(p: np.ndarray, rate: float = 1 - CONFIDENCE) -> np.ndarray:
    """Which of many tests remain when at most ``rate`` of those found may be false.

    Benjamini and Hochberg (1995), https://doi.org/10.1111/j.2517-6161.1995.tb02031.x. Undefined p-values are
    no tests.
    """
    tests = np.flatnonzero(np.isfinite(p))
    found = np.zeros(len(p), bool)
    if len(tests):
        found[tests] = stats.false_discovery_control(p[tests]) <= rate
    return found
