"""COCO AP and accuracy on resampled test images, for the interval of a difference between one seed each.

AP is no mean over images, so its interval comes from resampling them: every resample draws as many images
as the set has, with replacement, and AP is computed anew; both detectors see the same images (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993). An image drawn m times counts as m images, exactly as
if it were in the data set m times. Objects and detections are matched within an image, hence only once.
"""

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array
from tqdm import tqdm

from rt_detectron.study.matching import RECALL_THRESHOLDS, CategoryMatches, Matches

RESAMPLES = 1000  # an end of a 95 % interval then has a random error of about a tenth of a standard error
_BATCH_CELLS = 4_000_000  # detections x resamples at a time: some 100 MB


def average_precision(matches: Matches, counts: np.ndarray) -> np.ndarray:
    """COCO's AP, averaged over IoU thresholds and categories, where image i is there ``counts[i]`` times.

    Args:
        matches: of a test set of I images.
        counts: (I, B) how often each image is there, in each of B resamples.

    Returns:
        (B,) AP in percent; NaN for a resample without any object.
    """
    total, present = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    for category in matches.categories:
        objects = category.objects @ counts
        total += np.where(objects > 0, _category_ap(category, counts, objects), 0.0)
        present += objects > 0
    with np.errstate(invalid="ignore"):
        return 100 * total / present


def _category_ap(category: CategoryMatches, counts: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """(B,) AP in 0..1 of one category, averaged over the IoU thresholds."""
    weights = counts[category.image]  # (D, B)
    shown = np.cumsum(weights, axis=0, dtype=counts.dtype)
    ap = np.zeros(counts.shape[1])
    for hit, ignored in zip(category.hit, category.ignored, strict=True):
        # Interpolated precision changes only at hits: at false alarms recall stands still, precision falls.
        # For the same reason a hit that counts m times needs no steps in between.
        at = np.flatnonzero(hit)
        if not len(at):
            continue
        hits = np.cumsum(weights[at], axis=0, dtype=counts.dtype)
        precision = hits / np.maximum(shown[at] - _before(at, np.flatnonzero(ignored), weights), 1)
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recall = hits / np.maximum(objects, 1)
        reached = np.searchsorted(RECALL_THRESHOLDS, recall, side="right")
        ap += (precision * np.diff(reached, axis=0, prepend=0)).sum(axis=0)
    return ap / (len(category.hit) * len(RECALL_THRESHOLDS))


def _before(at: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The total weight of the ``chosen`` rows that lie before each row of ``at``; both ascending."""
    totals = np.zeros((len(chosen) + 1, weights.shape[1]), dtype=weights.dtype)
    np.cumsum(weights[chosen], axis=0, out=totals[1:])
    return totals[np.searchsorted(chosen, at)]


def resampled_differences(
    matches: Matches, baseline: Matches, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """AP of ``matches`` minus AP of ``baseline``, both on the same resampled images.

    Returns:
        (resamples,) differences in percent points, without those that are undefined.

    Raises:
        ValueError: the two were not evaluated on the same images.
    """
    if not np.array_equal(matches.image_ids, baseline.image_ids):
        raise ValueError("the two detectors were evaluated on different images")
    largest = max((len(c.image) for c in matches.categories + baseline.categories), default=0)
    return _resampled(
        lambda counts: average_precision(matches, counts) - average_precision(baseline, counts),
        len(matches.image_ids),
        largest,
        resamples,
        seed,
    )


def resampled_accuracy_differences(
    correct: np.ndarray,
    baseline: np.ndarray,
    labels: np.ndarray,
    per_class: bool,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Accuracy of one classifier minus that of a baseline, both on the same resampled images.

    Args:
        correct: (I,) whether each image's class was found; ``baseline`` the same.
        labels: (I,) class indices.
        per_class: the mean of the classes' accuracies, of those in the resample, instead of top-1.

    Returns:
        (resamples,) differences in percent points.
    """
    gain = correct.astype(np.int32) - baseline.astype(np.int32)
    groups = np.unique(labels, return_inverse=True)[1] if per_class else np.zeros(len(labels), dtype=int)
    of_group = csr_array((np.ones(len(groups), np.int32), (groups, np.arange(len(groups)))))

    def difference(counts: np.ndarray) -> np.ndarray:
        images, gained = of_group @ counts, of_group @ (counts * gain[:, None])
        with np.errstate(invalid="ignore"):
            return 100 * np.nanmean(gained / images, axis=0)

    return _resampled(difference, len(labels), 0, resamples, seed)


def _resampled(
    difference: Callable[[np.ndarray], np.ndarray], images: int, largest: int, resamples: int, seed: int
) -> np.ndarray:
    """The defined ones of ``difference`` over resamples, whose (images, B) counts it is given in batches."""
    generator = np.random.default_rng(seed)
    batch = max(1, _BATCH_CELLS // max(largest, images))
    differences = []
    with tqdm(total=resamples, desc="bootstrap over images", unit="resample", disable=None) as bar:
        for start in range(0, resamples, batch):
            size = min(batch, resamples - start)
            counts = generator.multinomial(images, np.full(images, 1 / images), size=size).T
            counts = np.ascontiguousarray(counts, dtype=np.int32)
            differences.append(difference(counts))
            bar.update(size)
    found = np.concatenate(differences)
    return found[np.isfinite(found)]
