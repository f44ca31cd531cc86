import io
import json

from PIL import Image

from rt_detectron.study.evaluations import compared
from rt_detectron.study.examples import best_and_worst, evaluation_pictures


def test_the_images_with_the_largest_change_are_shown(tmp_path, build_study):
    study, outcomes = build_study(
        tmp_path, detectors=("mask_rcnn",), arms=("standard", "robust"), seeds=(1,), rates=(0.02,)
    )
    truth = json.loads((outcomes[0].folder / "predictions.json").read_text())
    for outcome, empty in zip(outcomes, (4, 2), strict=True):  # the baseline finds nothing in 4, the arm in 2
        found = [{**d, "score": 0.9} for d in truth if d["image_id"] != empty]
        (outcome.folder / "predictions.json").write_text(json.dumps(found))
    figures, notes = best_and_worst(compared(study, outcomes))
    assert [figure.name for figure in figures] == [
        f"{name}-{view}"
        for name in ("gains-mask_rcnn-robust-4", "loses-mask_rcnn-robust-2")
        for view in ("truth", "baseline", "arm")
    ]
    assert [figure.alt for figure in figures[:2]] == ["ground truth: 3", "standard: F1 0 %, 0 found"]
    assert figures[2].alt.startswith("robust: F1 ")
    assert notes == []
    picture = Image.open(io.BytesIO(figures[0].content))
    assert picture.width == 480


def test_equal_arms_have_no_pictures(tmp_path, build_study):
    study, outcomes = build_study(
        tmp_path, detectors=("d",), arms=("standard", "robust"), seeds=(1,), rates=(1,)
    )
    for outcome in outcomes:
        (outcome.folder / "predictions.json").write_text("[]")
    assert best_and_worst(compared(study, outcomes)) == (
        [],
        ["robust, d: F1 differs on no image, so no pictures."],
    )


def test_attacked_pictures_are_those_of_the_first_seed(tmp_path, build_study):
    _, outcomes = build_study(tmp_path, detectors=("d",), arms=("standard", "robust"), rates=(1,))
    (outcomes[1].folder / "robustness" / "attack.png").write_text("no picture")
    figures, notes = evaluation_pictures(outcomes)
    assert [figure.caption for figure in figures] == ["d, standard: image 1 before and after the attack"]
    assert len(notes) == 1
    assert notes[0].startswith("robust/d/lr1.0/seed1: a picture cannot be read (UnidentifiedImageError")
