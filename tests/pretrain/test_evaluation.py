import io
import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.evaluation import inference_on_dataset
from PIL import Image
from torch import nn

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.data.shards import ShardDataset
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.evaluation import (
    AccuracyEvaluator,
    RobustnessEvaluator,
    eps_curve,
    evaluate_classifier,
    grey_eps,
    wilson_interval,
)
from rt_detectron.pretrain.export import write_classifier
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.report import WORST_CASE, findings, markdown, write_report
from rt_detectron.pretrain.strategies import Standard
from rt_detectron.pretrain.trainer import build_model
from rt_detectron.utils.errors import InputError


def test_counts_equal_the_plain_loop(model_and_batches):
    model, batches = model_and_batches
    attack = PGD(ThreatModel("linf", 1.0), steps=1)
    results = inference_on_dataset(model, batches, AccuracyEvaluator(model, attack))["accuracy"]
    withstood = 0
    for images, labels in batches:
        withstood += (
            (model.classifier(attack(model.classifier, images, labels)).argmax(1) == labels).sum().item()
        )
    assert results["clean"] == 75.0
    assert results["pgd1"] == pytest.approx(100 * withstood / 20)
    assert results["pgd1"] < 75.0


def test_max_attacked_takes_the_first_images(model_and_batches):
    model, batches = model_and_batches
    harmless = PGD(ThreatModel("l2", 0.0), steps=1)
    results = inference_on_dataset(model, batches, AccuracyEvaluator(model, harmless, max_attacked=10))[
        "accuracy"
    ]
    assert results["images"] == 20
    assert results["attacked_images"] == 10
    assert results["pgd1"] == 50.0  # the first five are wrong, the next five right


def test_processes_attack_what_one_would_however_few(model_and_batches, monkeypatch):
    """Eight processes, of which process r has the images [r::8]."""
    model, batches = model_and_batches
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    harmless = PGD(ThreatModel("l2", 0.0), steps=1)
    for max_attacked in (1, 7, 10):
        evaluators = []
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 8)
        monkeypatch.setattr("rt_detectron.engine.processes._patient_group", lambda: None)
        for rank in range(8):
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            evaluators.append(AccuracyEvaluator(model, harmless, max_attacked))
            share = (images[rank::8], labels[rank::8])
            evaluators[rank].process(share, model.classifier(share[0]).detach())
        counts = [(one.seen, one.correct, one.attacked, one.withstood) for one in evaluators]
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 0)
        monkeypatch.setattr("detectron2.utils.comm.gather", lambda part, group, counts=counts: counts)
        together = evaluators[0].evaluate()["accuracy"]
        monkeypatch.undo()
        assert (
            together
            == inference_on_dataset(model, batches, AccuracyEvaluator(model, harmless, max_attacked))[
                "accuracy"
            ]
        )
        assert together["attacked_images"] == max_attacked


@pytest.mark.parametrize("max_attacked", [0, -1, 2.5, True])
def test_a_wrong_number_of_attacked_images_is_one_line(max_attacked):
    with pytest.raises(InputError, match=r"evaluator.max_attacked is .* must be >= 1, or null"):
        AccuracyEvaluator(None, PGD(LINF, steps=1), max_attacked)


def test_no_images_are_no_accuracy(model_and_batches):
    model, _ = model_and_batches
    for evaluator in (AccuracyEvaluator(model, PGD(LINF, 1)), RobustnessEvaluator(model, [PGD(LINF, 1)])):
        with pytest.raises(InputError, match="no image to evaluate on"):
            evaluator.evaluate()


def test_a_large_eps_leaves_nothing(model_and_batches):
    model, batches = model_and_batches
    attack = PGD(ThreatModel("l2", 10.0), steps=10)
    assert inference_on_dataset(model, batches, AccuracyEvaluator(model, attack))["accuracy"]["pgd10"] == 0.0


LINF = ThreatModel("linf", 1.0)


@pytest.fixture
def results():
    row = {"value": 50.0, "low": 23.66, "high": 76.34, "images": 10}
    return {
        "accuracy": {"clean": row, "pgd20": row | {"value": 25.0}},
        "per_class": {
            0: {"images": 6, "clean": 50.0, "pgd20": 20.0},
            1: {"images": 4, "clean": 5.0, "pgd20": 1.0},
        },
        "curve": {
            "attack": "pgd20",
            "images": 10,
            "eps": [0.0, 2.0, 4.0, 127.5],
            "value": [50.0, 30.0, 25.0, 0.0],
        },
        "gradient_based": ["pgd20"],
        "findings": [],
        "classifier": "resnet18 of classifier.pth",
        "threat_model": {"norm": "linf", "eps": 4.0},
        "classes": {0: "cat", 1: "dog"},
        "versions": {"torch": "2"},
    }


def test_writes_json_markdown_and_a_picture(results, tmp_path):
    paths = write_report(results, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "eps_curve.png",
        "evaluation.json",
        "evaluation.md",
    ]
    assert len(paths) == 3
    assert json.loads((tmp_path / "evaluation.json").read_text())["accuracy"] == results["accuracy"]
    assert (tmp_path / "evaluation.md").read_text() == markdown(results)
    with Image.open(io.BytesIO((tmp_path / "eps_curve.png").read_bytes())) as image:
        assert image.convert("L").getextrema()[0] < 100  # something is drawn


def test_says_what_it_was_and_how_sure(results):
    text = markdown(results)
    assert "Under linf eps 4/255." in text
    assert "| pgd20 | 25.00 | 23.66 to 76.34 | 10 |" in text
    assert "| dog | 4 | 5.0 | 1.0 |" in text
    assert "No sign of it: accuracy under pgd20 falls to 0.0 % at eps 127.5" in text
    assert "hardly lower" not in text


def test_says_what_an_attack_leaves_out(results):
    assert "without this" not in markdown(results)
    assert "\n\nAutoAttack without this.\n\n" in markdown(results | {"caveats": ["AutoAttack without this"]})


def test_says_when_not_to_trust_it(results):
    results["findings"] = ["the attack is misled"]
    text = markdown(results)
    assert "Gradients may be masked, and the accuracies too high:\n\n- the attack is misled\n" in text
    assert "No sign" not in text
    results["findings"] = []
    for row in (results["accuracy"], *results["per_class"].values()):
        row["autoattack"] = row["pgd20"]
    assert "It is hardly lower under autoattack than under the attacks by gradient." in markdown(results)
    del results["curve"]
    assert "Not checked" in markdown(results)
    assert "eps_curve.png" not in markdown(results)


def test_every_number_equals_the_plain_loops(model_and_batches):
    model, batches = model_and_batches
    attacks = [PGD(LINF, steps=1), PGD(LINF, steps=3)]
    evaluator = RobustnessEvaluator(model, attacks, curve=PGD(LINF, steps=2), curve_images=10)
    results = inference_on_dataset(model, batches, evaluator)

    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    right = torch.arange(20) >= 5

    def withstood(attack, number=20):
        adversarial = attack(model.classifier, images[:number], labels[:number])
        return (model.classifier(adversarial).argmax(1) == labels[:number]) & right[:number]

    one, three = map(withstood, attacks)
    expected = {"clean": right, "pgd1": one, "pgd3": three, WORST_CASE: one & three}
    assert list(results["accuracy"]) == list(expected)
    for name, values in expected.items():
        assert results["accuracy"][name]["value"] == pytest.approx(100 * values.float().mean().item())
        assert results["accuracy"][name]["images"] == 20
        for label, row in results["per_class"].items():
            mine = labels == label
            assert row["images"] == mine.sum()
            assert row[name] == pytest.approx(100 * values[mine].float().mean().item())
    curve = results["curve"]
    assert (curve["attack"], curve["images"]) == ("pgd2", 10)
    assert curve["eps"] == [0.0, *(eps for eps, _ in eps_curve(LINF, 3072))]
    for eps, value in zip(curve["eps"], curve["value"], strict=True):
        found = withstood(PGD(ThreatModel("linf", eps), steps=2), 10)
        assert value == pytest.approx(100 * found.float().mean().item())
    assert curve["value"][-1] == 0.0
    assert results["findings"] == []


def test_processes_are_put_together(model_and_batches, monkeypatch):
    model, batches = model_and_batches
    evaluator = RobustnessEvaluator(model, [PGD(LINF, steps=1)], PGD(LINF, steps=1), curve_images=8)
    alone = inference_on_dataset(model, batches, evaluator)
    monkeypatch.setattr("detectron2.utils.comm.gather", lambda part, group: [part, part])
    together = evaluator.evaluate()
    assert together["accuracy"]["pgd1"]["value"] == alone["accuracy"]["pgd1"]["value"]
    assert together["accuracy"]["pgd1"]["images"] == 40
    assert together["curve"]["images"] == 16


class Masked(nn.Module):
    """A linear network on images of few grey values: there is no gradient to follow."""

    def forward(self, images):
        steps = (images * 4).round() / 4
        score = (steps[:, :, :, :16].mean((1, 2, 3)) - steps[:, :, :, 16:].mean((1, 2, 3))) * 50
        return torch.stack([score, -score], 1) + 0 * images.mean()


def test_masked_gradients_are_found_out():
    torch.manual_seed(0)
    model = Pretraining(Classifier("resnet18", num_classes=2), Standard()).eval()
    model.classifier.network = Masked()
    model.classifier.mean.zero_()
    model.classifier.std.fill_(1)
    images = torch.rand(8, 3, 32, 32)
    images[:4, :, :, :16] += 0.5
    images[4:, :, :, 16:] += 0.5
    batches = [(images.clamp(0, 1), torch.tensor([0] * 4 + [1] * 4))]
    results = inference_on_dataset(model, batches, RobustnessEvaluator(model, [], PGD(LINF, steps=5)))
    assert results["curve"]["value"][-1] == 100.0
    assert results["findings"] == [
        "accuracy under pgd5 is 100.0 % at eps 127.5, which can turn every image grey: the attack is misled"
    ]


def test_the_other_findings():
    curve = {"attack": "pgd20", "eps": [0, 1, 2, 4], "value": [80, 40, 45, 0.0]}
    accuracy = {"clean": {"value": 80}, "pgd20": {"value": 50}, "own": {"value": 48}}
    by_gradient = ["pgd20", "own"]
    rise = "accuracy under pgd20 is higher at eps 2 than at a smaller one"
    assert findings(accuracy, by_gradient, curve) == [rise]
    accuracy |= {"autoattack": {"value": 30}, "square": {"value": 45}, WORST_CASE: {"value": 10}}
    missed = "accuracy under autoattack is 18.0 points lower than under the attacks by gradient"
    assert findings(accuracy, by_gradient, None) == [missed]
    assert findings(accuracy, [], None) == []  # nothing to compare with


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 7), (500, 1000)])
def test_the_interval_is_wilsons(successes, trials):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_grey_is_within_reach_of_every_image(norm):
    eps = grey_eps(norm, 3 * 8 * 8)
    for corner in (0.0, 1.0):
        perturbation = torch.full((1, 3, 8, 8), 0.5 - corner)
        projected = ThreatModel(norm, eps).project(perturbation)
        assert torch.allclose(projected, perturbation)
        assert not torch.allclose(ThreatModel(norm, eps * 0.9).project(perturbation), perturbation)


def test_the_curve_starts_below_eps_and_ends_in_grey():
    curve = eps_curve(ThreatModel("linf", 32), 9)
    assert [eps for eps, _ in curve] == [8, 16, 32, 64, 127.5]
    assert [threat_model.radius for _, threat_model in curve] == pytest.approx(
        [eps / 255 for eps, _ in curve]
    )
    assert len(eps_curve(ThreatModel("l2", 0.0), 3072)) > 3  # of a standard recipe


@pytest.mark.parametrize("eps", [0.1, 0.3, 0.5])
def test_a_curve_may_start_at_a_tiny_eps(eps):
    """Which a ThreatModel alone takes for a mistake."""
    first, threat_model = eps_curve(ThreatModel("linf", eps), 3072)[0]
    assert first == eps / 4
    assert threat_model.radius == pytest.approx(eps / 4 / 255)


@pytest.mark.parametrize(
    ("attacks", "images", "words"),
    [
        (["pgd2", "pgd2"], 5, "give each attack once"),
        (["pgd2"], 0, "--images is 0"),
        (["x"], 5, "'x' is unknown"),
    ],
)
def test_bad_input_is_one_line(digits_cfg, attacks, images, words):
    with pytest.raises(InputError, match=words):
        evaluate_classifier(digits_cfg, "nowhere.pth", attacks, images)


@pytest.fixture
def digit_weights(digits_cfg, tmp_path):
    """Of an untrained network for the two digits."""
    torch.manual_seed(0)
    path = str(tmp_path / "weights.pth")
    write_classifier(build_model(digits_cfg), path)
    return path


def saved(cfg) -> dict:
    return json.loads(Path(cfg.train.output_dir, "evaluation.json").read_text())


@pytest.fixture
def attacked(monkeypatch):
    """The numbers of images that PGD is given; the curve is short."""
    monkeypatch.setattr("rt_detectron.pretrain.evaluation.CURVE_STEPS", 1)
    monkeypatch.setattr("rt_detectron.pretrain.evaluation.eps_curve", lambda ball, _: [(ball.eps, ball)])
    seen = []

    def call(self, model, images, labels):
        seen.append(len(images))
        return original(self, model, images, labels)

    original = PGD.__call__
    monkeypatch.setattr(PGD, "__call__", call)
    return seen


def test_a_recipe_on_shards_is_evaluated(digits_cfg, digit_shards, digit_weights, tmp_path, attacked):
    os.makedirs(digits_cfg.train.output_dir)
    evaluate_classifier(digits_cfg, digit_weights, ["pgd2"], 40)
    of_folders = saved(digits_cfg)
    digits_cfg.train.output_dir = str(tmp_path / "shards")
    os.makedirs(digits_cfg.train.output_dir)
    transform = digits_cfg.dataloader.test.dataset.transform
    digits_cfg.dataloader.test.dataset = L(ShardDataset)(
        urls=f"{digit_shards}/val-*.tar", num_samples=40, num_classes=2, transform=transform
    )
    evaluate_classifier(digits_cfg, digit_weights, ["pgd2"], 40)
    of_shards = saved(digits_cfg)
    assert of_shards["classes"] == {}
    assert of_shards["accuracy"] == of_folders["accuracy"]
    assert {"evaluation.md", "eps_curve.png"} < set(os.listdir(digits_cfg.train.output_dir))


def test_an_interrupted_evaluation_goes_on_where_it_was(digits_cfg, digit_weights, attacked, tmp_path):
    os.makedirs(digits_cfg.train.output_dir)
    digits_cfg.dataloader.test.batch_size = 20
    attacks = ["pgd2", "pgd2x2"]  # the second draws random numbers
    evaluate_classifier(digits_cfg, digit_weights, attacks, 40)
    whole, needed = saved(digits_cfg), sum(attacked)
    lines = Path(digits_cfg.train.output_dir, "measurements-0.jsonl").read_text().splitlines(keepends=True)

    for kept in (3, len(lines)):  # the last line but a half, as after a kill, and all
        folder = tmp_path / f"kept{kept}"
        folder.mkdir()
        text = "".join(lines[:kept])
        (folder / "measurements-0.jsonl").write_text(text if kept == len(lines) else text + lines[3][:20])
        digits_cfg.train.output_dir = str(folder)
        attacked.clear()
        evaluate_classifier(digits_cfg, digit_weights, attacks, 40)
        assert saved(digits_cfg) == whole
        assert (sum(attacked) == 0) == (kept == len(lines))
        assert sum(attacked) < needed
    attacked.clear()
    digits_cfg.threat_model.eps = 0.4  # findings under another are no findings
    evaluate_classifier(digits_cfg, digit_weights, attacks, 40)
    assert sum(attacked) == needed


def test_more_attacks_and_images_are_added(digits_cfg, digit_weights, attacked):
    os.makedirs(digits_cfg.train.output_dir)
    evaluate_classifier(digits_cfg, digit_weights, ["pgd1"], 10)
    assert saved(digits_cfg)["accuracy"]["clean"]["images"] == 10
    attacked.clear()
    evaluate_classifier(digits_cfg, digit_weights, ["pgd1", "pgd2"], 10)
    assert 0 < sum(attacked) == round(saved(digits_cfg)["accuracy"]["clean"]["value"] / 10)
    evaluate_classifier(digits_cfg, digit_weights, ["pgd1", "pgd2"], 40)
    assert saved(digits_cfg)["accuracy"]["pgd2"]["images"] == 40
