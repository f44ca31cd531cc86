"""Pictures of a report: images on which an arm gains or loses most, and images before and after an attack."""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from rt_detectron.study.bootstrap import f1_per_image, precision_at_recall
from rt_detectron.study.figures import Charts, Figure
from rt_detectron.study.grid import FINAL
from rt_detectron.study.images import UNREADABLE, datasets_of, load_matches, one_reason, test_sets_of
from rt_detectron.study.record import Outcome
from rt_detectron.study.statistics import (
    CLEAN,
    Comparison,
    lines_of,
    main_metric,
    select,
)
from rt_detectron.visualization.coco import (
    ground_truth_instances,
    load_coco,
    load_image,
    load_predictions,
    predicted_instances,
)
from rt_detectron.visualization.draw import draw_instances

SCORE_THRESHOLD = 0.3  # for the predictions that are drawn and that count for the F1 of an image
_EACH = 2  # best and worst images of a comparison, and attacked images of an arm
_MANY = 6  # from so many comparisons on, only the largest difference of each target has pictures, one each
_WIDTH = 960  # of a picture in the report, in pixels


def best_and_worst(comparison: Comparison) -> tuple[list[Figure], list[str]]:
    """Ground truth, baseline and arm, a picture each, on the images whose F1 rises and falls most.

    They are of the first common seed of each comparison.

    Returns:
        The pictures, and notes on comparisons without any.
    """
    figures, notes = [], []
    scores = comparison.scores[comparison.scores["arm"] != comparison.scores["baseline"]]
    compared, each = scores.drop_duplicates(["target", "arm"]), _EACH
    if len(compared) >= _MANY:
        compared, each = _largest_differences(scores), 1
    for line in lines_of(compared):
        pair = _first_pair(comparison, line)
        if pair is None:
            continue  # the report already says that these cannot be compared
        outcome, baseline = pair
        try:
            found = _comparison(line, outcome, baseline, each)
        except UNREADABLE as error:
            notes.append(f"{line.arm}, {line.target}: no pictures ({one_reason(error)}).")
            continue
        figures += found
        if not found:
            notes.append(f"{line.arm}, {line.target}: F1 differs on no image, so no pictures.")
    return figures, notes


def _first_pair(comparison: Comparison, line: Any) -> tuple[Outcome, Outcome] | None:
    """The first outcomes of an arm and of its baseline, of the same seed if there is one."""
    ours, theirs = (_runs_of(comparison, line.target, arm) for arm in (line.arm, line.baseline))
    if not ours or not theirs:
        return None
    first = next((run for run in ours if run in theirs), next(iter(ours)))
    return ours[first], theirs.get(first, next(iter(theirs.values())))


def _runs_of(comparison: Comparison, target: str, arm: str) -> dict[tuple[int, str], Outcome]:
    """(seed, checkpoint) -> outcome, of the final trials of one arm and target that have results."""
    return {
        (outcome.trial.seed, outcome.trial.checkpoint): outcome
        for outcome in comparison.outcomes
        if outcome.trial.stage == FINAL and outcome.results
        if (outcome.trial.target, outcome.trial.arm) == (target, arm)
    }


def _largest_differences(scores: pd.DataFrame) -> pd.DataFrame:
    """For each target, the arm whose main metric differs most from its baseline."""
    lines = select(scores, kind=CLEAN)
    lines = lines[lines["change"].notna() & (lines["metric"] == lines["task"].map(main_metric))]
    lines = lines.drop_duplicates(["target", "arm"])
    return lines.loc[lines["change"].abs().groupby(lines["target"], sort=False).idxmax()]


def _comparison(line: Any, outcome: Outcome, baseline: Outcome, each: int) -> list[Figure]:
    dataset, others = test_sets_of(outcome, baseline)
    task = next(task for task in ("bbox", "segm") if task in (outcome.results or {})["metrics"])
    ours, theirs = (load_matches(d["json_file"], d["predictions"], task) for d in (dataset, others))
    scores = np.array([f1_per_image(m, SCORE_THRESHOLD) for m in (theirs, ours)])
    change = np.nan_to_num(scores[1] - scores[0])
    order = np.argsort(-change, kind="stable")
    chosen = [i for i in order[:each] if change[i] > 0] + [i for i in order[::-1][:each] if change[i] < 0]
    image_ids = [int(ours.image_ids[i]) for i in chosen]
    coco = load_coco(dataset["json_file"])
    predictions = [load_predictions(d["predictions"], image_ids) for d in (others, dataset)]
    figures = []
    for position, image_id in zip(chosen, image_ids, strict=True):
        image = load_image(coco, dataset["image_root"], image_id)
        truth = ground_truth_instances(coco, image_id)
        pictures, captions = [draw_instances(image, truth)], [f"ground truth: {len(truth)}"]
        for arm, of_image, f1 in zip(
            (line.baseline, line.arm), predictions, scores[:, position], strict=True
        ):
            predicted = predicted_instances(coco, of_image[image_id], SCORE_THRESHOLD)
            pictures.append(draw_instances(image, predicted))
            captions.append(f"{arm}: F1 {100 * f1:.0f} %, {len(predicted)} found")
        which = "gains" if change[position] > 0 else "loses"
        name = f"{which}-{line.target}-{line.arm}-{image_id}"
        about = f"{line.arm} {which} most, image {image_id}, seed {outcome.trial.seed}"
        for view, picture, caption in zip(("truth", "baseline", "arm"), pictures, captions, strict=True):
            text = f"{about}: {caption}" if view == "truth" else caption
            figures.append(_jpeg(f"{name}-{view}", f"{text}.", caption, picture, line.target, _WIDTH // 2))
    return figures


def precision_curves(comparison: Comparison, charts: Charts) -> Iterator[Figure]:
    """For each detector, precision against recall of the first run of each arm, as far as it can be read."""
    for target in comparison.study.targets:
        curves: dict[str, np.ndarray] = {}
        for arm in comparison.study.arms:
            with suppress(*UNREADABLE, StopIteration):  # the report names these elsewhere
                outcome = next(iter(_runs_of(comparison, target.name, arm.name).values()))
                dataset, metrics = datasets_of(outcome)[0], (outcome.results or {})["metrics"]
                task = "bbox" if "bbox" in metrics else "segm"
                matches = load_matches(dataset["json_file"], dataset["predictions"], task)
                curves[arm.name] = 100 * precision_at_recall(matches)
        if curves:
            yield charts.precision(target.name, curves)


def evaluation_pictures(outcomes: Sequence[Outcome]) -> tuple[list[Figure], list[str]]:
    """Some of the pictures that the evaluation under attack wrote, of the first seed of each arm."""
    figures, notes, seen = [], [], set()
    for outcome in outcomes:
        pair = (outcome.trial.arm, outcome.trial.target)
        pictures = (outcome.robustness or {}).get("pictures") or []
        if pair in seen or not pictures:
            continue
        seen.add(pair)
        for number, picture in enumerate(pictures[:_EACH]):
            try:
                with Image.open(outcome.folder / picture["file"]) as image:
                    content = image.convert("RGB")
                name = f"attacked-{outcome.trial.target}-{outcome.trial.arm}-{number}"
                caption = f"{outcome.trial.target}, {outcome.trial.arm}: {picture['caption']}"
                target = outcome.trial.target
                figures.append(_jpeg(name, caption, picture["caption"], content, target, _WIDTH))
            except UNREADABLE as error:
                notes.append(f"{outcome.trial.name}: a picture cannot be read ({one_reason(error)}).")
    return figures, notes


def _jpeg(name: str, caption: str, alt: str, picture: Image.Image, target: str, width: int) -> Figure:
    if picture.width > width:
        size = (width, round(picture.height * width / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=75, optimize=True)
    return Figure(name, caption, alt, "image/jpeg", stream.getvalue(), target)
