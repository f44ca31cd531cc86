"""Weights must fill the pretrained network, and for an evaluation all of the model; else loading stops."""

import builtins
import os
import pickle

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_backbone, build_model

from rt_detectron.checkpoint import checkpointer
from rt_detectron.checkpoint.checkpointer import TRUNK, RobustCheckpointer
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.utils.errors import InputError

PYRAMID = "backbone.fpn_lateral2.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory, random_classifier):
    """The folder with resnet18 and resnet50 as NAME.pth (classifier) and NAME.pkl (backbone)."""
    folder = tmp_path_factory.mktemp("weights")
    for arch in ("resnet18", "resnet50"):
        torch.save(random_classifier(arch).state_dict(), folder / f"{arch}.pth")
        convert_checkpoint(str(folder / f"{arch}.pth"), str(folder / f"{arch}.pkl"))
    return folder


@pytest.fixture
def edit(files, tmp_path):
    """``edit(arch, change)``: a copy of the backbone file with ``change(content)`` applied."""

    def edited(arch, change):
        with open(files / f"{arch}.pkl", "rb") as file:
            content = pickle.load(file)
        change(content)
        path = tmp_path / "edited.pkl"
        path.write_bytes(pickle.dumps(content))
        return str(path)

    return edited


def trunk(model):
    return {n: t for n, t in model.state_dict().items() if "bottom_up" in n and "fpn" not in n}


def test_fills_the_trunk_and_returns_the_metadata(files, make_cfg):
    model = build_model(make_cfg("resnet18"))
    rest = RobustCheckpointer(model).load(str(files / "resnet18.pkl"))
    assert rest["rt_detectron"]["arch"] == "resnet18"
    expected = torch.load(files / "resnet18.pth")
    found = model.backbone.bottom_up.res5[1].conv2.norm.running_var
    torch.testing.assert_close(found, expected["layer4.1.bn2.running_var"], rtol=0, atol=0)


def test_c4_fills_res5_of_the_head(files, make_cfg):
    cfg = make_cfg("resnet50", "c4", STRIDE_IN_1X1=False)
    model = build_model(cfg)
    RobustCheckpointer(model).load(str(files / "resnet50.pkl"))
    expected = torch.load(files / "resnet50.pth")
    found = model.roi_heads.res5[2].conv3.weight
    torch.testing.assert_close(found.data, expected["layer4.2.conv3.weight"], rtol=0, atol=0)


def test_absent_stage_may_stay_unused(files, make_cfg):
    cfg = make_cfg("resnet18")
    cfg.MODEL.BACKBONE.NAME = "build_robust_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3"]
    backbone = build_backbone(cfg)
    RobustCheckpointer(backbone).load(str(files / "resnet18.pkl"))
    assert not hasattr(backbone, "res4")


def test_guard_comes_first(files, make_cfg):
    cfg = make_cfg("resnet18")
    cfg.INPUT.FORMAT = "BGR"
    model = build_model(cfg)
    before = {n: t.clone() for n, t in trunk(model).items()}
    with pytest.raises(InputError, match=r'set INPUT\.FORMAT "RGB"$'):
        RobustCheckpointer(model).load(str(files / "resnet18.pkl"))
    assert all(torch.equal(t, before[n]) for n, t in trunk(model).items())


def test_wrong_network(files, make_cfg):
    checkpointer = RobustCheckpointer(build_model(make_cfg("resnet34")))
    with pytest.raises(InputError, match=r"tensors not in the file .*set MODEL\.ROBUST\.ARCH resnet18"):
        checkpointer.load(str(files / "resnet18.pkl"))
    with pytest.raises(InputError, match="do not fit"):  # and it can be asked again
        checkpointer.load(str(files / "resnet50.pkl"))


def test_group_norm_has_no_place_for_batch_norm(files, make_cfg):
    model = build_model(make_cfg("resnet18", NORM="GN"))
    with pytest.raises(InputError, match=r"40 tensors not in the model .*running_mean.*RESNETS\.NORM"):
        RobustCheckpointer(model).load(str(files / "resnet18.pkl"))


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
def test_batch_norms_load(files, make_cfg, norm):
    RobustCheckpointer(build_model(make_cfg("resnet18", NORM=norm))).load(str(files / "resnet18.pkl"))


@pytest.mark.parametrize("name", ["res3.0.conv1.weight", "res3.0.conv1.norm.running_var"])
def test_missing_tensor(edit, make_cfg, name):
    path = edit("resnet18", lambda content: content["model"].pop(name))
    with pytest.raises(InputError, match=rf"1 tensors not in the file \(backbone\.bottom_up\.{name}\)"):
        RobustCheckpointer(build_model(make_cfg("resnet18"))).load(path)


def test_extra_and_misshaped_tensor(edit, make_cfg):
    def change(content):
        content["model"]["res3.9.conv1.weight"] = content["model"]["res3.0.conv1.weight"]
        content["model"]["res2.0.conv1.weight"] = content["model"]["res2.0.conv1.weight"][:32]

    path = edit("resnet18", change)
    with pytest.raises(InputError, match=r"res3\.9\.conv1\.weight.*res2\.0\.conv1\.weight"):
        RobustCheckpointer(build_model(make_cfg("resnet18"))).load(path)
    cfg = make_cfg("resnet18")
    with pytest.raises(InputError, match=r"1 tensors misshaped \(res2\.0\.conv1\.weight\)"):
        RobustCheckpointer(build_backbone(cfg).bottom_up).load(path)


def test_fine_tuned_detector_is_guarded(files, tmp_path, make_cfg, caplog):
    first = RobustCheckpointer(build_model(make_cfg("resnet18")), str(tmp_path))
    first.load(str(files / "resnet18.pkl"))
    first.save("model_final", iteration=7)
    path = str(tmp_path / "model_final.pth")

    model = build_model(make_cfg("resnet18"))
    again = RobustCheckpointer(model, str(tmp_path / "again"))
    (tmp_path / "again").mkdir()
    assert again.load(path)["iteration"] == 7
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in first.model.state_dict().items())
    again.save("next")
    saved = torch.load(tmp_path / "again" / "next.pth")["rt_detectron"]
    assert saved == first.metadata.to_dict()

    wrong_std = make_cfg("resnet18")
    wrong_std.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
    with pytest.raises(InputError, match=r"set MODEL\.PIXEL_STD \[58"):
        RobustCheckpointer(build_model(wrong_std)).load(path)
    other_classes = make_cfg("resnet18")
    other_classes.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(InputError, match=r"misshaped .*cls_score.*or start from its backbone's \.pkl"):
        RobustCheckpointer(build_model(other_classes)).load(path)
    for start, expected in ((path, "cls_score"), (str(files / "resnet18.pkl"), "")):
        caplog.clear()
        model = build_model(other_classes)
        RobustCheckpointer(model).resume_or_load(start, resume=False)
        assert expected in "".join(r.message for r in caplog.records if r.name == checkpointer.__name__)
        found = model.state_dict()
        assert all(torch.equal(tensor, found[name]) for name, tensor in trunk(first.model).items())
        assert torch.equal(found[PYRAMID], first.model.state_dict()[PYRAMID]) == (start == path)
    no_masks = make_cfg("resnet18")
    no_masks.MODEL.MASK_ON = False
    with pytest.raises(InputError, match=r"not in the model .*mask_head"):
        RobustCheckpointer(build_model(no_masks)).load(path)


def test_classifier_is_not_a_backbone(tmp_path, files, make_cfg):
    path = str(tmp_path / "classifier.pth")
    with open(files / "resnet18.pkl", "rb") as file:
        metadata = pickle.load(file)["rt_detectron"]
    torch.save({"model": torch.load(files / "resnet18.pth"), "rt_detectron": metadata}, path)
    with pytest.raises(InputError, match=r"convert it with tools/convert_checkpoint\.py"):
        RobustCheckpointer(build_model(make_cfg("resnet18"))).load(path)


@pytest.mark.parametrize("start", [False, True], ids=["load", "start of a training"])
def test_a_detector_without_metadata(files, tmp_path, make_cfg, start):
    """Of Detectron2's own trainer, or trained from scratch."""
    torch.save({"model": build_model(make_cfg("resnet18")).state_dict()}, tmp_path / "detector.pth")
    path, other_classes = str(tmp_path / "detector.pth"), make_cfg("resnet18")
    other_classes.MODEL.ROI_HEADS.NUM_CLASSES = 4
    checkpointer = RobustCheckpointer(build_model(other_classes))
    if start:
        checkpointer.resume_or_load(path, resume=False)
    else:
        with pytest.raises(InputError, match=r"misshaped .*cls_score"):
            checkpointer.load(path)
    with pytest.raises(InputError, match=r"tensors misshaped|tensors not in the file"):
        RobustCheckpointer(build_model(make_cfg("resnet34"))).resume_or_load(path, resume=False)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="bare"),
        pytest.param(lambda state: {f"module.{name}": t for name, t in state.items()}, id="DataParallel"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 90}, id="PyTorch's example"),
        pytest.param(lambda state: {"model": state, "optimizer": {}}, id="with optimizer"),
        pytest.param(
            lambda state: {
                "model": {
                    f"module.{part}.{n}": t for part in ("model", "attacker.model") for n, t in state.items()
                }
            },
            id="robustness",
        ),
        pytest.param(lambda state: {**state, "schedule": Payload(print)}, id="refused"),
    ],
)
def test_a_classifier_without_metadata_is_to_be_converted(files, tmp_path, backbone, wrap):
    path = str(tmp_path / "classifier.pth")
    torch.save(wrap(torch.load(files / "resnet18.pth")), path)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    for load in (RobustCheckpointer(backbone).load, RobustCheckpointer(backbone).resume_or_load):
        kwargs = {"resume": False} if load.__name__ == "resume_or_load" else {}
        with pytest.raises(InputError, match=r"convert it with tools/convert_checkpoint\.py") as error:
            load(path, **kwargs)
        assert path in str(error.value)
        assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_safetensors_are_to_be_converted(files, tmp_path, backbone):
    safetensors = pytest.importorskip("safetensors.torch")
    path = str(tmp_path / "classifier.safetensors")
    safetensors.save_file(torch.load(files / "resnet18.pth"), path)
    with pytest.raises(InputError, match=r"convert it with tools/convert_checkpoint\.py"):
        RobustCheckpointer(backbone).load(path)


def test_a_model_of_other_names_takes_nothing(files, tmp_path):
    """A backbone of the user's own, of which no name is known: some tensor must fit all the same."""
    path = str(tmp_path / "classifier.pth")
    torch.save(torch.load(files / "resnet18.pth"), path)
    own = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(InputError, match=r"do not fit the model"):
        RobustCheckpointer(own).resume_or_load(path, resume=False)
    torch.save({"0.weight": torch.ones(3, 3, 1, 1), "other": torch.zeros(1)}, path)
    RobustCheckpointer(own).resume_or_load(path, resume=False)
    assert (own[0].weight == 1).all()


class TestTrained:
    """What an evaluation asks for."""

    @pytest.fixture
    def model(self, make_cfg):
        return build_model(make_cfg("resnet18"))

    def test_no_weights(self, model):
        for load in (RobustCheckpointer(model, trained=True).load,):
            with pytest.raises(InputError, match=r"no weights are given: set MODEL\.WEIGHTS"):
                load("")

    @pytest.mark.parametrize("change", [lambda content: content, lambda content: content.pop("rt_detectron")])
    def test_a_backbone(self, edit, model, change):
        path = edit("resnet18", change)
        RobustCheckpointer(model).load(path)
        with pytest.raises(InputError, match=r"not in the file .*load a trained detector .*not a backbone$"):
            RobustCheckpointer(model, trained=True).load(path)

    def test_a_detector(self, files, tmp_path, model, make_cfg):
        first = RobustCheckpointer(model, str(tmp_path))
        first.load(str(files / "resnet18.pkl"))
        first.save("model_final")
        again = RobustCheckpointer(build_model(make_cfg("resnet18")), trained=True)
        again.resume_or_load(str(tmp_path / "model_final.pth"), resume=False)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.model.state_dict()[name])
        other_classes = make_cfg("resnet18")
        other_classes.MODEL.ROI_HEADS.NUM_CLASSES = 4
        with pytest.raises(InputError, match=r"misshaped .*cls_score"):
            RobustCheckpointer(build_model(other_classes), trained=True).resume_or_load(
                str(tmp_path / "model_final.pth"), resume=False
            )


def test_the_loaders_colour_order_counts_where_the_model_has_none(files, make_cfg):
    model = build_backbone(make_cfg("resnet18"))
    RobustCheckpointer(model, input_format="RGB").load(str(files / "resnet18.pkl"))
    with pytest.raises(InputError, match=r'set INPUT\.FORMAT "RGB"$'):
        RobustCheckpointer(model, input_format="BGR").load(str(files / "resnet18.pkl"))


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("backbone.bottom_up.stem.conv1.weight", "stem"),
        ("res5.0.conv1.weight", "res5"),
        ("roi_heads.res5.0.conv1.weight", "res5"),
        ("detr.backbone.0.backbone.res2.0.conv1.weight", "res2"),
        ("backbone.bottom_up.trunk.features.norm0.weight", "trunk.features.norm0"),
        ("backbone.trunk.stages_0.blocks.0.norm.weight", "trunk.stages_0.blocks"),
        ("sem_seg_head.decoder.res2.project_conv.weight", None),
        ("ins_embed_head.decoder.res5.fuse_conv.weight", None),
        ("sem_seg_head.pixel_decoder.res3.weight", None),
        ("backbone.fpn_lateral2.weight", None),
    ],
)
def test_stages_of_the_pretrained_network(name, stage):
    match = TRUNK.search(name)
    assert (match and match[1]) == stage


def test_files_without_metadata_load_as_in_detectron2(edit, tmp_path, make_cfg):
    def merged(content):  # as of Caffe2's files, whose statistics are in weight and bias
        del content["rt_detectron"]
        for name in [name for name in content["model"] if "running" in name]:
            del content["model"][name]
        content["model"]["fc1000.weight"] = np.zeros((1000, 512), np.float32)

    path = edit("resnet18", merged)
    cfg = make_cfg("resnet18")
    cfg.INPUT.FORMAT = "BGR"  # what they were trained on is not known
    torch.manual_seed(0)
    ours = build_model(cfg)
    theirs = build_model(cfg)
    theirs.load_state_dict(ours.state_dict())
    checkpointer = RobustCheckpointer(ours, str(tmp_path))
    checkpointer.load(path)
    DetectionCheckpointer(theirs).load(path)
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in ours.state_dict().items())
    checkpointer.save("plain")
    assert "rt_detectron" not in torch.load(tmp_path / "plain.pth")


def test_missing_weights_file(tmp_path, make_cfg):
    checkpointer = RobustCheckpointer(build_backbone(make_cfg("resnet18")))
    with pytest.raises(InputError, match=r"no weights file .*none\.pkl: check MODEL\.WEIGHTS"):
        checkpointer.load(str(tmp_path / "none.pkl"))
    assert checkpointer.load("") == {}


@pytest.fixture
def backbone(make_cfg):
    return build_backbone(make_cfg("resnet18")).bottom_up


class Payload:
    """Unpickles as a call of ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("ending", ["pkl", "pth"])
@pytest.mark.parametrize("function", [os.system, builtins.eval])
def test_payloads_do_not_run(tmp_path, backbone, ending, function):
    mark, path = tmp_path / "ran", tmp_path / f"evil.{ending}"
    code = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    content = {"model": {"stem.conv1.weight": Payload(function, code)}, "__author__": "me"}
    if ending == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=rf"refused for (\w+\.)?{function.__name__},") as error:
        RobustCheckpointer(backbone).load(str(path))
    assert "\n" not in str(error.value)
    assert not mark.exists()
    torch.load(path, weights_only=False) if ending == "pth" else pickle.loads(path.read_bytes())
    assert mark.exists()  # the payload is live


@pytest.mark.parametrize("ending", ["pkl", "pth"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_damaged_files(files, tmp_path, backbone, ending, share):
    content = (files / f"resnet18.{ending}").read_bytes()
    path = tmp_path / f"cut.{ending}"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="damaged or not a checkpoint" if share else "is empty") as error:
        RobustCheckpointer(backbone).load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_file_without_names(tmp_path, backbone, ending):
    path = tmp_path / f"list.{ending}"
    path.write_bytes(pickle.dumps([1])) if ending == "pkl" else torch.save([1], path)
    with pytest.raises(InputError, match="holds no weights by name"):
        RobustCheckpointer(backbone).load(str(path))


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda tensors: {"blobs": tensors, "cfg": "MODEL: {}"}, id="Detectron1"),
        pytest.param(lambda tensors: tensors, id="Caffe2"),
        pytest.param(lambda tensors: {"model": tensors, "__author__": "me"}, id="Detectron2"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_read_as_in_detectron2(tmp_path, backbone, wrap, protocol):
    tensors = {name: np.full(3, i, np.float32) for i, name in enumerate(("conv1_w", "conv1_w_momentum"))}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps(wrap(tensors), protocol))
    ours = RobustCheckpointer(backbone)._load_file(str(path))
    theirs = DetectionCheckpointer(backbone)._load_file(str(path))
    assert pickle.dumps(ours) == pickle.dumps(theirs)


def test_converted_backbone_reads_as_in_detectron2(files, backbone):
    path = str(files / "resnet18.pkl")
    ours = RobustCheckpointer(backbone)._load_file(path)
    theirs = DetectionCheckpointer(backbone)._load_file(path)
    for name, array in theirs["model"].items():
        np.testing.assert_array_equal(ours["model"].pop(name), array)
    assert ours.pop("model") == {}
    del theirs["model"]
    assert ours == theirs
