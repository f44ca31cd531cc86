import math
import time
from datetime import timedelta

import pytest
from detectron2.engine import launch
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

from rt_detectron.evaluation.robustness.measurement import ImageByImage, from_main, read_result, summary
from rt_detectron.utils.errors import InputError


def test_an_objective_in_four_numbers():
    pairs = [(1.0, 3.0), (2.0, 2.0), (0.0, 0.0), (3.0, 1.0)]  # the third has nothing to attack
    assert summary(pairs) == {"before": 2.0, "after": 2.0, "images": 3, "not_risen": 2}
    assert summary([(0.0, 0.0)]) is summary([]) is None
    assert summary([(1.0, math.nan)]) == {"before": 1.0, "after": None, "images": 1, "not_risen": 1}


def test_damaged_files_of_an_interrupted_measurement_do_not_count(tmp_path, tiny_cfg):
    (tmp_path / "result.json").write_text('{"metrics"')
    assert read_result(str(tmp_path)) is None
    line = '{"image_id": 3, "seconds": 1, "predictions": [{}]}'
    (tmp_path / "images-0.jsonl").write_bytes(
        f"\n{line}\n3\n[]\n".encode() + b'\xff\xfe\n{"image_id": 4, "pr'
    )
    evaluator = COCOEvaluator(tiny_cfg(tmp_path).DATASETS.TEST[0], output_dir=None)
    assert ImageByImage(evaluator, str(tmp_path)).done == {3}


def slow_then_broken():
    if comm.get_rank() == 1:
        time.sleep(6)  # longer than the timeout of the process group
    assert from_main(comm.get_rank()) == 0
    if comm.get_rank() == 1:
        raise InputError("image 7 is broken")
    from_main(None)  # waits for the other one, which never comes


def test_processes_wait_for_a_slow_one_and_end_with_a_broken_one(rendezvous):
    start = time.perf_counter()
    with pytest.raises(Exception, match="InputError: image 7 is broken"):
        launch(slow_then_broken, 2, dist_url=rendezvous(), timeout=timedelta(seconds=3))
    assert time.perf_counter() - start < 120
