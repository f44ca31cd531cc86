import json

import pretraining_variants
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from tool_process import ToolProcess
from torch._dynamo import register_backend
from torch._dynamo.utils import counters

from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.layers.small_maps import SmallMapConv2d
from rt_detectron.modeling.load import load_weights
from rt_detectron.pretrain.export import write_classifier
from rt_detectron.pretrain.label_free import LabelFree
from rt_detectron.pretrain.strategies import Free, Standard
from rt_detectron.pretrain.trainer import (
    build_model,
    do_eval,
    do_train,
    start,
)
from rt_detectron.utils.errors import InputError


def metrics(cfg):
    with open(f"{cfg.train.output_dir}/metrics.json") as file:
        return [json.loads(line) for line in file]


def classifier_file(cfg):
    return torch.load(f"{cfg.train.output_dir}/classifier.pth", weights_only=True)


def test_training_learns_and_writes_what_the_next_tool_needs(digits_cfg):
    digits_cfg.train.update(epochs=20, log_period=2)  # 80 steps: BN statistics must settle, too
    digits_cfg.optimizer.lr = 0.02
    digits_cfg.evaluator.max_attacked = None
    torch.manual_seed(0)
    do_train(digits_cfg)
    log = metrics(digits_cfg)
    assert log[-1]["accuracy/clean"] >= 85
    assert log[-1]["accuracy/pgd2"] <= log[-1]["accuracy/clean"]
    losses = [line["total_loss"] for line in log if "total_loss" in line]
    assert sum(losses[-3:]) < sum(losses[:3]) / 4
    saved = classifier_file(digits_cfg)
    build_classifier("resnet18", 2).load_state_dict(saved["model"])  # torchvision's names, all of them
    assert saved["rt_detectron"] == {
        "arch": "resnet18",
        "norm": "l2",
        "eps": 0.5,
        "input_format": "RGB",
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "stride_in_1x1": False,
        "source": "rt_detectron pretraining",
    }


def test_standard_training_says_eps_0(digits_cfg):
    digits_cfg.model.strategy = L(Standard)()
    digits_cfg.train.epochs = 0.25
    do_train(digits_cfg)
    assert classifier_file(digits_cfg)["rt_detectron"]["norm"] is None
    assert classifier_file(digits_cfg)["rt_detectron"]["eps"] == 0.0


def test_the_seed_decides_the_outcome(digits_cfg, tmp_path):
    outcomes = []
    for run, seed in enumerate((1, 1, 2)):
        torch.manual_seed(seed)  # what default_setup does with train.seed
        digits_cfg.train.update(epochs=0.5, seed=seed, output_dir=str(tmp_path / f"run{run}"))
        do_train(digits_cfg)
        outcomes.append(classifier_file(digits_cfg)["model"]["fc.weight"])
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])


def test_resume_goes_on_where_it_stopped(digits_cfg):
    digits_cfg.train.update(epochs=2, checkpoint_epochs=0.5)

    def stop_at(cfg, iteration):
        from rt_detectron.pretrain.trainer import ClassifierTrainer

        original = ClassifierTrainer.run_step

        def run_step(self):
            if self.iter == iteration:
                raise KeyboardInterrupt
            original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ClassifierTrainer, "run_step", run_step)
            with pytest.raises(KeyboardInterrupt):
                do_train(cfg)

    stop_at(digits_cfg, 5)
    do_train(digits_cfg, resume=True)
    assert metrics(digits_cfg)[-1]["iteration"] == 8  # the evaluation after the last iteration, 7
    state = torch.load(f"{digits_cfg.train.output_dir}/model_final.pth", weights_only=True)
    # 8 iterations in all, momentum and schedule carried over: a fresh start would have counted 4 or 12.
    assert state["iteration"] == 7
    assert state["model"]["network.bn1.num_batches_tracked"] == 8


def test_resume_after_the_end_writes_the_classifier_again(digits_cfg):
    digits_cfg.train.epochs = 0.5
    do_train(digits_cfg)
    first = classifier_file(digits_cfg)["model"]["fc.weight"]
    do_train(digits_cfg, resume=True)
    assert torch.equal(classifier_file(digits_cfg)["model"]["fc.weight"], first)


def test_a_network_of_another_image_size_is_one_line(digits_cfg):
    digits_cfg.model.classifier.arch = "vgg16_bn"  # five times halved, of 16 pixels nothing is left
    with pytest.raises(InputError, match=r"vgg16_bn does not take images of 16 x 16 pixels, as 0/.*change"):
        do_train(digits_cfg)


@pytest.mark.parametrize(("key", "value"), [("pixel_mean", [110.0]), ("pixel_std", [58, 57, 0])])
def test_normalisation_is_of_three_channels(digits_cfg, key, value):
    digits_cfg.model.classifier[key] = value
    with pytest.raises(InputError, match="give three numbers each, R, G and B"):
        build_model(digits_cfg)


def test_shards_train_too(digits_cfg, digit_shards):
    small = LazyConfig.load("configs/pretrain/common/small.py").dataloader
    for split, samples in (("train", 64), ("test", 40)):
        digits_cfg.dataloader[split].dataset = small[split].dataset
        digits_cfg.dataloader[split].dataset.transform = digits_cfg.dataloader.test.dataset.transform
        digits_cfg.dataloader[split].dataset.num_samples = samples
        digits_cfg.dataloader[split].dataset.num_classes = 2
    digits_cfg.dataloader.train.dataset.urls = f"{digit_shards}/train-*.tar"
    digits_cfg.dataloader.test.dataset.urls = f"{digit_shards}/val-*.tar"
    digits_cfg.train.epochs = 0.5
    do_train(digits_cfg)
    assert metrics(digits_cfg)[-1]["accuracy/images"] == 40


def test_evaluation_alone(digits_cfg):
    results = do_eval(digits_cfg, build_model(digits_cfg))["accuracy"]
    assert set(results) == {"clean", "pgd2", "images", "attacked_images"}


def test_weights_load_for_evaluation(digits_cfg, tmp_path):
    model = build_model(digits_cfg)
    path = str(tmp_path / "classifier.pth")
    write_classifier(model, path)
    other = build_model(digits_cfg)
    assert not torch.equal(other.classifier.network.fc.weight, model.classifier.network.fc.weight)
    load_weights(other.classifier, path)
    for name, tensor in model.classifier.state_dict().items():
        assert torch.equal(other.classifier.state_dict()[name], tensor), name


def test_weights_of_another_network_are_one_line(digits_cfg, tmp_path):
    path = str(tmp_path / "classifier.pth")
    write_classifier(build_model(digits_cfg), path)
    digits_cfg.model.classifier.num_classes = 3
    with pytest.raises(InputError, match=r"has 2 classes, but model.classifier.num_classes is 3") as error:
        load_weights(build_model(digits_cfg).classifier, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("classes", [2, 3])
def test_training_starts_from_any_file(digits_cfg, tmp_path, classes, caplog):
    path = str(tmp_path / "classifier.pth")
    pretrained = build_model(digits_cfg).classifier
    write_classifier(build_model(digits_cfg), path)
    load_weights(pretrained, path)
    digits_cfg.model.classifier.num_classes = classes
    model = build_model(digits_cfg)
    before = model.classifier.network.fc.weight.clone()
    with caplog.at_level("INFO", "rt_detectron"):
        start(model, path, resume=False)
    network = model.classifier.network
    assert torch.equal(network.conv1.weight, pretrained.network.conv1.weight)
    assert torch.equal(network.fc.weight, pretrained.network.fc.weight if classes == 2 else before)
    assert ("starts afresh with 3 classes" in caplog.text) == (classes == 3)


def test_weights_for_another_normalisation_are_one_line(digits_cfg, tmp_path):
    path = str(tmp_path / "classifier.pth")
    write_classifier(build_model(digits_cfg), path)
    digits_cfg.model.classifier.pixel_mean = [0.0, 0.0, 0.0]
    with pytest.raises(InputError, match=r"expects pixel_mean \[123.*set model.classifier.pixel_mean"):
        start(build_model(digits_cfg), path, resume=False)


def test_a_normalisation_that_the_file_does_not_hold_is_no_reason_to_stop(digits_cfg, tmp_path):
    path = str(tmp_path / "encoder.pt")
    tensors = build_model(digits_cfg).classifier.network.state_dict()
    backbone = {f"module.encoder.{name}": t for name, t in tensors.items() if not name.startswith("fc.")}
    torch.save(backbone, path)
    digits_cfg.model.classifier.pixel_mean = [0.0, 0.0, 0.0]
    model = build_model(digits_cfg)
    start(model, path, resume=False)
    assert torch.equal(model.classifier.network.conv1.weight, tensors["conv1.weight"])
    torch.save({**backbone, "0.mean": torch.ones(3) / 2, "0.std": torch.ones(3)}, path)
    with pytest.raises(InputError, match=r"set model\.classifier\.pixel_mean"):
        start(model, path, resume=False)


def test_an_interrupted_export_leaves_the_old_file_alone(digits_cfg, tmp_path, monkeypatch):
    model = build_model(digits_cfg)
    (tmp_path / "classifier.pth").write_text("old")

    def interrupted(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_classifier(model, str(tmp_path / "classifier.pth"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("classifier.pth", "old")]


def test_every_checkpoint_converts_with_its_threat_model(digits_cfg, tmp_path):
    digits_cfg.train.epochs = 0.25
    do_train(digits_cfg)
    checkpoint = f"{digits_cfg.train.output_dir}/model_final.pth"
    metadata = convert_checkpoint(checkpoint, str(tmp_path / "backbone.pkl")).metadata
    assert (metadata.arch, metadata.norm, metadata.eps) == ("resnet18", "l2", 0.5)
    saved = torch.load(checkpoint, weights_only=True)["rt_detectron"]
    assert saved == classifier_file(digits_cfg)["rt_detectron"]


def test_free_trains_each_batch_several_times_and_resumes(digits_cfg, tmp_path, monkeypatch):
    digits_cfg.model.strategy = L(Free)(threat_model="${threat_model}", replays=3)
    digits_cfg.train.epochs = 0.5  # two batches
    seen = []

    def record(self, target, images, labels, progress):
        seen.append((images.sum().item(), progress))
        return perturb(self, target, images, labels, progress)

    perturb = Free.perturb
    monkeypatch.setattr(Free, "perturb", record)
    do_train(digits_cfg)
    assert [progress for _, progress in seen] == [i / 6 for i in range(6)]
    batches = [total for total, _ in seen]
    assert batches[0] == batches[1] == batches[2] != batches[3] == batches[4] == batches[5]
    saved = torch.load(f"{digits_cfg.train.output_dir}/model_final.pth", weights_only=True)
    assert saved["processes"][0]["perturbation"].shape == (16, 3, 16, 16)
    digits_cfg.train.epochs = 0.75
    do_train(digits_cfg, resume=True)
    assert len(seen) == 9


@pytest.mark.parametrize(("device", "expected"), [("cpu", SmallMapConv2d), ("meta", torch.nn.Conv2d)])
def test_only_training_on_cpus_has_kernels_of_its_own(digits_cfg, device, expected):
    digits_cfg.train.device = device
    classifier = build_model(digits_cfg).classifier
    kinds = {type(module) for module in classifier.modules() if isinstance(module, torch.nn.Conv2d)}
    assert kinds == {expected}
    assert list(classifier.network.state_dict()) == list(build_classifier("resnet18", 2).state_dict())


def test_every_option_trains_one_network_in_two_processes(digit_folders, tool_server, rendezvous, tmp_path):
    processes = {}
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [pretraining_variants.__file__, digit_folders, folder, number, rendezvous()]
        processes[number] = ToolProcess(command, folder)
    for process in processes.values():
        assert process.wait(300) == 0, process.stderr

    def found(variant: str, number: int, rank: int = 0) -> dict:
        parts = torch.load(tmp_path / str(number) / f"{variant}-{rank}.pth", weights_only=True)
        return {f"{part} {name}": value for part in parts for name, value in parts[part].items()}

    def farthest(one: dict, other: dict) -> float:
        assert one.keys() == other.keys()
        return max((one[name] - other[name]).abs().max().item() for name in one)

    for variant in (*pretraining_variants.EQUAL, *pretraining_variants.OTHERS):
        first, second = (found(variant, 2, rank) for rank in range(2))
        of_all = [name for name in first if "running_" not in name]  # BN's: the first process's count
        assert farthest(*({name: one[name] for name in of_all} for one in (first, second))) == 0, variant
    for variant in pretraining_variants.EQUAL:
        assert farthest(found(variant, 1), found(variant, 2)) < 1e-6, variant
    assert farthest(found("free", 2), found("free, interrupted", 2)) == 0
    assert farthest(found("plain", 1), found("eps grows", 1)) > 1e-3  # what a difference is


def test_compiled_training_is_the_same(digit_folders, tmp_path):
    """With names as ever, so that either goes on with the other's checkpoint."""
    before = counters["stats"]["unique_graphs"]
    outcomes = {}
    for backend in (None, "aot_eager"):
        cfg = pretraining_variants.recipe(digit_folders, str(tmp_path / str(backend)))
        cfg.train.update(epochs=0.5, compile=backend, sync_bn=False)
        torch.manual_seed(0)
        pretraining_variants._train(cfg, resume=False)
        outcomes[backend] = torch.load(f"{cfg.train.output_dir}/model_final.pth", weights_only=True)["model"]
    assert counters["stats"]["unique_graphs"] >= before + 2  # the network's and the attacked one's
    assert list(outcomes[None]) == list(outcomes["aot_eager"])
    for name, tensor in outcomes[None].items():
        torch.testing.assert_close(outcomes["aot_eager"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    cfg.train.update(epochs=0.75, compile=None)
    pretraining_variants._train(cfg, resume=True)


def test_what_cannot_be_compiled_is_one_line(digits_cfg, digit_folders, tmp_path):
    digits_cfg.train.compile = "aot_eager"
    attack = {**digits_cfg.model.strategy.attack, "random_start": True}
    digits_cfg.model.strategy = L(LabelFree)(attack=attack)
    with pytest.raises(InputError, match=r"LabelFree looks into the network; set train\.compile=null"):
        build_model(digits_cfg)

    def broken(graph, inputs):
        raise OSError("no compiler")

    register_backend(broken, name="broken")
    cfg = pretraining_variants.recipe(digit_folders, str(tmp_path / "out"))
    cfg.train.update(compile="broken", sync_bn=False)
    with pytest.raises(InputError, match=r"fails here \(.*no compiler.*\); set train.compile=null"):
        pretraining_variants._train(cfg, resume=False)


@pytest.mark.parametrize(
    ("strategy", "bfloat16", "reason"),
    [
        (None, True, ""),
        (None, False, "saves no time: this CPU has no bfloat16 instructions"),
        (L(Standard)(), True, "saves no time: Standard needs no passes for an attack"),
        (L(Free)(threat_model="${threat_model}"), True, "saves no time: Free needs no passes for an attack"),
    ],
)
def test_attacks_in_half_precision(digits_cfg, monkeypatch, caplog, strategy, bfloat16, reason):
    known = {"architecture": "x86_64", "avx512_bf16": bfloat16, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    if strategy:
        digits_cfg.model.strategy = strategy
    digits_cfg.train.update(epochs=0.25, attack_amp="bf16")
    do_train(digits_cfg)
    assert ("saves no time" in caplog.text) == bool(reason)
    assert reason in caplog.text
    assert all(value.isfinite().all() for value in classifier_file(digits_cfg)["model"].values())
