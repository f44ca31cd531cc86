"""mIoU, PQ and keypoint AP under attack and corruption, on models that know the tiny pictures by heart."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from rt_detectron.evaluation.panoptic import match_segments, read_ids
from rt_detectron.evaluation.robustness import evaluate_robustness, robustness_evaluations, robustness_table
from rt_detectron.evaluation.robustness.measurement import ImageByImage
from rt_detectron.evaluation.robustness.session import Session
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet, annotated_test_mapper
from rt_detectron.utils.errors import InputError

SEA = ("MCE_Bal", "MCE", "JS")


def configured(cfg, folder, *opts):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    cfg.TEST.ATTACK.update(LINF_EPS=(8,), STEPS=2, CHECK_IMAGES=0)
    cfg.merge_from_list(list(opts))
    return cfg


def predicted(cfg, model):
    """(labels, classes) of each picture's pixels, for those with a label."""
    mapper = annotated_test_mapper(cfg)
    for each in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
        with torch.no_grad():
            (output,) = model([mapper(each)])
        labels = np.asarray(Image.open(each["sem_seg_file_name"]))
        yield labels[labels != 255], output["sem_seg"].argmax(0).numpy()[labels != 255], output


def mean_iou(pairs, classes):
    """By hand: the mean over the classes in the labels."""
    labels, found = (np.concatenate(part) for part in zip(*pairs, strict=True))
    iou = [
        ((labels == k) & (found == k)).sum() / ((labels == k) | (found == k)).sum()
        for k in range(classes)
        if (labels == k).any()
    ]
    return 100 * np.mean(iou)


@pytest.fixture(scope="module")
def finished(segmentor, tmp_path_factory):
    opts = ["TEST.ATTACK.LOSSES", SEA, "TEST.PICTURES", 1]
    opts += ["TEST.CORRUPTION.NAMES", ("contrast",), "TEST.CORRUPTION.SEVERITIES", (1,)]
    cfg = configured(segmentor[0], tmp_path_factory.mktemp("finished"), *opts)
    return cfg, evaluate_robustness(cfg, segmentor[1])


def test_miou_under_attack_and_corruption(segmentor, finished):
    cfg, content = finished
    clean = content["clean"]["metrics"]["sem_seg"]["mIoU"]
    pairs = [pair[:2] for pair in predicted(*segmentor)]
    assert clean == pytest.approx(mean_iou(pairs, 11), abs=1e-6)
    *alone, worst = content["attack"]
    left = [each["metrics"]["sem_seg"]["mIoU"] for each in alone]
    assert worst["losses"] == list(SEA)
    assert worst["metrics"]["sem_seg"]["mIoU"] <= min(left) < max(left) < clean - 5
    assert worst["metrics"]["sem_seg"].keys() == content["clean"]["metrics"]["sem_seg"].keys()
    assert alone[0]["noise"]["sem_seg"]["mIoU"] > max(left)
    assert worst["passes"] == {"forward": 9, "backward": 6}
    assert len(alone[0]["pixel_counts"]) == 11
    assert {check["level"] for each in content["attack"] for check in each["checks"]} == {"ok"}
    corruption = content["corruption"]
    corrupted = corruption["results"][0]["metrics"]["sem_seg"]["mIoU"]
    assert corruption["mPC"]["sem_seg"] == corrupted < clean
    assert corruption["rPC"]["sem_seg"] == pytest.approx(100 * corrupted / clean)
    table = robustness_table(content)
    assert "mIoU" in table.splitlines()[0]
    assert f"{worst['metrics']['sem_seg']['mIoU']:.2f}" in table
    assert "mIoU" in table.splitlines()[-1]
    assert "under random noise" in table.splitlines()[-1]
    for picture in content["pictures"]:
        assert "classes" in picture["caption"]
        assert Path(cfg.OUTPUT_DIR, picture["file"]).is_file()


def test_the_counts_of_each_image_lie_beside_every_number(finished):
    cfg, content = finished
    ids = sorted(Path(each["file_name"]).name for each in DatasetCatalog.get("rt_test_semantic"))
    for entry in content["attack"]:
        assert entry["matches"] is None
        (task, found), *_ = json.loads(Path(cfg.OUTPUT_DIR, entry["counts"]).read_text()).items()
        assert (task, [each["image_id"] for each in found]) == ("sem_seg", ids)
        total = np.zeros(144, int)
        for each in found:
            total[each["confusion"]["cells"]] += each["confusion"]["pixels"]
        hits = total.reshape(12, 12)[:11, :11].diagonal()
        labelled, predicted = (total.reshape(12, 12)[:11, :11].sum(axis) for axis in (0, 1))
        iou = (hits / np.maximum(labelled + predicted - hits, 1))[labelled > 0]
        assert entry["metrics"]["sem_seg"]["mIoU"] == pytest.approx(100 * iou.mean())


def test_an_interrupted_evaluation_goes_on_with_the_next_image(segmentor, finished, tmp_path, monkeypatch):
    cfg, expected = finished
    cfg = configured(cfg, tmp_path, "TEST.PICTURES", 0, "TEST.CORRUPTION.NAMES", ())
    left, seen = [9], []
    original, evaluate = ImageByImage.process, DetectionTestSet.evaluate

    def process(self, inputs, outputs):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        original(self, inputs, outputs)

    def evaluated(self, model, label, **options):
        seen.append((label, len(options["kept"].done)))
        return evaluate(self, model, label, **options)

    monkeypatch.setattr(ImageByImage, "process", process)
    monkeypatch.setattr(DetectionTestSet, "evaluate", evaluated)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(cfg, segmentor[1])
    left[0] = -1
    content = evaluate_robustness(cfg, segmentor[1])
    assert seen[:3] == [("clean-6", 0), ("noise-linf-8", 0), ("noise-linf-8", 3)]
    assert content["clean"] == expected["clean"]
    assert content["attack"] == expected["attack"]
    seen.clear()
    assert evaluate_robustness(cfg, segmentor[1])["attack"] == content["attack"]
    assert seen == []


def test_some_images_only(segmentor, tmp_path):
    opts = ["TEST.ATTACK.LOSSES", ("JS",), "TEST.ATTACK.MAX_IMAGES", 2, "TEST.ATTACK.NOISE", False]
    cfg = configured(segmentor[0], tmp_path, *opts)
    (entry,) = evaluate_robustness(cfg, segmentor[1])["attack"]
    pairs = [pair[:2] for pair in predicted(*segmentor)]
    assert entry["clean"]["sem_seg"]["mIoU"] == pytest.approx(mean_iou(pairs[::3], 11), abs=1e-6)


def test_panoptic_quality(panoptic, tmp_path):
    cfg, model = panoptic
    cfg = configured(cfg, tmp_path, "TEST.ATTACK.LOSSES", ("all", "JS"), "TEST.ATTACK.NOISE", False)
    content = evaluate_robustness(cfg, model)
    metadata = MetadataCatalog.get("rt_test_panoptic_separated")
    truth = json.loads(Path(metadata.panoptic_json).read_text())
    by_image = {each["image_id"]: each for each in truth["annotations"]}
    total = {}
    for each, (*_, output) in zip(
        DatasetCatalog.get(cfg.DATASETS.TEST[0]), predicted(cfg, model), strict=True
    ):
        ids, segments = output["panoptic_seg"]
        numbers = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
        categories = {s["id"]: numbers[s["category_id"]] if s["isthing"] else 1000 for s in segments}
        known = by_image[each["image_id"]]
        labels = read_ids(str(Path(metadata.panoptic_root, known["file_name"])))
        for category, *counts in match_segments(labels, known["segments_info"], ids.numpy(), categories):
            total[category] = np.add(total.get(category, 0), counts)
    pq = [iou / (hits + (false + missed) / 2) for iou, hits, false, missed in total.values()]
    clean = content["clean"]["metrics"]
    assert clean["panoptic_seg"]["PQ"] == pytest.approx(100 * np.mean(pq))
    assert clean.keys() == {"bbox", "segm", "sem_seg", "panoptic_seg"}
    *alone, worst = content["attack"]
    for task, metric in (("bbox", "AP"), ("sem_seg", "mIoU"), ("panoptic_seg", "PQ")):
        left = min(each["metrics"][task][metric] for each in alone)
        assert worst["metrics"][task][metric] <= left < clean[task][metric]
    assert worst["matches"]
    assert worst["counts"]
    header = robustness_table(content).splitlines()[0]
    assert header.index("box AP") < header.index("mIoU") < header.index("PQ")


def test_keypoints(keypoints, tmp_path):
    cfg = configured(keypoints[0], tmp_path, "TEST.ATTACK.LOSSES", ("keypoint",))
    content = evaluate_robustness(cfg, keypoints[1])
    (entry,) = content["attack"]
    clean = content["clean"]["metrics"]["keypoints"]["AP"]
    assert clean > 40
    assert entry["metrics"]["keypoints"]["AP"] < min(clean, entry["noise"]["keypoints"]["AP"]) - 5
    assert [check["level"] for check in entry["checks"]] == ["ok", "ok"]
    assert "keypoint AP" in robustness_table(content)


def checked(cfg, model, scratch):
    session = Session(cfg, model, scratch) if robustness_evaluations(cfg) else None
    for evaluation in robustness_evaluations(cfg):
        evaluation.check(session)


def test_mistakes_are_one_line(learned, segmentor, keypoints, tmp_path):
    def message(cfg, model, *opts):
        cfg = configured(cfg, tmp_path, *opts)
        with pytest.raises(InputError) as error:
            checked(cfg, model, str(tmp_path))
        assert "\n" not in str(error.value)
        return str(error.value)

    losses = "TEST.ATTACK.LOSSES"
    assert "JS is for semantic segmentation, and this model has none" in message(*learned, losses, ("JS",))
    assert "LOSSES has 'keypoint', but MODEL.KEYPOINT_ON is False" in message(*learned, losses, ("keypoint",))
    assert "LOSSES has 'mask', but MODEL.MASK_ON is False" in message(*segmentor, losses, ("mask",))
    found = message(*segmentor, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 10)
    assert "MODEL.SEM_SEG_HEAD.NUM_CLASSES is 10, but rt_test_semantic has 11 classes" in found
    name = learned[0].DATASETS.TEST[0]
    assert "has no semantic segmentation" in message(*segmentor, "DATASETS.TEST", (name,))
