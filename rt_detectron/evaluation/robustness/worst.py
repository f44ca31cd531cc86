"""The worst case over several attacks: for each image, the one that does most harm."""

import math
from collections.abc import Sequence

import numpy as np

from rt_detectron.evaluation.coco import REC_THRS
from rt_detectron.evaluation.counts import CountingEvaluator, Prediction, worst_choice
from rt_detectron.evaluation.matching import Matches, average_precision, chosen_matches


def worst_case(parts: Sequence[dict[str, Matches]], images: int, categories: int) -> dict[str, Matches]:
    """What an attacker reaches who chooses for each image among the same attacks on all of them.

    Of an image the attack counts that leaves the least AP on it alone, of the first task (boxes, if there are
    any); of equal ones, that with the surest false detections. AP is no mean over images, so this choice may
    leave more AP on all images than one attack does by itself; then that one is the worst case.

    Args:
        parts: of each attack, task -> matches, on the same images.
        images, categories: their numbers.
    """
    task = min(parts[0])  # "bbox" before "keypoints" and "segm"
    harm = [_harm(part[task], images, categories) for part in parts]
    choice = np.array([min(range(len(parts)), key=lambda k: harm[k][image]) for image in range(images)])
    chosen = {name: chosen_matches([part[name] for part in parts], choice) for name in parts[0]}

    def ap(found: dict[str, Matches]) -> float:
        value = average_precision(found[task], categories, REC_THRS)
        return math.inf if math.isnan(value) else value

    return min([chosen, *parts], key=ap)


def worst_counts(evaluator: CountingEvaluator, parts: Sequence[Sequence[Prediction]]) -> list[Prediction]:
    """The same for an evaluator that counts: of each image its counts under one of the attacks.

    Args:
        parts: of each attack, the counts of the same images in the same order.
    """
    choice = worst_choice(np.stack([evaluator.scored(part) for part in parts]), evaluator.main_metric)
    return [parts[number][image] for image, number in enumerate(choice)]


def _harm(matches: Matches, images: int, categories: int) -> list[tuple[float, float]]:
    """Of each image its AP, infinite without objects, and minus the total score of false detections."""
    found = []
    for one in matches.image_by_image(images):
        ap = average_precision(one, categories, REC_THRS)
        false = ~one.hit[0, 0] & ~one.ignored[0, 0] if len(one.image) else np.zeros(0, bool)
        found.append((math.inf if math.isnan(ap) else ap, -float(one.score[false].sum())))
    return found
