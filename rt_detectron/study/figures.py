"""The figures of a report: scores per arm, training curves, example pictures, as data URIs."""

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rt_detectron.study.grid import Study
from rt_detectron.study.record import Outcome
from rt_detectron.study.statistics import Setting, is_number, scores_of
from rt_detectron.visualization.coco import (
    ground_truth_instances,
    load_coco,
    load_image,
    load_predictions,
    predicted_instances,
    spread_image_ids,
)
from rt_detectron.visualization.draw import draw_instances, panel
from rt_detectron.visualization.plots import Series, curve_plot, dot_plot

SCORE_THRESHOLD = 0.3  # of the predictions shown in pictures; AP uses all of them
EXAMPLES = 4


@dataclass(frozen=True)
class Figure:
    """A picture for the page: data URIs, ``dark`` for a dark page where it differs."""

    light: str
    alt: str
    dark: str | None = None


@dataclass(frozen=True)
class Section:
    """The figures of one setting (detector and learning rate), and what is to say about them."""

    title: str
    scores: list[Figure]
    curves: list[Figure]
    examples: list[Figure]
    note: str


def make_section(study: Study, setting: Setting, outcomes: Sequence[Outcome]) -> Section:
    """All figures of one setting; pictures that cannot be made are named instead."""
    here = [
        outcome for outcome in outcomes if (outcome.trial.detector, outcome.trial.learning_rate) == setting
    ]
    finished = [outcome for outcome in here if outcome.results]
    try:
        examples, note = _examples(study, finished)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        examples, note = (
            [],
            f"No example pictures: the predictions or the data set cannot be read ({reason}).",
        )
    return Section(
        title=f"{setting[0]}, learning rate {setting[1]:g}",
        scores=_score_figures(study, finished, outcomes),
        curves=_curve_figures(study, here),
        examples=examples,
        note=note,
    )


def _series(study: Study) -> list[Series]:
    return [Series(arm.name, index) for index, arm in enumerate(study.arms)]


def _score_figures(study: Study, here: Sequence[Outcome], everywhere: Sequence[Outcome]) -> list[Figure]:
    """Box and mask AP per arm, on the same scale in every setting."""
    figures = []
    for column in ("box AP", "mask AP"):
        scores = [(outcome.trial.arm, scores_of(outcome.results["metrics"]).get(column)) for outcome in here]
        values = [[v for arm, v in scores if arm == name.name and v is not None] for name in _series(study)]
        if any(values):
            limits = _limits([scores_of(o.results["metrics"]).get(column) for o in everywhere if o.results])
            alt = f"{column} of each arm: one dot per seed, a bar at the mean"
            label = f"{column} (%)"
            figures.append(
                _themed(
                    lambda dark, v=values, k=label, x=limits: dot_plot(_series(study), v, k, x, dark), alt
                )
            )
    return figures


def _limits(values: Sequence[float | None]) -> tuple[float, float]:
    """An axis that holds all values with some room, at least two points of AP wide."""
    numbers = [value for value in values if value is not None]
    low, high = min(numbers), max(numbers)
    margin = max(0.12 * (high - low), 1.0)
    return max(low - margin, 0.0) - 0.02 * margin, high + margin


def _curve_figures(study: Study, here: Sequence[Outcome]) -> list[Figure]:
    curves = [
        [curve for o in here if o.trial.arm == arm.name and (curve := _loss_curve(o.folder))[0]]
        for arm in study.arms
    ]
    if not any(curves):
        return []
    alt = "total training loss against the iteration, one line per seed"
    return [_themed(lambda dark: curve_plot(_series(study), curves, dark), alt)]


def _loss_curve(folder: Path) -> tuple[list[int], list[float]]:
    """Iterations and total losses from Detectron2's metrics.json; of a repeated iteration the last counts."""
    losses: dict[int, float] = {}
    try:
        lines = (folder / "metrics.json").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [], []
    for line in lines:
        try:
            record = json.loads(line)
            if is_number(record["total_loss"]):
                losses[int(record["iteration"])] = record["total_loss"]
        except (ValueError, KeyError, TypeError):
            continue  # evaluation records have no loss; a killed trial leaves half a line
    return sorted(losses), [losses[iteration] for iteration in sorted(losses)]


def _examples(study: Study, finished: Sequence[Outcome]) -> tuple[list[Figure], str]:
    """Ground truth beside the predictions of every arm, from the seed that most arms have finished."""
    by_seed = {seed: [o for o in finished if o.trial.seed == seed] for seed in study.seeds}
    seed, shown = max(by_seed.items(), key=lambda item: len(item[1]))  # the first of equals
    if not shown:
        return [], "No example pictures: no trial has finished here."
    dataset = shown[0].results["datasets"][0]
    coco = load_coco(dataset["json_file"])
    image_ids = spread_image_ids(coco, EXAMPLES)
    detections = {
        o.trial.arm: load_predictions(_dataset(o, dataset)["predictions"], image_ids) for o in shown
    }
    figures = []
    for image_id in image_ids:
        image = load_image(coco, dataset["image_root"], image_id)
        truth = ground_truth_instances(coco, image_id)
        pictures, captions = [draw_instances(image, truth)], [f"ground truth: {len(truth)}"]
        for arm, of_image in detections.items():
            predicted = predicted_instances(coco, of_image[image_id], SCORE_THRESHOLD)
            pictures.append(draw_instances(image, predicted))
            captions.append(f"{arm}: {len(predicted)}")
        figures.append(
            _jpeg(panel(pictures, captions), alt=f"image {image_id}: {'; '.join(captions)} objects")
        )
    return figures, f"Seed {seed}; images {', '.join(map(str, image_ids))} of {dataset['name']}."


def _dataset(outcome: Outcome, wanted: dict[str, Any]) -> dict[str, Any]:
    for dataset in outcome.results["datasets"]:
        if dataset["json_file"] == wanted["json_file"]:
            return dataset
    raise ValueError(f"{outcome.trial.name} was not evaluated on {wanted['name']}")


def _themed(plot: Callable[[bool], bytes], alt: str) -> Figure:
    return Figure(_data_uri("image/svg+xml", plot(False)), alt, dark=_data_uri("image/svg+xml", plot(True)))


def _jpeg(picture: Image.Image, alt: str) -> Figure:
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=85)
    return Figure(_data_uri("image/jpeg", stream.getvalue()), alt)


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
