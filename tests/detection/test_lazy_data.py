"""The data of a LazyConfig are checked as those of a YAML config."""

import json
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog

from rt_detectron.detection import load_lazy_config
from rt_detectron.detection.lazy_data import build_lazy_loader, check_lazy_test_set
from rt_detectron.utils.errors import InputError

CONFIG = "configs/lazy/mask_rcnn_robust_r50_eps3.py"


@pytest.fixture
def own(tiny_datasets):
    """The names of the tiny sets as own data."""
    folder = tiny_datasets / "demo" / "detection"
    names = {
        key: f"coco:{folder}/annotations/instances_{split}.json:{folder}/{split}"
        for key, split in (("train", "train"), ("test", "val"))
    }
    yield names
    for name in names.values():
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def tiny(own, tiny_lazy_opts, tmp_path):
    """``tiny(key=value ...)``: the shipped config on own data."""

    def make(*more, **names):
        opts = [f"dataloader.{key}.dataset.names={name}" for key, name in {**own, **names}.items()]
        opts += [*tiny_lazy_opts, "train.device=cpu", f"train.output_dir={tmp_path}"]
        return load_lazy_config(CONFIG, [*opts, *more])

    return make


@pytest.fixture
def spoiled(own, tmp_path):
    """``spoiled(split, change)``: the name of a changed copy of that set."""

    def make(split, change):
        _, annotations, images = own[split].split(":")
        content = json.loads(Path(annotations).read_text())
        change(content)
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(content))
        return f"coco:{path}:{images}"

    return make


def test_own_data_by_name_with_its_classes(tiny):
    cfg = tiny("model.roi_heads.num_classes=0")
    assert cfg.model.roi_heads.num_classes == 10
    check_lazy_test_set(cfg)
    (batch,) = (batch for batch, _ in zip(build_lazy_loader(cfg, "train"), range(1), strict=False))
    assert len(batch) == 2
    assert len(list(build_lazy_loader(cfg, "test"))) == 4


def test_retinanet_and_fcos_count_their_classes_elsewhere(own):
    for name in ("common/models/retinanet.py", "common/models/fcos.py"):
        model = model_zoo.get_config(name).model
        assert model.num_classes == 80  # the key that 0 is looked for at
    path = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.py")
    names = [f"dataloader.{key}.dataset.names={name}" for key, name in own.items()]
    cfg = load_lazy_config(path, [*names, "model.num_classes=0"])
    assert cfg.model.num_classes == cfg.model.head.num_classes == 10


def test_another_number_of_classes(tiny):
    with pytest.raises(InputError, match=r"^model\.roi_heads\.num_classes is 80, but coco:.* has 10 classes"):
        build_lazy_loader(tiny("model.roi_heads.num_classes=80"), "train")


@pytest.mark.parametrize(("split", "sizes"), [("train", "[]"), ("test", "-1")])
def test_augmentations_that_refuse_every_image(tiny, split, sizes):
    cfg = tiny(f"dataloader.{split}.mapper.augmentations.0.short_edge_length={sizes}")
    with pytest.raises(InputError, match=rf"cannot build dataloader.{split}.mapper.augmentations.0 \(Val"):
        build_lazy_loader(cfg, split)


def test_masks_in_the_other_format(tiny):
    cfg = tiny()
    cfg.dataloader.train.mapper.instance_mask_format = "polygon"
    with pytest.raises(InputError, match=r"has a mask in RLE, not polygons: .* instance_mask_format\)$"):
        build_lazy_loader(cfg, "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["annotations"][0].pop("area"), "and an 'area'"),
        (lambda content: content["annotations"][0].pop("segmentation"), "no usable segmentation"),
        (lambda content: content["annotations"][0].update(category_id=99), "category_id=99"),
        (lambda content: content["images"][0].update(file_name="x.jpg"), r"x\.jpg: cannot .* delete it$"),
        (lambda content: content["categories"][2].update(name="ox"), "class 2 is 'ox', not 'two'"),
    ],
)
def test_a_test_set_that_cannot_be_scored(tiny, spoiled, change, words):
    cfg = tiny(test=spoiled("test", change))
    with pytest.raises(InputError, match=words):
        check_lazy_test_set(cfg)


def test_training_images_may_be_skipped(tiny, spoiled):
    name = spoiled("train", lambda content: content["images"][0].update(file_name="x.jpg"))
    with pytest.raises(InputError, match=r"x\.jpg: cannot be read .* or set train\.on_corrupt=skip"):
        build_lazy_loader(tiny(train=name), "train")
    loader = build_lazy_loader(tiny("train.on_corrupt=skip", train=name), "train")
    assert next(iter(loader))


class OwnMapper:
    """With nothing that Detectron2's has."""

    def __call__(self, record: dict) -> dict:
        return record


def test_a_mapper_of_ones_own(tiny):
    cfg = tiny()
    cfg.dataloader.train.mapper = LazyCall(OwnMapper)()
    assert next(iter(build_lazy_loader(cfg, "train")))[0]["file_name"].endswith(".jpg")


def test_a_loader_of_another_kind_is_taken_as_it_is(tiny):
    cfg = tiny()
    del cfg.dataloader.test["mapper"]
    assert cfg.dataloader.test.keys() == {"_target_", "dataset", "num_workers"}
    with pytest.raises(InputError, match=r"dataloader.test .*missing .* 'mapper'"):  # Detectron2's needs one
        build_lazy_loader(cfg, "test")
    assert instantiate(cfg.dataloader.test.dataset)
