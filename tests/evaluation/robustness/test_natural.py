import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from rt_detectron.evaluation.robustness import evaluate_robustness, natural, robustness_table
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet
from rt_detectron.utils.errors import InputError

HALF = "rt_test_natural"


@pytest.fixture
def half(learned, tmp_path):
    """Three of the pictures, with boxes alone, as COCO-O's are."""
    known = MetadataCatalog.get(learned[0].DATASETS.TEST[0])
    content = json.loads(Path(known.json_file).read_text())
    content["images"] = content["images"][:3]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] in ids]
    for each in content["annotations"]:
        del each["segmentation"]
    path = tmp_path / "half.json"
    path.write_text(json.dumps(content))
    register_coco_instances(HALF, {}, str(path), known.image_root)
    yield
    DatasetCatalog.remove(HALF)
    MetadataCatalog.remove(HALF)


def test_box_ap_on_other_sets_and_their_mean(learned, half, tmp_path, monkeypatch, caplog):
    cfg, model = learned[0].clone(), learned[1]
    name = cfg.DATASETS.TEST[0]
    cfg.defrost()
    cfg.OUTPUT_DIR, cfg.TEST.NATURAL = str(tmp_path / "out"), (name, HALF)
    cfg.TEST.CORRUPTION.update(NAMES=("contrast",), SEVERITIES=(1,), MAX_IMAGES=1)
    content = evaluate_robustness(cfg, model)
    assert "Half of the images have a side of 96 pixels or less: corruptions are meant for 224" in caplog.text
    first, second = content["natural"]["results"]
    clean = content["clean"]["metrics"]["bbox"]
    assert first["metrics"] == {"bbox": clean}
    assert (second["images"], second["metrics"].keys()) == (3, {"bbox"})
    aps = [each["metrics"]["bbox"]["AP"] for each in (first, second)]
    assert aps[0] != aps[1]
    assert content["natural"]["mean"] == pytest.approx(sum(aps) / 2)
    assert content["natural"]["effective_robustness"] is None
    assert f"{sum(aps) / 2:.2f}" in robustness_table(content)
    predictions = json.loads(Path(content["datasets"][0]["predictions"]).read_text())
    assert len({each["image_id"] for each in predictions}) > 3  # still those of the clean test set
    # As if these were COCO and COCO-O; nothing is measured again.
    monkeypatch.setattr(natural, "SETS", (name, HALF))
    monkeypatch.setattr(natural, "COCO", name)
    monkeypatch.setattr(DetectionTestSet, "evaluate", None)
    cfg.TEST.NATURAL = ("coco_o",)
    found = evaluate_robustness(cfg, model)
    score = found["natural"]["effective_robustness"]
    assert score == pytest.approx(sum(aps) / 2 - 0.45 * clean["AP"])
    assert "effective robustness" in robustness_table(found)
    cfg.TEST.NATURAL = (HALF,)
    last = evaluate_robustness(cfg, model)["natural"]["results"]
    assert [(each["dataset"], each["requested"]) for each in last] == [(HALF, True), (name, False)]


def test_a_set_that_is_not_there_is_one_line(learned):
    cfg = learned[0].clone()
    cfg.defrost()
    cfg.TEST.NATURAL = ("coco_o_sketches",)
    with pytest.raises(InputError, match="'coco_o_sketches' is not registered; did you mean coco_o_sketch"):
        natural.NaturalEvaluation.from_config(cfg)
