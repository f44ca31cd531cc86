"""The demo set's registration, and every mistake in a data set as one line with the way out."""

import json
import os
import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from rt_detectron.data import check_datasets, classes_of, load_test_set, load_training_set, set_num_classes
from rt_detectron.data.datasets import _register_demo
from rt_detectron.utils.errors import InputError

NAME = "rt_test_datasets"
BOX = [10.0, 20.0, 30.0, 40.0]


def annotation(number=1, **changes):
    common = {"id": number, "image_id": number, "category_id": 7, "iscrowd": 0, "area": 1200.0}
    kept = {**common, "bbox": BOX, "segmentation": [[10, 20, 40, 20, 40, 60]], **changes}
    return {key: value for key, value in kept.items() if value is not None}


@pytest.fixture
def register(tmp_path):
    """Registers a set of two classes and two images."""
    for i in (1, 2):
        Image.new("RGB", (100, 80)).save(tmp_path / f"{i}.jpg")

    def register(annotations, name=NAME, **changes):
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in (1, 2)],
            "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
            "annotations": annotations,
            **changes,
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        register_coco_instances(name, {}, str(path), str(tmp_path))
        return path

    yield register
    for name in [name for name in DatasetCatalog.list() if name.startswith(NAME)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def cfg(make_cfg):
    """Of a detector with two classes, to be trained on the registered set."""
    cfg = make_cfg("resnet18")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 2
    cfg.DATASETS.TRAIN = (NAME,)
    return cfg


def message(function, *arguments) -> str:
    with pytest.raises(InputError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_demo_set_is_registered():
    root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "demo", "detection")
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"rt_demo_{split}")
        assert metadata.json_file == f"{root}/annotations/instances_{split}.json"
        assert metadata.image_root == f"{root}/{split}"
        assert metadata.evaluator_type == "coco"


def test_the_demo_set_follows_the_given_root(tmp_path, monkeypatch):
    registered = {}
    monkeypatch.setattr(
        "rt_detectron.data.datasets.register_coco_instances",
        lambda name, metadata, json_file, image_root: registered.update({name: (json_file, image_root)}),
    )
    _register_demo(str(tmp_path))
    folder = tmp_path / "demo" / "detection"
    assert registered["rt_demo_val"] == (
        f"{folder}/annotations/instances_val.json",
        f"{folder}/val",
    )


class TestCheckDatasets:
    def test_an_unknown_name_gets_near_ones(self):
        text = message(check_datasets, ["rt_demo_trian"])
        assert text.startswith("dataset 'rt_demo_trian' is not registered; did you mean rt_demo_train")
        text = message(check_datasets, ["zzz"])
        assert "did you mean" not in text
        assert "register it" in text

    def test_missing_files_are_named(self, register, tmp_path):
        path = register([annotation()])
        check_datasets([NAME])
        path.unlink()
        text = message(check_datasets, [NAME])
        assert f"needs {path}, which does not exist" in text
        assert "DETECTRON2_DATASETS" in text
        assert "datasets/README.md" in text
        register_coco_instances(
            f"{NAME}_images", {}, str(register([], f"{NAME}_2")), str(tmp_path / "nowhere")
        )
        assert f"{tmp_path / 'nowhere'}, which" in message(check_datasets, [f"{NAME}_images"])

    def test_every_name_is_checked(self, register):
        register([annotation()])
        assert "'zzz'" in message(check_datasets, [NAME, "zzz"])


class TestLoadTrainingSet:
    def test_the_dicts_are_detectron2s(self, register, cfg):
        register(
            [annotation(1), annotation(2, category_id=9, iscrowd=1), annotation(3, image_id=1, category_id=9)]
        )
        dicts = load_training_set(cfg)
        # the image with a crowd alone is filtered out; category ids are mapped to 0, 1
        assert [image["image_id"] for image in dicts] == [1]
        assert [(a["category_id"], a["bbox"]) for a in dicts[0]["annotations"]] == [(0, BOX), (1, BOX)]
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
        assert [image["image_id"] for image in load_training_set(cfg)] == [1, 2]

    @pytest.mark.parametrize(
        "bbox", [None, [1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0], [1, 2, "x", 4], [1, 2, float("nan"), 4]]
    )
    def test_an_annotation_without_a_box(self, register, cfg, bbox):
        register([annotation(1), annotation(2, bbox=bbox)])
        text = message(load_training_set, cfg)
        assert re.search(r"2\.jpg: annotation 0 has no box; .*'bbox' of four numbers", text)

    @pytest.mark.parametrize(
        ("annotations", "changes", "words"),
        [
            ([annotation(bbox=[])], {}, "empty 'bbox'"),
            ([annotation(bbox=7)], {}, "int"),
            ([annotation(category_id=8)], {}, "category_id=8"),
            ([annotation(), annotation()], {}, "not unique"),
            ([], {}, "No valid data"),
            (None, {}, "No valid data"),
            ([annotation()], {"categories": []}, ""),
            ([annotation()], {"categories": None}, ""),
            ([annotation()], {"images": [{"id": 1, "file_name": "1.jpg"}]}, "height"),
            ([{"id": 1, "bbox": BOX}], {}, "image_id"),
        ],
    )
    def test_unusable_annotations_name_the_file(self, register, cfg, annotations, changes, words):
        path = register(annotations, **changes)
        text = message(load_training_set, cfg)
        assert text.startswith(f"{path}: not usable annotations (")
        assert words in text

    @pytest.mark.parametrize("images", [[], [{"id": 2, "file_name": "2.jpg", "width": 100, "height": 80}]])
    def test_annotations_of_images_that_are_not_listed(self, register, cfg, images):
        """Detectron2 warns of them, and trains on the rest."""
        path = register([annotation(1), annotation(2)], images=images)
        text = message(load_training_set, cfg)
        assert text.startswith(
            f"{path}: contains 2 annotations, but only {len(images)} of them match to images"
        )
        assert text.endswith("list the images of the others, or drop these annotations")
        register([annotation(1), annotation(2)], f"{NAME}_whole")  # and nothing stays behind
        cfg.DATASETS.TRAIN = (f"{NAME}_whole",)
        assert len(load_training_set(cfg)) == 2

    @pytest.mark.parametrize("kind", ["images", "categories"])
    def test_two_with_one_id(self, register, cfg, kind):
        """Detectron2 keeps the last one only, with the objects of both."""
        path = register([annotation(1)])
        content = json.loads(path.read_text())
        content[kind][1]["id"] = content[kind][0]["id"]
        path.write_text(json.dumps(content))
        number, names = {"images": (1, "'1.jpg' and '2.jpg'"), "categories": (7, "'cat' and 'dog'")}[kind]
        expected = f"{path}: two {kind} have the id {number}, {names}: give each one an id of its own"
        assert message(load_training_set, cfg) == expected
        cfg.DATASETS.TEST = (NAME,)
        assert message(load_test_set, cfg, NAME) == expected

    def test_an_image_that_is_listed_twice_does_no_harm(self, register, cfg):
        path = register([annotation(1), annotation(2)])
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "images": [*content["images"], content["images"][0]]}))
        assert [image["image_id"] for image in load_training_set(cfg)] == [1, 2]

    @pytest.mark.parametrize("content", ['{"images": [', "", "[1, 2]", "\xff"])
    def test_broken_json_names_the_file(self, register, cfg, content):
        path = register([])
        path.write_text(content, encoding="latin-1")
        assert message(load_training_set, cfg).startswith(f"{path}: not usable annotations (")

    @pytest.mark.parametrize(("detector", "key"), [("fpn", "ROI_HEADS"), ("retinanet", "RETINANET")])
    def test_the_class_count_must_be_the_sets(self, register, make_cfg, detector, key):
        register([annotation()])
        cfg = make_cfg("resnet18", detector)
        cfg.DATASETS.TRAIN = (NAME,)
        cfg.MODEL[key].NUM_CLASSES = 80
        text = message(load_training_set, cfg)
        assert text == (
            f"MODEL.{key}.NUM_CLASSES is 80, but {NAME} has 2 classes; set MODEL.{key}.NUM_CLASSES 2"
        )
        cfg.MODEL[key].NUM_CLASSES = 2
        assert len(load_training_set(cfg)) == 1


def test_classes_of_one_name_are_told(register, cfg, caplog):
    """As those that Roboflow exports: the first is the supercategory."""
    register([annotation()], categories=[{"id": 7, "name": "cat"}, {"id": 9, "name": "cat"}])
    load_training_set(cfg)
    assert f"{NAME} has several classes cat: AP by class is the last one's" in caplog.text


class TestLoadTestSet:
    """Most mistakes are shown with the evaluators, in tests/evaluation/test_build.py."""

    @pytest.fixture
    def trained_elsewhere(self, register, cfg):
        """``trained_elsewhere(classes)``: a config whose training set has them; the test set's are others."""

        def make(*classes):
            register([annotation()])
            categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
            register([], f"{NAME}_train", categories=categories)
            cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{NAME}_train",), (NAME,)
            return cfg

        return make

    def test_all_images_count(self, trained_elsewhere):
        assert [record["image_id"] for record in load_test_set(trained_elsewhere("cat", "dog"), NAME)] == [
            1,
            2,
        ]

    def test_classes_are_compared_with_a_training_set_that_was_not_loaded(self, trained_elsewhere):
        text = message(load_test_set, trained_elsewhere("dog", "cat"), NAME)
        assert "in another order: class 0 is 'cat', not 'dog'" in text

    def test_a_training_set_of_another_detector_does_not_count(self, trained_elsewhere):
        """As in a config whose DATASETS.TRAIN nobody set for an evaluation."""
        assert load_test_set(trained_elsewhere("dog", "cat", "ox"), NAME)

    def test_objects_are_checked_for_attacks(self, trained_elsewhere):
        cfg = trained_elsewhere("cat", "dog")
        path = MetadataCatalog.get(NAME).json_file
        with open(path) as file:
            content = json.load(file)
        del content["annotations"][0]["segmentation"]
        with open(path, "w") as file:
            json.dump(content, file)
        load_test_set(cfg, NAME)
        assert "has no usable mask" in message(lambda: load_test_set(cfg, NAME, with_objects=True))


class TestNumClasses:
    def test_0_is_as_many_as_the_training_set_has(self, register, cfg):
        register([annotation()])
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = 0
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 7
        set_num_classes(cfg)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2
        assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 7
        assert classes_of(NAME) == ["cat", "dog"]

    def test_classes_that_detectron2_knows_need_no_file(self, cfg):
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 0
        cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic_separated",)
        set_num_classes(cfg)
        assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES) == (80, 54)

    def test_without_a_training_set_the_number_is_needed(self, register, cfg):
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
        path = register([annotation()])
        path.unlink()
        text = message(set_num_classes, cfg)
        assert text.startswith(
            "MODEL.ROI_HEADS.NUM_CLASSES is 0, to have as many classes as the training set, but "
        )
        assert f"needs {path}" in text
        cfg.DATASETS.TRAIN = ()
        assert message(set_num_classes, cfg).endswith("give the number")

    def test_a_set_without_classes_of_stuff(self, register, cfg):
        register([annotation()])
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 0
        assert f"the training set {NAME} has no stuff_classes: give" in message(set_num_classes, cfg)
