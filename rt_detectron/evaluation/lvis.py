"""LVIS's AP as the lvis package computes it, many times as fast."""

import copy
import itertools
import logging
import os
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import LVISEvaluator as Detectron2LVISEvaluator
from detectron2.utils.logger import create_small_table

from rt_detectron.data.annotations import annotations_of, check_ids
from rt_detectron.evaluation.coco import (
    SHAPES,
    EncodesMasksAtOnce,
    check_annotations,
    check_shapes,
    restore_category_ids,
    write_detections,
)
from rt_detectron.evaluation.matching import (
    Annotations,
    Detections,
    box_iou,
    column,
    mask_iou,
    precision_and_recall,
)
from rt_detectron.utils.errors import InputError, optional_import

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
MAX_DETS = 300  # of an image, over all categories

logger = logging.getLogger(__name__)


class LVISEvaluator(EncodesMasksAtOnce, Detectron2LVISEvaluator):
    """Detectron2's LVISEvaluator with a faster AP, by :func:`evaluate_lvis_detections`.

    Arguments, files and results are the same. (The lvis package's own code fails with NumPy 1.24 and later.)

    Raises:
        InputError: for an annotation file that cannot be evaluated, or if the lvis package is missing.
    """

    def __init__(self, dataset_name: str, *args, **options):
        optional_import("lvis", "lvis", "evaluation on LVIS")
        path = MetadataCatalog.get(dataset_name).get("json_file", dataset_name)
        with annotations_of(path):
            super().__init__(dataset_name, *args, **options)
            if self._do_evaluation:
                check_ids(self._lvis_api.dataset, path)
                check_annotations(self._lvis_api.dataset, path)
                _check_federation(self._lvis_api.dataset, path)

    def check_shapes(self, masks: bool, keypoints: bool) -> None:
        """Check that the annotations have what mask AP compares. LVIS has no keypoints."""
        if self._do_evaluation:
            check_shapes(self._lvis_api.dataset, self._metadata.json_file, masks)

    def _eval_predictions(self, predictions: list[dict]) -> None:
        results = list(itertools.chain.from_iterable(prediction["instances"] for prediction in predictions))
        tasks = self._tasks or self._tasks_from_predictions(results)
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is None:  # LVIS counts from 1
            mapping = {number: number - 1 for number in self._lvis_api.cats}
        restore_category_ids(results, {contiguous: original for original, contiguous in mapping.items()})
        if self._output_dir:
            write_detections(results, os.path.join(self._output_dir, "lvis_instances_results.json"))
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        for task in sorted(tasks):
            self._results[task] = evaluate_lvis_detections(
                self._lvis_api, results, task, max_dets=self._max_dets_per_image
            )


def evaluate_lvis_detections(
    lvis, results: list[dict[str, Any]], task: str, *, max_dets: int | None = None
) -> dict[str, float]:
    """AP of detections on a federated dataset, in percent, as the lvis package's LVISEval gives it.

    The package removes detections of categories that an image was not searched for, and summarises.

    Args:
        lvis: the annotations, an lvis.LVIS.
        results: detections in COCO's results format; not changed.
        task: "bbox" or "segm".
        max_dets: limit for each image; None is LVIS's 300, a negative number is no limit.

    Returns:
        The values of METRICS: NaN without detections, -100 if a category group or a size has no object.

    Raises:
        InputError: for another task, or for detections without what it needs.
    """
    from lvis import LVISEval, LVISResults

    if task not in ("bbox", "segm"):
        raise InputError(f"LVIS has no task {task!r}; use bbox or segm")
    if not results:
        logger.warning("No predictions from the model!")
        return dict.fromkeys(METRICS, float("nan"))
    needed = ("image_id", "category_id", "score", SHAPES[task])
    try:
        # Only the task's own fields: with a box beside it, a mask would get the box's area.
        results = [{field: result[field] for field in needed} for result in results]
    except KeyError as error:
        raise InputError(f"a detection has no {error}, which {task} AP needs") from None
    bare = copy.copy(lvis)  # LVISResults makes a deep copy, and then replaces the annotations
    bare.dataset = {**lvis.dataset, "annotations": []}
    evaluation = LVISEval(
        lvis, LVISResults(bare, results, MAX_DETS if max_dets is None else max_dets), iou_type=task
    )
    evaluation._prepare()
    evaluation.eval = _curves(evaluation, SHAPES[task])
    evaluation.summarize()
    evaluation.print_results()
    metrics = {name: float(evaluation.get_results()[name] * 100) for name in METRICS}
    logger.info(f"Evaluation results for {task}:\n{create_small_table(metrics)}")
    return metrics


def _curves(evaluation, field: str) -> dict[str, Any]:
    """What LVISEval.evaluate() and accumulate() compute."""
    params = evaluation.params

    def columns(dicts: list[dict]) -> dict[str, np.ndarray]:
        shapes = [one[field] for one in dicts]
        return {
            "image": np.searchsorted(params.img_ids, [one["image_id"] for one in dicts]),
            "category": np.searchsorted(params.cat_ids, [one["category_id"] for one in dicts]),
            "shape": column(shapes) if field == "segmentation" else np.array(shapes, float).reshape(-1, 4),
            "area": np.array([one["area"] for one in dicts], float),
        }

    annotated, detected = (
        list(itertools.chain.from_iterable(groups.values())) for groups in (evaluation._gts, evaluation._dts)
    )
    ignored = np.array([one["ignore"] for one in annotated], bool)
    unsure = [one["category_id"] in evaluation.img_nel[one["image_id"]] for one in detected]
    score = np.array([one["score"] for one in detected], float)
    no_crowd = np.zeros(len(annotated), bool)  # LVIS has none
    curves = precision_and_recall(
        Annotations(**columns(annotated), ignored=ignored, crowd=no_crowd),
        Detections(**columns(detected), ignored=np.array(unsure, bool), score=score),
        {"bbox": box_iou, "segmentation": mask_iou}[field],
        num_categories=len(params.cat_ids),
        iou_thrs=params.iou_thrs,
        rec_thrs=params.rec_thrs,
        area_rng=params.area_rng,
        # LVISResults has already applied the limit for each image.
        max_dets=[max(map(len, evaluation._dts.values()), default=1)],
    )
    return {"params": params, "precision": curves["precision"][..., 0], "recall": curves["recall"][..., 0]}


def _check_federation(dataset: dict[str, Any], path: str) -> None:
    fields = {"images": ("neg_category_ids", "not_exhaustive_category_ids"), "categories": ("frequency",)}
    for kind, needed in fields.items():
        for entry in dataset[kind]:
            for field in needed:
                if field not in entry:
                    raise InputError(
                        f"{path}: {kind} entry {entry.get('id')} has no '{field}', which LVIS's AP needs; "
                        'set the dataset\'s evaluator_type to "coco" for plain COCO AP'
                    )
