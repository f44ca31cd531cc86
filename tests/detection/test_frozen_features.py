"""Features of a frozen backbone from disk: the same training, with fewer passes."""

import json
import logging
import re

import pytest
import torch
from detectron2.modeling import ResNet, build_backbone
from detectron2.utils.env import seed_all_rng
from timm.layers import DropPath, PatchDropout
from torchvision.io import write_png
from torchvision.ops import StochasticDepth

from rt_detectron.detection import Trainer
from rt_detectron.detection.frozen_features import KEY, FeatureStore, _drops, padded_sizes
from rt_detectron.utils.errors import InputError

FROZEN = {"MODEL.BACKBONE.FREEZE_AT": 5, "SOLVER.MAX_ITER": 4, "DATALOADER.ASPECT_RATIO_GROUPING": False}


@pytest.fixture
def train(tiny_cfg, tmp_path, monkeypatch):
    """``train(gigabytes, KEY=value ...)`` is the trainer after 4 iterations of 2 images, and the losses."""
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *args: {}))

    def run(gigabytes, resume=False, folder="out", **changed):
        keys = {**FROZEN, KEY: gigabytes, **changed}
        opts = [part for pair in keys.items() for part in pair]
        seed_all_rng(1)  # of the heads' weights and of the order of the images
        trainer = Trainer(tiny_cfg(tmp_path / folder, *opts))
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer, [loss for loss, _ in trainer.storage.history("total_loss").values()]

    return run


def files(tmp_path):
    return sorted((tmp_path / "cache" / "detection_features").rglob("*.npz"))


def test_losses_are_the_same_and_the_second_training_computes_nothing(train, tmp_path, monkeypatch, caplog):
    plain, expected = train(0.0, folder="plain")
    with caplog.at_level(logging.INFO):
        first, losses = train(1.0, folder="first")
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(first.model.state_dict()[name], weight, rtol=1e-3, atol=1e-5)
    store = first.model.backbone.bottom_up.feature_store
    assert store.read + store.computed == 8
    assert store.computed == len(files(tmp_path)) > 0
    assert "6 images x 1 sizes x 1 flips of" in caplog.text

    with monkeypatch.context() as without:
        without.setattr(ResNet, "forward", None)
        second, again = train(1.0, folder="second")
    assert second.model.backbone.bottom_up.feature_store.computed == 0
    assert again == losses

    files(tmp_path)[0].write_bytes(files(tmp_path)[1].read_bytes()[:1000])
    third, again = train(1.0, folder="third")
    assert third.model.backbone.bottom_up.feature_store.computed == 1
    assert "is damaged" in caplog.text
    assert again == losses
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert third.model.backbone.bottom_up(image)["res5"].requires_grad
    third.model.eval()
    assert third.model.backbone.bottom_up(torch.zeros(1, 3, 32, 32))
    assert len(files(tmp_path)) == store.computed  # nothing in eval mode


def test_other_weights_have_other_features(train, tmp_path):
    trainer, _ = train(1.0, **{"SOLVER.MAX_ITER": 1})
    trunk, image = trainer.model.backbone.bottom_up, torch.ones(1, 3, 32, 32)
    before = trunk(image)
    state = {name: 1.1 * tensor for name, tensor in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(state)
    assert not torch.allclose(trunk(image)["res5"], before["res5"])
    assert len({path.parent for path in files(tmp_path)}) == 2


def test_a_detector_on_other_features_of_the_same_network_finds_its_own(train):
    """As a RetinaNet, which stands on res3 to res5, and a Faster R-CNN on res2 to res5."""
    fewer = {"MODEL.FPN.IN_FEATURES": "['res3','res4','res5']", "SOLVER.MAX_ITER": 1}
    fewer |= {"MODEL.RPN.IN_FEATURES": "['p3','p4','p5']", "MODEL.ROI_HEADS.IN_FEATURES": "['p3','p4','p5']"}
    fewer |= {"MODEL.ANCHOR_GENERATOR.SIZES": "[[64],[128],[256]]"}
    train(1.0, folder="fewer", **fewer)
    trainer, _ = train(1.0, folder="all", **{"SOLVER.MAX_ITER": 1})
    assert trainer.model.backbone.bottom_up.feature_store.read == 0


@pytest.mark.parametrize("grouped", [True, False])
def test_a_picture_is_padded_in_one_way_where_batches_are_grouped(train, tmp_path, grouped):
    widths = [64, 64, 90, 90, 100, 120]  # of which 100 and 120 are padded to 128 alike
    annotations = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number, width in enumerate(widths):
        name = f"{number}.png"
        write_png(torch.full((3, 64, width), 40 * number, dtype=torch.uint8), str(tmp_path / name))
        annotations["images"].append({"id": number, "file_name": name, "height": 64, "width": width})
        box = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [4, 4, 30, 30], "area": 900}
        polygon = [[4, 4, 34, 4, 34, 34, 4, 34]]
        annotations["annotations"].append({**box, "iscrowd": 0, "segmentation": polygon})
    (tmp_path / "instances.json").write_text(json.dumps(annotations))
    own = f"coco:{tmp_path}/instances.json:{tmp_path}"
    trainer, losses = train(
        1.0,
        **{
            **dict.fromkeys(("DATASETS.TRAIN", "DATASETS.TEST"), own),
            "MODEL.ROI_HEADS.NUM_CLASSES": 1,
            "DATALOADER.ASPECT_RATIO_GROUPING": grouped,
            "SOLVER.MAX_ITER": 12,
        },
    )
    computed = trainer.model.backbone.bottom_up.feature_store.computed
    assert len(losses) == 12
    assert computed == len(widths) if grouped else computed > len(widths)


def test_sizes_of_a_record(tiny_cfg, tmp_path):
    cfg = tiny_cfg(tmp_path, "INPUT.MIN_SIZE_TRAIN", "(64, 320)", "INPUT.MAX_SIZE_TRAIN", 533)
    # From Detectron2: 427 x 640 becomes 320 x 480; the long side of 200 x 640 is at most 533.
    assert padded_sizes(cfg, 32, {"height": 427, "width": 640}) == ((64, 96), (320, 480))
    assert padded_sizes(cfg, 32, {"height": 640, "width": 200}) == ((224, 64), (544, 192))
    assert padded_sizes(cfg, 32, {}) == ()


def test_what_has_no_room_is_computed_each_time(train, tmp_path, caplog):
    trainer, losses = train(1e-9)
    assert not files(tmp_path)
    assert caplog.text.count("no more features are stored (DATALOADER.FEATURE_CACHE_GB is reached)") == 1
    assert trainer.model.backbone.bottom_up.feature_store.computed == 2 * len(losses)


def test_several_trainings_stay_within_the_limit(tmp_path, monkeypatch, make_cfg):
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "cache"))
    trunk = build_backbone(make_cfg("resnet18"))
    stores = [FeatureStore(trunk, limit=1e6) for _ in range(3)]
    x = torch.zeros(1, 3, 32, 32)
    for number in range(40):
        store = stores[number % 3]
        store.features(trunk, x + number, lambda image: {"res2": torch.zeros(1, 12_500)})  # 50 kB
    assert 0.8e6 < sum(path.stat().st_size for path in files(tmp_path)) < 1e6 + 3 * 2000  # with their headers


@pytest.mark.parametrize(
    ("layer", "drops"),
    [
        (torch.nn.Dropout2d(0.1), True),
        (torch.nn.Dropout(0.0), False),
        (StochasticDepth(0.2, "row"), True),
        (DropPath(0.2), True),
        (DropPath(0.0), False),
        (PatchDropout(0.5), True),
    ],
)
def test_layers_that_drop_something(layer, drops):
    assert _drops(layer) == drops


def test_windows_of_another_size_are_another_network(make_cfg):
    windows = []
    for size in (2, 4):
        cfg = make_cfg("timm/vit_tiny_patch16_224")
        cfg.MODEL.BACKBONE.NAME = "build_robust_timm_backbone"
        cfg.MODEL.ROBUST.WINDOW, cfg.MODEL.RESNETS.OUT_FEATURES = size, ["res4"]
        windows.append(FeatureStore(build_backbone(cfg), 1.0).network)
    assert windows[0] != windows[1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"MODEL.BACKBONE.FREEZE_AT": 4}, "it needs a frozen backbone; set MODEL.BACKBONE.FREEZE_AT 5"),
        ({"INPUT.CROP.ENABLED": True}, "every crop is another picture"),
        (
            {"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT.MIN_SIZE_TRAIN": "(64, 70)"},
            "every size is another picture",
        ),
        ({"SOLVER.ADVERSARIAL.REPLAYS": 2}, "adversarial training changes the pictures"),
        ({"SOLVER.ADVERSARIAL.STEPS": 2}, "adversarial training changes the pictures"),
    ],
)
def test_where_each_iteration_has_pictures_of_its_own_it_is_refused(train, changed, words):
    with pytest.raises(InputError, match=re.escape(words)):
        train(1.0, **changed)


@pytest.mark.parametrize(
    ("gigabytes", "words"), [(-1.0, "it must be in gigabytes"), (1e9, "GB of disk are left for")]
)
def test_a_limit_that_cannot_be(train, gigabytes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        train(gigabytes)
