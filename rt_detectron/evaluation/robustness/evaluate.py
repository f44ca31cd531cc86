"""Run all evaluations that a config asks for, write robustness.json and print its table."""

import logging
import os
import tempfile

from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from rt_detectron.evaluation.results import provenance
from rt_detectron.evaluation.robustness.evaluation import EVALUATIONS, Row, robustness_evaluations, unique
from rt_detectron.evaluation.robustness.measurement import digest, main_metric
from rt_detectron.evaluation.robustness.session import Session, robustness_config
from rt_detectron.utils.files import read_json, write_json
from rt_detectron.utils.numbers import is_number

logger = logging.getLogger(__name__)
_TASKS = {
    "bbox": "box AP",
    "segm": "mask AP",
    "keypoints": "keypoint AP",
    "sem_seg": "mIoU",
    "panoptic_seg": "PQ",
}


def evaluate_robustness(cfg: CfgNode, model: nn.Module, surrogate: nn.Module | None = None) -> dict:
    """Run the evaluations that ``cfg`` asks for and write ``OUTPUT_DIR/robustness.json``.

    Each number is measured once. What an earlier run in this folder has finished, of a detector with the same
    weights, on the same images and under the same settings, is taken over, and an interrupted measurement
    goes on with the next image. The file is written once everything is measured. What is asked for has
    ``"requested": true`` there; what else is known of this detector stays in it, with false. A file of
    another detector or test set is moved to ``OUTPUT_DIR/robustness`` before.

    For intervals over the test images every result names its ``matches.npz``, relative to OUTPUT_DIR:
    "matches" is that of "metrics", "clean_matches" that of "clean", and "noise_matches" that of "noise". See
    :class:`rt_detectron.evaluation.matching.Matches` for what is in it, and
    :mod:`rt_detectron.evaluation.robustness.measurement` for the other files.

    Args:
        cfg: read with :func:`rt_detectron.detection.load_detector_config`.
        model: the detector with its weights, on its device.
        surrogate: another detector, to check whether attacks on it do more harm than those on ``model``.

    Returns:
        In the first process the content of the file, in the others {}.

    Raises:
        InputError: see :func:`robustness_evaluations`, and for a detector or an image that cannot be
            evaluated.
    """
    evaluations = robustness_evaluations(cfg)
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(cfg, model, scratch, surrogate)
        for evaluation in evaluations:
            evaluation.check(session)
        results = {evaluation.name: evaluation.measure(session) for evaluation in evaluations}
    if not comm.is_main_process():
        return {}
    path = os.path.join(cfg.OUTPUT_DIR, "robustness.json")
    earlier = _earlier(path, session)
    content = {
        **{
            evaluation.name: evaluation.merged(earlier[evaluation.name], results[evaluation.name])
            if evaluation.name in earlier
            else results[evaluation.name]
            for evaluation in evaluations
        },
        "pictures": session.pictures,
        "identity": session.identity,
        **provenance(robustness_config(cfg), session.seconds),
    }
    write_json(path, content)
    return content


def _earlier(path: str, session: Session) -> dict:
    """The content of the robustness.json that is there; that of another detector is moved away."""
    content = read_json(path)
    if content is None:
        return {}
    if content.get("identity") == session.identity:
        return content
    kept = os.path.join(session.folder, f"robustness-{digest(content)}.json")
    logger.warning("%s is of another detector or test set: moved to %s", path, kept)
    os.replace(path, kept)
    return {}


def robustness_table(content: dict) -> str:
    """The AP values in the content of robustness.json, as lines of text, with the checks below them.

    "passes" is what an attack on an image costs: forward and backward passes of the detector.
    """
    rows = [
        row for name, evaluation in EVALUATIONS.items() if name in content
        for row in evaluation.rows(content[name])
    ]  # fmt: skip
    tasks = unique(task for row in rows for task in row.metrics)
    # Attacks with several losses share their clean AP and their noise: show these once.
    lines = unique(_line(row, tasks) for row in rows)
    headers = ["", "images", *(_TASKS.get(task, task) for task in tasks), "passes"]
    table = tabulate(lines, headers, disable_numparse=True)
    remarks = [
        line for name, evaluation in EVALUATIONS.items() if name in content
        for line in evaluation.remarks(content[name])
    ]  # fmt: skip
    return "\n".join([table, *remarks])


def keys_help() -> str:
    """One line for each config key of all evaluations, with an example value."""
    keys = {key: text for evaluation in EVALUATIONS.values() for key, text in evaluation.keys.items()}
    return "\n".join(f"  {key:42} {text}" for key, text in keys.items())


def _line(row: Row, tasks: tuple[str, ...]) -> tuple:
    values = [row.metrics.get(task, {}).get(main_metric(task)) for task in tasks]
    passes = f"{row.passes['forward']} + {row.passes['backward']}" if row.passes else ""
    shown = (f"{value:.2f}" if is_number(value) else "-" for value in values)
    return (row.label, row.images, *shown, passes)
