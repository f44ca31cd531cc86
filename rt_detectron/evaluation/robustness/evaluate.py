"""Run all evaluations that a config asks for, write robustness.json and print its table."""

import os
import tempfile

from detectron2.config import CfgNode
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from rt_detectron.evaluation.results import provenance
from rt_detectron.evaluation.robustness.evaluation import EVALUATIONS, Row, robustness_evaluations, unique
from rt_detectron.evaluation.robustness.session import Session, robustness_config
from rt_detectron.utils.files import write_json
from rt_detectron.utils.numbers import is_number

_TASKS = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}


def evaluate_robustness(cfg: CfgNode, model: nn.Module, resume: bool = False) -> dict:
    """Run the evaluations that ``cfg`` asks for and write ``OUTPUT_DIR/robustness.json``.

    The clean predictions, pictures and the progress so far go to ``OUTPUT_DIR/robustness``.

    Args:
        cfg: read with :func:`rt_detectron.detection.load_detector_config`.
        model: the detector with its weights, on its device.
        resume: skip what an earlier, interrupted run with the same config and weights has measured.

    Returns:
        In the first process the content of the file, in the others {}.

    Raises:
        InputError: see :func:`robustness_evaluations`.
    """
    evaluations = robustness_evaluations(cfg)
    path = os.path.join(cfg.OUTPUT_DIR, "robustness.json")
    if comm.is_main_process() and os.path.isfile(path):
        os.remove(path)  # the file exists only once everything is measured
    with tempfile.TemporaryDirectory() as scratch:
        session = Session(cfg, model, scratch)
        if resume:
            session.progress.resume()
        results = {evaluation.name: evaluation.measure(session) for evaluation in evaluations}
    if not comm.is_main_process():
        return {}
    content = {
        **results,
        "pictures": session.pictures,
        **provenance(robustness_config(cfg), session.progress.wall_time_s),
    }
    write_json(path, content)
    return content


def robustness_table(content: dict) -> str:
    """The AP values in the content of robustness.json, as lines of text."""
    rows = [
        row for name, evaluation in EVALUATIONS.items() if name in content
        for row in evaluation.rows(content[name])
    ]  # fmt: skip
    tasks = unique(task for row in rows for task in row.metrics)
    # Attacks with several losses share their clean AP and their noise: show these once.
    lines = unique(_line(row, tasks) for row in rows)
    return tabulate(lines, ["", "images", *(_TASKS.get(task, task) for task in tasks)], disable_numparse=True)


def keys_help() -> str:
    """One line for each config key of all evaluations, with an example value."""
    keys = {key: text for evaluation in EVALUATIONS.values() for key, text in evaluation.keys.items()}
    return "\n".join(f"  {key:42} {text}" for key, text in keys.items())


def _line(row: Row, tasks: tuple[str, ...]) -> tuple:
    values = [row.metrics.get(task, {}).get("AP") for task in tasks]
    return (row.label, row.images, *(f"{value:.2f}" if is_number(value) else "-" for value in values))
