"""Pictures: where an arm does best and worst against its baseline, and images before and after an attack."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rt_detectron.study.answers import main_task
from rt_detectron.study.bootstrap import f1_per_image
from rt_detectron.study.figures import Figure
from rt_detectron.study.grid import FINAL
from rt_detectron.study.measurements import CLEAN, Quantity
from rt_detectron.study.record import Outcome
from rt_detectron.study.statistics import Row
from rt_detectron.study.table import UNREADABLE, load_matches, one_reason, test_sets_of
from rt_detectron.visualization.coco import (
    ground_truth_instances,
    load_coco,
    load_image,
    load_predictions,
    predicted_instances,
)
from rt_detectron.visualization.draw import draw_instances, panel

SCORE_THRESHOLD = 0.3  # of the predictions shown, and of those that the F1 of an image counts
_EACH = 2  # best and worst images of a comparison, and attacked ones of an arm
_MANY = 6  # comparisons, from which on only the greatest difference of each target has pictures, one each
_WIDTH = 960  # pixels of a picture on the page


def best_and_worst(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> tuple[list[Figure], list[str]]:
    """Ground truth, baseline and arm side by side on the images whose F1 rises and falls most.

    Of each comparison its first common seed is shown.

    Returns:
        The pictures, and what is to say about comparisons that have none.
    """
    figures, notes = [], []
    compared = [row for row in rows if not row.is_baseline]
    each = _EACH
    if len(compared) >= _MANY:
        compared, each = _greatest(compared), 1
    finished = {_key(o): o for o in outcomes if o.trial.stage == FINAL and o.results}
    for row in compared:
        seeds = [seed for seed in row.seeds if (row.baseline, row.target, seed) in finished]
        if not seeds:
            continue  # that is said of the numbers already
        pair = [finished[arm, row.target, seeds[0]] for arm in (row.arm, row.baseline)]
        try:
            found = _comparison(row, *pair, each)
        except UNREADABLE as error:
            notes.append(f"{row.arm}, {row.target}: no pictures ({one_reason(error)}).")
            continue
        figures += found
        if not found:
            notes.append(f"{row.arm}, {row.target}: F1 differs on no image, so no pictures.")
    return figures, notes


def _greatest(rows: Sequence[Row]) -> list[Row]:
    """Of each target the arm whose main number differs most from its baseline's."""
    found: dict[str, tuple[float, Row]] = {}
    for row in rows:
        change = row.changes.get(Quantity(CLEAN, main_task([row])))
        size = abs(change.differences.mean) if change else -1.0
        if row.target not in found or size > found[row.target][0]:
            found[row.target] = size, row
    return [row for _, row in found.values()]


def _key(outcome: Outcome) -> tuple[str, str, int]:
    return outcome.trial.arm, outcome.trial.target, outcome.trial.seed


def _comparison(row: Row, outcome: Outcome, baseline: Outcome, each: int) -> list[Figure]:
    dataset, others = test_sets_of(outcome, baseline)
    task = next(task for task in ("bbox", "segm") if task in outcome.results["metrics"])
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
        for arm, of_image, f1 in zip((row.baseline, row.arm), predictions, scores[:, position], strict=True):
            predicted = predicted_instances(coco, of_image[image_id], SCORE_THRESHOLD)
            pictures.append(draw_instances(image, predicted))
            captions.append(f"{arm}: F1 {100 * f1:.0f} %, {len(predicted)} found")
        which = "gains" if change[position] > 0 else "loses"
        figures.append(
            _jpeg(
                f"{which}-{row.target}-{row.arm}-{image_id}",
                f"{row.target}: {row.arm} {which} most, image {image_id}, seed {outcome.trial.seed}.",
                "; ".join(captions),
                panel(pictures, captions),
            )
        )
    return figures


def attacked(outcomes: Sequence[Outcome]) -> tuple[list[Figure], list[str]]:
    """Some of the before and after pictures that the robustness evaluation left, of each arm's first seed."""
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
                figures.append(_jpeg(name, caption, picture["caption"], content))
            except UNREADABLE as error:
                notes.append(f"{outcome.trial.name}: a picture cannot be read ({one_reason(error)}).")
    return figures, notes


def _jpeg(name: str, caption: str, alt: str, picture: Image.Image) -> Figure:
    if picture.width > _WIDTH:
        size = (_WIDTH, round(picture.height * _WIDTH / picture.width))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=75, optimize=True)
    return Figure(name, caption, alt, "image/jpeg", stream.getvalue())
