"""One measurement, a detector's AP on some images, kept in a folder of its own.

The folder is ``OUTPUT_DIR/robustness/measured/NAME-KEY``; KEY stands for all that defines the number. In it:

- ``result.json``: "identity", what KEY stands for; "metrics"; "seconds". It is there once the measurement is
  finished, and is never deleted or measured again.
- ``matches.npz``: which detections hit which objects, for intervals over the test images; see
  :class:`rt_detectron.evaluation.matching.Matches`. Evaluators that match nothing, such as Pascal VOC's, give
  none.
- ``counts.json``: of semantic and panoptic segmentation, task -> the counts of each image, which mIoU and PQ
  are computed from; see :class:`rt_detectron.evaluation.counts.CountingEvaluator`.
- ``images-RANK.jsonl``: until it is finished, the predictions of each image, so that an interrupted
  measurement goes on with the next image.
- ``pictures.json`` and ``imageID.jpg``: pictures, if the config asks for some.
"""

import glob
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, LVISEvaluator
from detectron2.utils import comm
from torch import distributed

from rt_detectron.evaluation.build import parts_of
from rt_detectron.evaluation.counts import CountingEvaluator, image_id
from rt_detectron.utils.files import json_lines, read_json, text_sha256, write_json
from rt_detectron.utils.numbers import finite

_PATIENCE = timedelta(days=7)  # how long a process waits for another one
# {"bbox": {"AP": 38.6, ...}, "segm": {...}}, in percent; NaN or None where undefined
Metrics = dict[str, dict[str, Any]]


def main_metric(task: str) -> str:
    """The metric of a task that tables show."""
    return {"sem_seg": "mIoU", "panoptic_seg": "PQ"}.get(task, "AP")


@dataclass(frozen=True)
class Measured:
    """A finished measurement.

    Attributes:
        metrics: task -> metric -> percent, None where undefined.
        matches: the path of its ``matches.npz``, relative to OUTPUT_DIR; None without one.
        objective: of an attack what it raised, see :func:`summary`; None without one.
        seconds: how long it took, over all runs.
        counts: the path of its ``counts.json``, relative to OUTPUT_DIR; None without one.
    """

    metrics: Metrics
    matches: str | None
    seconds: float
    objective: dict[str, Any] | None = None
    counts: str | None = None


def summary(pairs: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """Means of an attack's objective before and after it, and of how many images it did not rise.

    Images whose objective is 0 before and after have nothing to attack, and are left out.
    """
    counted = [pair for pair in pairs if any(pair)]
    if not counted:
        return None
    before, after = (sum(values) / len(counted) for values in zip(*counted, strict=True))
    not_risen = sum(not last > first for first, last in counted)
    return finite({"before": before, "after": after, "images": len(counted), "not_risen": not_risen})


def digest(value: Any) -> str:
    """A short name for a JSON value."""
    return text_sha256(json.dumps(value, sort_keys=True))[:12]


def wait_for_all() -> None:
    """Wait until all processes are here; if one has ended, it is an error at once.

    Attacks take their time, and the timeout of Detectron2's own synchronize() is half an hour.
    """
    if comm.get_world_size() > 1:
        distributed.monitored_barrier(comm._get_global_gloo_group(), timeout=_PATIENCE)


def from_main(value: Any) -> Any:
    """In all processes what the first one gives."""
    wait_for_all()
    return comm.all_gather(value)[0]


def read_result(folder: str) -> dict[str, Any] | None:
    """The content of a finished measurement's ``result.json``; in all processes what the first one finds."""
    is_main = comm.is_main_process()
    return from_main(read_json(os.path.join(folder, "result.json")) if is_main else None)


def write_result(folder: str, result: dict[str, Any]) -> None:
    """Write ``result.json``, after which the images' own files are not needed any more."""
    write_json(os.path.join(folder, "result.json"), result)
    for path in _image_files(folder):
        os.remove(path)


class ImageByImage(DatasetEvaluator):
    """An evaluator whose predictions are kept as they come, so that an interrupted evaluation can go on.

    That needs evaluators of COCO, LVIS or semantic segmentation; with others every evaluation begins with the
    first image.

    Attributes:
        done: the ids of the images that earlier runs have finished; the same in all processes.
        seconds: how long these runs and this one took.
    """

    def __init__(self, evaluator: DatasetEvaluator, folder: str):
        self.evaluator = evaluator
        self.folder = folder
        self._parts = parts_of(evaluator)
        self.keeps = all(
            isinstance(part, COCOEvaluator | LVISEvaluator | CountingEvaluator) for part in self._parts
        )
        self._found: dict[Any, list[dict]] = {}  # by image, the prediction that each part keeps of it
        self._objectives: dict[Any, tuple[float, float]] = {}
        seconds = [0.0]
        if self.keeps and comm.is_main_process():
            os.makedirs(folder, exist_ok=True)
            files = [_read_lines(path) for path in _image_files(folder)]
            self._found = {line["image_id"]: line["predictions"] for lines in files for line in lines}
            noted = (line for lines in files for line in lines if line.get("objective"))
            self._objectives = {line["image_id"]: line["objective"] for line in noted}
            seconds += [sum(line["seconds"] for line in lines) for lines in files]
        self.done, self.seconds = from_main((set(self._found), max(seconds)))
        self._last = time.perf_counter()

    def note(self, inputs: Sequence[dict]) -> None:
        """Keep the "objective" of an attack, before and after it, of the images that have one."""
        attacked = [each for each in inputs if "objective" in each]
        self._objectives.update({image_id(each): each["objective"] for each in attacked})

    def objectives(self) -> list[tuple[float, float]]:
        """In the first process those of all images, else []."""
        wait_for_all()
        return [pair for part in comm.gather(self._objectives) for pair in part.values()]

    def reset(self) -> None:
        self.evaluator.reset()
        for number, part in enumerate(self._parts if self.keeps else ()):
            part._predictions.extend(predictions[number] for predictions in self._found.values())

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        self.evaluator.process(inputs, outputs)
        seconds = self._elapsed()
        if not self.keeps or any("proposals" in output for output in outputs):  # which JSON does not know
            return
        lines = [
            {
                "image_id": predictions[0]["image_id"],
                "seconds": seconds / len(inputs),
                "objective": self._objectives.get(predictions[0]["image_id"]),
                "predictions": predictions,
            }
            for predictions in zip(*(part._predictions[-len(inputs) :] for part in self._parts), strict=True)
        ]
        with open(os.path.join(self.folder, f"images-{comm.get_rank()}.jsonl"), "a") as file:
            # Begins with the end of the line before, which may have been cut off.
            file.write("".join(f"\n{json.dumps(line)}" for line in lines))

    def evaluate(self, **options) -> Metrics | None:
        wait_for_all()
        metrics = self.evaluator.evaluate(**options)
        self._elapsed()
        return metrics

    def _elapsed(self) -> float:
        """Seconds since the last call."""
        last, self._last = self._last, time.perf_counter()
        self.seconds += self._last - last
        return self._last - last


def _image_files(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), "images-*.jsonl")))


def _read_lines(path: str) -> list[dict[str, Any]]:
    return [line for line in json_lines(path) if "predictions" in line]  # which an older version's lack
