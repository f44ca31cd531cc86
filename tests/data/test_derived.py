"""Derived datasets: what each modifier keeps, the cache follows its source, each mistake is one line."""

import json
import multiprocessing
import os
import random

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO

from rt_detectron.data import check_datasets
from rt_detectron.data.derived import register_derived
from rt_detectron.utils.errors import InputError

BASE = "rt_test_derived"
CATEGORIES = [{"id": 9, "name": "dog"}, {"id": 7, "name": "traffic light"}, {"id": 3, "name": "person"}]
IMAGES = 50


def content() -> dict:
    """Image i has a dog if i is even, a traffic light if 3 divides i, a crowd of people if 5 does."""
    annotations = []
    for image_id in range(1, IMAGES + 1):
        for divisor, category_id in ((2, 9), (3, 7), (5, 3)):
            if image_id % divisor == 0:
                box = [1.0, 2.0, 30.0, 40.0]
                common = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
                annotations.append({**common, "bbox": box, "area": 1200.0, "iscrowd": int(divisor == 5)})
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 80} for i in range(1, IMAGES + 1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The registered base's annotation file, beside an empty cache."""
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "base.json"
    path.write_text(json.dumps(content()))
    register_coco_instances(BASE, {"keypoint_names": ["nose"]}, str(path), str(tmp_path))
    yield path
    forget(BASE)


def forget(prefix):
    for name in [name for name in DatasetCatalog.list() if name.startswith(prefix)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def derive(modifiers) -> dict:
    """The content of the derived annotation file."""
    check_datasets([BASE + modifiers])
    with open(MetadataCatalog.get(BASE + modifiers).json_file) as file:
        return json.load(file)


def message(*names) -> str:
    with pytest.raises(InputError) as error:
        check_datasets(names)
    assert "\n" not in str(error.value)
    return str(error.value)


def image_ids(content):
    return [image["id"] for image in content["images"]]


class TestModifiers:
    @pytest.mark.parametrize(("modifier", "category_id"), [("traffic_light", 7), ("person", 3)])
    def test_a_category_keeps_its_objects_and_all_images(self, base, modifier, category_id):
        derived, whole = derive(f"@{modifier}"), content()
        assert derived["images"] == whole["images"]
        assert derived["categories"] == [c for c in CATEGORIES if c["id"] == category_id]
        coco = COCO(str(base))
        assert derived["annotations"] == coco.loadAnns(coco.getAnnIds(catIds=[category_id]))

    def test_any_merges_the_categories_and_keeps_crowds_crowds(self, base):
        derived, whole = derive("@any"), content()
        assert derived["categories"] == [{"id": 1, "name": "object"}]
        assert {annotation.pop("category_id") for annotation in derived["annotations"]} == {1}
        for annotation in whole["annotations"]:
            del annotation["category_id"]
        assert derived["annotations"] == whole["annotations"]

    def test_fit_and_held_out_part_the_images(self, base):
        fit, held_out = derive("@fit"), derive("@held_out")
        assert sorted(image_ids(fit) + image_ids(held_out)) == list(range(1, IMAGES + 1))
        assert len(held_out["images"]) == IMAGES // 5
        # no run of neighbours, which may be frames of one film
        assert image_ids(held_out) != list(range(min(image_ids(held_out)), max(image_ids(held_out)) + 1))
        for part in (fit, held_out):
            assert {a["image_id"] for a in part["annotations"]} <= set(image_ids(part))
            assert part["categories"] == CATEGORIES
        assert len(fit["annotations"]) + len(held_out["annotations"]) == len(content()["annotations"])

    def test_the_split_does_not_hang_on_order_or_process(self, base):
        before = set(image_ids(derive("@held_out")))
        shuffled = content()
        random.Random(0).shuffle(shuffled["images"])
        base.write_text(json.dumps(shuffled))
        forget(f"{BASE}@")
        assert set(image_ids(derive("@held_out"))) == before
        assert before == {8, 9, 13, 29, 39, 41, 46, 47, 49, 50}  # another split is another experiment

    @pytest.mark.parametrize("images", [2, 3, 6])
    def test_small_sets_have_both_parts(self, base, images):
        whole = content()
        whole["images"], whole["annotations"] = whole["images"][:images], []
        base.write_text(json.dumps(whole))
        assert len(derive("@held_out")["images"]) == 1
        assert len(derive("@fit")["images"]) == images - 1

    def test_modifiers_combine(self, base):
        fit = derive("@any@fit")
        assert fit["categories"] == [{"id": 1, "name": "object"}]
        assert image_ids(fit) == image_ids(derive("@fit"))
        assert derive("@fit@any")["annotations"] == fit["annotations"]
        assert image_ids(derive("@person@held_out")) == image_ids(derive("@held_out"))
        assert len(derive("@person@any")["annotations"]) == IMAGES // 5


class TestRegistration:
    def test_the_catalogs_know_it(self, base, tmp_path):
        check_datasets([f"{BASE}@traffic_light@fit", f"{BASE}@fit"])
        one, all_of_them = (MetadataCatalog.get(f"{BASE}@{part}") for part in ("traffic_light@fit", "fit"))
        assert (one.thing_classes, one.evaluator_type) == (["traffic light"], "coco")
        assert one.image_root == str(tmp_path)
        assert all_of_them.thing_classes == ["person", "traffic light", "dog"]  # by id, as in Detectron2
        assert all_of_them.keypoint_names == ["nose"]  # the base's other metadata
        check_datasets([f"{BASE}@fit"])  # once more is no error

    def test_detectron2_loads_and_evaluates_it(self, base, tmp_path):
        check_datasets([f"{BASE}@traffic_light"])
        dicts = get_detection_dataset_dicts(f"{BASE}@traffic_light")
        assert [image["image_id"] for image in dicts] == list(range(3, IMAGES + 1, 3))  # none without a light
        assert {a["category_id"] for image in dicts for a in image["annotations"]} == {0}
        assert dicts[0]["file_name"] == str(tmp_path / "3.jpg")
        every = get_detection_dataset_dicts(f"{BASE}@traffic_light", filter_empty=False)
        assert len(every) == IMAGES
        COCOEvaluator(f"{BASE}@traffic_light", output_dir=str(tmp_path / "inference" / f"{BASE}@any"))

    def test_it_is_written_once_until_the_source_changes(self, base):
        derive("@any")
        path = MetadataCatalog.get(f"{BASE}@any").json_file
        written = os.stat(path).st_mtime_ns
        forget(f"{BASE}@")
        derive("@any")
        assert os.stat(path).st_mtime_ns == written
        whole = content()
        whole["images"] = whole["images"][:-1]
        base.write_text(json.dumps(whole))
        forget(f"{BASE}@")
        assert len(derive("@any")["images"]) == IMAGES - 1
        assert MetadataCatalog.get(f"{BASE}@any").json_file != path

    def test_a_name_registered_by_the_user_stays(self, base):
        register_coco_instances(f"{BASE}@any", {}, str(base), str(base.parent))
        check_datasets([f"{BASE}@any"])
        assert MetadataCatalog.get(f"{BASE}@any").json_file == str(base)

    def test_processes_at_once_find_whole_files(self, base):
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=register_derived, args=(f"{BASE}@any", BASE, ["any"])) for _ in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        assert len(derive("@any")["images"]) == IMAGES
        folder = os.path.dirname(MetadataCatalog.get(f"{BASE}@any").json_file)
        assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


class TestMistakes:
    def test_an_unknown_modifier_gets_near_ones(self, base):
        assert message(f"{BASE}@persn") == (
            f"{BASE}@persn: unknown modifier @persn; use @any, @fit, @held_out or @CATEGORY; "
            "did you mean @person?"
        )
        assert "did you mean @traffic_light" in message(f"{BASE}@trafic_light")
        assert "use @any, @fit, @held_out or @CATEGORY" in message(f"{BASE}@")
        assert "unknown modifier @person" in message(f"{BASE}@any@person")  # there are only objects left
        assert not [name for name in DatasetCatalog.list() if name.startswith(f"{BASE}@")]

    def test_an_unknown_base(self, base):
        text = message("rt_test_derivd@any")
        assert text.startswith("dataset 'rt_test_derivd' is not registered; did you mean rt_test_derived")

    def test_a_missing_file_of_the_base(self, base):
        base.unlink()
        assert f"{BASE} needs {base}, which does not exist" in message(f"{BASE}@any")

    def test_a_base_in_another_format(self, base):
        DatasetCatalog.register(f"{BASE}_voc", list)
        MetadataCatalog.get(f"{BASE}_voc").set(evaluator_type="pascal_voc", thing_classes=["a"])
        assert f"{BASE}_voc is not in COCO's format" in message(f"{BASE}_voc@any")

    def test_too_few_images_to_split(self, base):
        base.write_text(json.dumps({**content(), "images": content()["images"][:1]}))
        assert f"{BASE}@fit has no image" in message(f"{BASE}@fit")

    @pytest.mark.parametrize(
        "text",
        ["", "[1, 2]", '{"images": [', '{"annotations": [], "categories": []}', '{"images": []}', "\xff"],
    )
    def test_unusable_annotations(self, base, text):
        base.write_text(text, encoding="latin-1")
        assert message(f"{BASE}@any@held_out").startswith(f"{base}: not usable annotations (")

    def test_a_cache_that_cannot_be_written(self, base, tmp_path, monkeypatch):
        monkeypatch.setenv("RT_DETECTRON_CACHE", str(base))  # a file
        assert "set RT_DETECTRON_CACHE to a folder that can be written" in message(f"{BASE}@any")
