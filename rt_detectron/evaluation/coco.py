"""COCO's AP as pycocotools computes it, many times as fast (benchmarks/coco_eval.py)."""

import itertools
import json
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.structures import Instances
from pycocotools import mask as rle_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rt_detectron.data.annotations import annotations_of, are_numbers, shape_problem
from rt_detectron.evaluation.matching import (
    Annotations,
    Detections,
    Matches,
    Overlap,
    box_iou,
    column,
    curves_of,
    keypoint_similarity,
    mask_areas,
    mask_iou,
    mean_precision,
    precision_and_recall,
    write_matches,
)
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import replaced_atomically

REC_THRS = np.linspace(0, 1, 101).tolist()  # the recall levels of COCO's AP
SHAPES = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # the field of each task


class EncodesMasksAtOnce(DatasetEvaluator):
    """For Detectron2's evaluators of COCO and LVIS, ahead of them among the bases."""

    _predictions: list[dict[str, Any]]

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """As Detectron2's; the masks of an image are encoded at once."""
        for given, output in zip(inputs, outputs, strict=True):
            bare, masks = without_masks(output)
            super().process([given], [bare])
            if masks is not None:
                add_masks(self._predictions[-1]["instances"], masks)


class COCOEvaluator(EncodesMasksAtOnce, Detectron2COCOEvaluator):
    """Detectron2's COCOEvaluator with a faster AP, by :func:`evaluate_detections`.

    Arguments, files and results are the same, but for an annotation with id 0: pycocotools stores a match as
    the annotation's id, and so takes one with that object for none. Here it counts like any other.
    ``use_fast_impl=False`` uses pycocotools instead.

    Attributes:
        keeps_matches: whether to write ``matches.npz`` (:class:`~.matching.Matches`), too, beside
            ``coco_instances_results.json``.

    Raises:
        InputError: for an annotation file that cannot be evaluated.
    """

    keeps_matches = False

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        use_fast_impl: bool = True,
        **options,
    ):
        path = MetadataCatalog.get(dataset_name).get("json_file", dataset_name)
        with annotations_of(path):
            # Detectron2's own fast implementation needs a compiler.
            super().__init__(dataset_name, tasks, distributed, output_dir, use_fast_impl=False, **options)
            if self._do_evaluation:
                check_annotations(self._coco_api.dataset, path)
                _renumber_zero(self._coco_api)
        self._use_fast_impl = use_fast_impl

    def check_shapes(self, masks: bool, keypoints: bool) -> None:
        """Check that the annotations have the shapes that these tasks compare, as :func:`check_shapes`."""
        if self._do_evaluation:
            sigmas = COCOevalMaxDets(iouType="keypoints").params.kpt_oks_sigmas
            count = len(self._kpt_oks_sigmas or sigmas) if keypoints else 0
            check_shapes(self._coco_api.dataset, self._metadata.json_file, masks, count)

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence[int] | None = None) -> None:
        if not self._use_fast_impl:
            super()._eval_predictions(predictions, img_ids)
            return
        results = list(itertools.chain.from_iterable(prediction["instances"] for prediction in predictions))
        tasks = self._tasks or self._tasks_from_predictions(results)
        mapping = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if mapping is not None:
            restore_category_ids(results, {contiguous: original for original, contiguous in mapping.items()})
        if self._output_dir:
            write_detections(results, os.path.join(self._output_dir, "coco_instances_results.json"))
        if not self._do_evaluation:
            self._logger.info("Annotations are not available for evaluation.")
            return
        evaluations = {
            task: evaluate_detections(
                self._coco_api,
                results,
                task,
                max_dets=self._max_dets_per_image,
                kpt_oks_sigmas=self._kpt_oks_sigmas,
                img_ids=img_ids,
                keep_matches=self.keeps_matches,
            )
            for task in sorted(tasks)
        }
        if self._output_dir and self.keeps_matches:
            write_evaluations(evaluations, os.path.join(self._output_dir, "matches.npz"))
        for task, evaluation in evaluations.items():
            self._results[task] = self._derive_coco_results(
                evaluation if results else None,  # Detectron2's AP of nothing at all is undefined
                task,
                class_names=self._metadata.get("thing_classes"),
            )


def without_masks(output: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
    """A detector's output for an image without its masks, and these, (N, H, W) on any device."""
    if "instances" not in output or not output["instances"].has("pred_masks"):
        return output, None
    instances = output["instances"]
    fields = instances.get_fields()
    bare = Instances(
        instances.image_size, **{name: field for name, field in fields.items() if name != "pred_masks"}
    )
    return {**output, "instances": bare}, fields["pred_masks"]


def add_masks(results: list[dict[str, Any]], masks: torch.Tensor) -> None:
    """Give each of an image's detections in COCO's format its mask, as run lengths.

    These count column by column, as masks pasted by :mod:`rt_detectron.layers.paste_masks` lie. Those of a
    GPU are transposed there.
    """
    if not results:
        return
    columns = masks.bool().transpose(1, 2)
    if columns.device.type != "cpu":
        columns = columns.contiguous().cpu()
    for result, mask in zip(results, columns.numpy().view(np.uint8), strict=True):
        (rle,) = rle_masks.encode(np.asfortranarray(mask.T[..., None]))
        result["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}


def evaluate_detections(
    coco: COCO,
    results: list[dict[str, Any]],
    task: str,
    *,
    max_dets: Sequence[int] = (1, 10, 100),
    kpt_oks_sigmas: Sequence[float] = (),
    img_ids: Sequence[int] | None = None,
    keep_matches: bool = False,
) -> COCOeval:
    """AP and AR of detections, as pycocotools' loadRes(), evaluate(), accumulate() and summarize() give them.

    An annotation with id 0 counts like any other; pycocotools never matches it.
    A mask's area is its own, as in Detectron2, not that of a box given with it.

    Args:
        coco: the annotations. Segmentations are replaced by run-length encodings, as pycocotools does.
        results: detections in COCO's results format; not changed.
        task: "bbox", "segm" or "keypoints".
        max_dets: three limits on the number of detections of a category in an image; not for keypoints.
        kpt_oks_sigmas: one for each keypoint; COCO's if empty.
        img_ids: the images to evaluate on; None is all.
        keep_matches: whether ``eval`` has "matches" (:class:`~.matching.Matches`), too.

    Returns:
        A COCOeval with ``params``, ``eval`` ("precision", "recall", "scores") and ``stats``.

    Raises:
        InputError: for detections or annotations without what the task needs.
    """
    if task not in SHAPES:
        raise InputError(f"evaluation task {task!r} is unknown; use one of {', '.join(SHAPES)}")
    evaluation = COCOevalMaxDets(coco, iouType=task)  # as pycocotools, but for any max_dets
    params = evaluation.params
    params.imgIds = sorted(set(params.imgIds if img_ids is None else img_ids))
    overlap: Overlap
    if task == "keypoints":
        if len(kpt_oks_sigmas):
            params.kpt_oks_sigmas = np.array(kpt_oks_sigmas)
        overlap = partial(keypoint_similarity, sigmas=params.kpt_oks_sigmas)
    else:
        params.maxDets = sorted(max_dets)
        overlap = {"bbox": box_iou, "segm": mask_iou}[task]
    evaluation.eval = {
        "params": params,
        **precision_and_recall(
            _annotations(coco, params),
            _detections(coco, results, params),
            overlap,
            num_categories=len(params.catIds),
            iou_thrs=params.iouThrs,
            rec_thrs=params.recThrs,
            area_rng=params.areaRng,
            max_dets=params.maxDets,
            keep_matches=keep_matches,
        ),
    }
    evaluation.eval["counts"] = list(evaluation.eval["precision"].shape)
    evaluation.summarize()
    return evaluation


def write_evaluations(evaluations: dict[str, COCOeval], path: str) -> None:
    """Write what :func:`evaluate_detections` matched in each task as ``matches.npz``."""
    params = next(iter(evaluations.values())).params
    write_matches(
        path,
        {task: evaluation.eval["matches"] for task, evaluation in evaluations.items()},
        image_ids=np.array(params.imgIds),
        category_ids=np.array(params.catIds),
        iou_thrs=np.array(params.iouThrs),
        area_rng=np.array(params.areaRng),
    )


def metrics_of(
    matches: Matches, iou_thrs: np.ndarray, task: str, class_names: Sequence[str]
) -> dict[str, float]:
    """What :class:`COCOEvaluator` gives for detections that matched so, in percent; NaN where undefined.

    Args:
        iou_thrs: the thresholds that ``matches`` holds.
        task: "bbox", "segm" or "keypoints".
        class_names: in the order of the categories.
    """
    precision, _ = curves_of(matches, len(class_names), REC_THRS)
    areas = ("m", "l") if task == "keypoints" else ("s", "m", "l")
    metrics = {"AP": mean_precision(precision[..., 0])}
    for percent in (50, 75):
        metrics[f"AP{percent}"] = mean_precision(precision[np.isclose(iou_thrs, percent / 100), ..., 0])
    for number, size in enumerate(areas, start=1):
        metrics[f"AP{size}"] = mean_precision(precision[..., number])
    if len(class_names) > 1:
        metrics |= {f"AP-{name}": mean_precision(precision[:, :, k, 0]) for k, name in enumerate(class_names)}
    return metrics


def restore_category_ids(results: list[dict], originals: dict[int, int]) -> None:
    """Replace the model's class indices by the annotation file's category ids, in place.

    Raises:
        InputError: for a class that is not in the dataset.
    """
    for result in results:
        if result["category_id"] not in originals:
            raise InputError(
                f"the model predicts class {result['category_id']}, but the dataset has {len(originals)} "
                "classes; give the model's NUM_CLASSES key that number"
            )
        result["category_id"] = originals[result["category_id"]]


def write_detections(results: list[dict], path: str) -> None:
    """Detections in COCO's results format, as JSON."""
    with replaced_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(results))  # several times as fast as json.dump()


def _annotations(coco: COCO, params) -> Annotations:
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=params.imgIds, catIds=set(params.catIds)))
    shapes = [_annotated_shape(coco, annotation, params) for annotation in annotations]
    crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], bool)
    ignored = crowd
    if params.iouType == "keypoints":
        ignored = crowd | np.array([annotation["num_keypoints"] == 0 for annotation in annotations], bool)
    return Annotations(
        *_places(annotations, params),
        _shapes(shapes, params),
        np.array([annotation["area"] for annotation in annotations], float),
        ignored,
        crowd,
    )


def _annotated_shape(coco: COCO, annotation: dict[str, Any], params) -> Any:
    if params.iouType == "bbox":
        return annotation["bbox"]
    if params.iouType == "segm":
        image = coco.imgs[annotation["image_id"]]
        _check_mask(annotation, image)
        try:
            annotation["segmentation"] = coco.annToRLE(annotation)
        except Exception as error:  # pycocotools raises bare Exceptions, too
            reason = one_line(error)
            raise InputError(f"annotation {annotation['id']} has no usable segmentation: {reason}") from None
        return annotation["segmentation"]
    _check_keypoints(annotation, len(params.kpt_oks_sigmas))
    return [*annotation["keypoints"], *annotation["bbox"], annotation["area"]]


def _check_mask(annotation: dict[str, Any], image: dict[str, Any]) -> None:
    if problem := shape_problem(annotation.get("segmentation"), image["height"], image["width"]):
        raise InputError(f"annotation {annotation['id']} has no usable segmentation: {problem}")


def _check_keypoints(annotation: dict[str, Any], count: int) -> None:
    found = len(annotation.get("keypoints", ())) / 3
    if found != count or "num_keypoints" not in annotation:
        raise InputError(
            f"annotation {annotation['id']} needs {count} keypoints (x, y, visibility), one for each OKS "
            f"sigma (TEST.KEYPOINT_OKS_SIGMAS), and 'num_keypoints'; it has {found:g} keypoints"
        )


def _detections(coco: COCO, results: list[dict[str, Any]], params) -> Detections:
    field = SHAPES[params.iouType]
    try:
        shapes = [result[field] for result in results]
    except KeyError:
        raise InputError(f"a detection has no '{field}', which {params.iouType} AP needs") from None
    unknown = {result["image_id"] for result in results} - coco.imgs.keys()
    if unknown:
        raise InputError(
            f"{len(unknown)} images with detections are not in the annotations, such as "
            f"{next(iter(unknown))}; evaluate on the dataset that the detections were made on"
        )
    if params.iouType == "keypoints" and {len(shape) for shape in shapes} - {3 * len(params.kpt_oks_sigmas)}:
        raise InputError(
            f"detections need {len(params.kpt_oks_sigmas)} keypoints (x, y, score), one for each OKS sigma "
            "(TEST.KEYPOINT_OKS_SIGMAS)"
        )
    return Detections(
        *_places(results, params),
        _shapes(shapes, params),
        _areas(results, shapes, params.iouType),
        np.zeros(len(results), bool),
        np.array([result["score"] for result in results], float),
    )


def _areas(results: list[dict[str, Any]], shapes: list, task: str) -> np.ndarray:
    """In pixels, as pycocotools' loadRes() computes them."""
    if task == "segm":
        return mask_areas(shapes)
    if task == "keypoints" and results and not results[0].get("bbox"):
        points = np.array(shapes, float).reshape(len(shapes), -1, 3)[..., :2]
        return np.ptp(points, axis=1).prod(axis=1)
    return np.array([result["bbox"] for result in results], float).reshape(-1, 4)[:, 2:].prod(axis=1)


def _places(dicts: list[dict[str, Any]], params) -> tuple[np.ndarray, np.ndarray]:
    """Indices of images and of categories, -1 for others than are evaluated."""
    images = {img_id: number for number, img_id in enumerate(params.imgIds)}
    categories = {cat_id: number for number, cat_id in enumerate(params.catIds)}
    return (
        np.array([images.get(one["image_id"], -1) for one in dicts], int),
        np.array([categories.get(one["category_id"], -1) for one in dicts], int),
    )


def _shapes(shapes: list, params) -> np.ndarray:
    return column(shapes) if params.iouType == "segm" else np.array(shapes, float)


def check_shapes(dataset: dict[str, Any], path: str, masks: bool, keypoints: int = 0) -> None:
    """Check that every annotation has the shapes that mask and keypoint AP compare.

    Args:
        dataset: the content of a COCO or LVIS file.
        path: the file's name in messages.
        masks: whether there will be mask AP.
        keypoints: how many keypoints an object has; 0 if there will be no keypoint AP.

    Raises:
        InputError: naming the annotation.
    """
    images = {image["id"]: image for image in dataset["images"]}
    try:
        for annotation in dataset["annotations"]:
            image = images.get(annotation["image_id"])
            if image is not None and masks:
                _check_mask(annotation, image)
            if image is not None and keypoints:
                _check_keypoints(annotation, keypoints)
    except InputError as error:
        key = "MODEL.MASK_ON" if "segmentation" in str(error) else "MODEL.KEYPOINT_ON"
        raise InputError(f"{path}: {error}; without it, set {key} False") from None


def _renumber_zero(coco: COCO) -> None:
    if 0 in coco.anns:
        annotation = coco.anns.pop(0)
        annotation["id"] = max(coco.anns, default=0) + 1
        coco.anns[annotation["id"]] = annotation


def _is_int64(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def check_annotations(dataset: dict[str, Any], path: str) -> None:
    """Check that every annotation can be evaluated, and set "iscrowd" to 0 where it is missing.

    Args:
        dataset: the content of a COCO or LVIS file.
        path: the file's name in messages.

    Raises:
        InputError: for missing images or categories, an id that is neither a whole number nor text, or an
            annotation without a box or an area, or with another "iscrowd" than 0 or 1.
    """
    for key in ("images", "categories"):
        if not dataset.get(key):
            raise InputError(f"{path}: '{key}' is missing or empty; datasets/README.md names the format")
    for image in dataset["images"]:
        if not (isinstance(image["id"], str) or _is_int64(image["id"])):
            raise InputError(f"{path}: {image['id']!r} is no id of an image: use whole numbers or text")
    for annotation in dataset["annotations"]:
        if annotation.setdefault("iscrowd", 0) not in (0, 1):
            raise InputError(f"{path}: annotation {annotation['id']}: 'iscrowd' is 0 or 1")
        if not (
            are_numbers(annotation.get("bbox"), 4)
            and are_numbers([annotation.get("area")])
            and min(*annotation["bbox"][2:], annotation["area"]) >= 0
        ):
            raise InputError(
                f"{path}: annotation {annotation['id']} needs a 'bbox' (x, y, width, height) and an 'area' "
                "in pixels, none of them negative; AP is undefined without them"
            )
