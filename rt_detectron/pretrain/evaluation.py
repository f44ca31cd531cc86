"""Accuracy of a classifier on clean and attacked images."""

import copy
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from rt_detectron.attacks import PGD, ThreatModel, attack_named
from rt_detectron.attacks.registry import Attack
from rt_detectron.data.loader import share, to_device
from rt_detectron.data.shards import ShardDataset
from rt_detectron.engine.lazy_config import build
from rt_detectron.engine.processes import patient_group
from rt_detectron.modeling.load import load_weights
from rt_detectron.pretrain.measurements import Measurements
from rt_detectron.pretrain.model import Pretraining, check_takes
from rt_detectron.pretrain.report import WORST_CASE, findings, write_report
from rt_detectron.pretrain.trainer import build_model
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import file_sha256, printable, text_sha256
from rt_detectron.utils.seeds import seeded, seeded_generator
from rt_detectron.utils.versions import versions

logger = logging.getLogger(__name__)
CURVE_STEPS = 20  # of PGD


class AccuracyEvaluator(DatasetEvaluator):
    """Top-1 accuracy on clean and on attacked images, in percent.

    Args:
        model: what is evaluated.
        attack: any attack on classifiers, see :class:`rt_detectron.attacks.registry.Attack`.
        max_attacked: attack only the first images, this many over all processes; None attacks all.

    Raises:
        InputError: from ``evaluate``, if there was no image.
    """

    def __init__(self, model: Pretraining, attack: Attack, max_attacked: int | None = None):
        if max_attacked is not None and (type(max_attacked) is not int or max_attacked < 1):
            raise InputError(f"evaluator.max_attacked is {max_attacked!r}; it must be >= 1, or null for all")
        self.model = model
        self.attack = attack
        self.max_attacked = max_attacked
        self._group = patient_group()
        self.reset()

    def reset(self):
        self.seen = self.correct = self.attacked = self.withstood = 0

    def process(self, inputs, outputs: torch.Tensor):
        """``inputs``: the batch; ``outputs``: the clean logits (N, num_classes)."""
        images, labels = to_device(inputs, self.model.device)
        self.seen += len(labels)
        self.correct += (outputs.argmax(1) == labels).sum().item()
        if self.max_attacked is not None:
            left = share(self.max_attacked) - self.attacked
            images, labels = images[: max(left, 0)], labels[: max(left, 0)]
        if len(labels):
            adversarial = self.attack(self.model.attacked.now(), images, labels)
            self.attacked += len(labels)
            self.withstood += (self.model.classifier(adversarial).argmax(1) == labels).sum().item()

    def evaluate(self):
        counts = comm.gather((self.seen, self.correct, self.attacked, self.withstood), group=self._group)
        if not comm.is_main_process():
            return {}
        seen, correct, attacked, withstood = (sum(column) for column in zip(*counts, strict=True))
        if not attacked:
            raise InputError("dataloader.test gives no image to evaluate on")
        return {
            "accuracy": {
                "clean": 100 * correct / seen,
                self.attack.name: 100 * withstood / attacked,
                "images": seen,
                "attacked_images": attacked,
            }
        }


class RobustnessEvaluator(DatasetEvaluator):
    """Accuracy under several attacks, over a curve of eps, and checks for gradient masking.

    Images that are misclassified when clean count as errors under every attack, and are not attacked.

    Args:
        model: what is evaluated.
        attacks: any attacks on classifiers, see :class:`rt_detectron.attacks.registry.Attack`.
        curve: the attack of the curve, from a quarter of its eps to :func:`grey_eps`; None for no curve.
        curve_images: how many images the curve uses, over all processes.
        measurements: where findings are kept, and those of an earlier run are; None keeps none.
        seed: for the random numbers of each batch and attack.
    """

    def __init__(
        self,
        model: Pretraining,
        attacks: Sequence[Attack],
        curve: PGD | None = None,
        curve_images: int = 256,
        measurements: Measurements | None = None,
        seed: int = 0,
    ):
        self.model = model
        self.attacks = attacks
        self.curve = curve
        self.curve_images = curve_images
        self.measurements = measurements or Measurements()
        self.seed = seed
        self._group = patient_group()
        self.reset()

    def reset(self):
        self.labels: list[int] = []
        self.withstood: dict[str, list[bool]] = {}
        self.curve_withstood: dict[float, list[bool]] = {}

    def process(self, inputs, outputs: Tensor):
        """``inputs``: the batch; ``outputs``: the clean logits (N, num_classes)."""
        images, labels = to_device(inputs, self.model.device)
        batch = _Batch(images, labels, outputs.argmax(1) == labels, inputs[2:] and inputs[2])
        found = {"clean": batch.right}
        for attack in self._with_progress(self.attacks, len(labels)):
            found[attack.name] = self._withstands(attack, attack.name, batch)
        found[WORST_CASE] = torch.stack(list(found.values())).all(0)
        for name, values in found.items():
            self.withstood.setdefault(name, []).extend(values.tolist())
        left = share(self.curve_images) - len(self.labels)
        if self.curve is not None and left > 0:
            self._follow_curve(self.curve, batch.first(left))
        self.labels.extend(labels.tolist())

    def _with_progress(self, attacks: Sequence, images: int) -> tqdm:
        """A progress bar, since a batch can take hours."""
        description = f"attacking images {len(self.labels)} to {len(self.labels) + images}"
        return tqdm(attacks, description, unit="attack", leave=False, disable=None)

    def _withstands(self, attack: Attack, name: str, batch: "_Batch") -> Tensor:
        """Whether each image withstands the attack, (N,); ``name`` tells it from all others."""
        known = self.measurements.known(name, batch.keys) if batch.keys else [None] * len(batch.labels)
        withstands = batch.right & torch.tensor([value is not False for value in known]).to(batch.right)
        left = batch.right & torch.tensor([value is None for value in known]).to(batch.right)
        if not left.any():
            return withstands
        keys = [key for key, is_left in zip(batch.keys, left.tolist(), strict=False) if is_left]
        seed = int(text_sha256(json.dumps([self.seed, name, keys[:1]]))[:15], 16)
        with seeded(seed, self.model.device):  # so that an interrupted evaluation finds what a whole one does
            adversarial = attack(self.model.attacked.now(), batch.images[left], batch.labels[left])
        withstands[left] = self.model.classifier(adversarial).argmax(1) == batch.labels[left]
        self.measurements.add(name, keys, withstands[left][: len(keys)].tolist())
        return withstands

    def _follow_curve(self, attack: PGD, batch: "_Batch") -> None:
        self.curve_withstood.setdefault(0.0, []).extend(batch.right.tolist())
        curve = eps_curve(attack.threat_model, batch.images[0].numel())
        for eps, threat_model in self._with_progress(curve, len(batch.labels)):
            name = f"{attack.name} of the curve at eps {eps!r}"
            withstands = self._withstands(replace(attack, threat_model=threat_model), name, batch)
            self.curve_withstood.setdefault(eps, []).extend(withstands.tolist())

    def evaluate(self) -> dict:
        """In the first process::

            {"accuracy": {NAME: {"value", "low", "high", "images"}},
             "per_class": {CLASS: {"images": N, NAME: value}},
             "curve": {"attack": NAME, "images": N, "eps": [...], "value": [...]},
             "gradient_based": [NAME of each attack that follows the gradient alone],
             "findings": [signs of gradient masking]}

        Accuracies are in percent, with 95 % Wilson intervals.
        """
        parts = comm.gather((self.labels, self.withstood, self.curve_withstood), group=self._group)
        if not comm.is_main_process():
            return {}
        labels = [label for part, _, _ in parts for label in part]
        if not labels:
            raise InputError("dataloader.test gives no image to evaluate on")
        withstood = _joined([part for _, part, _ in parts])
        curve = _joined([part for _, _, part in parts])
        accuracy = {name: _accuracy(values) for name, values in withstood.items()}
        per_class: dict[int, dict] = {}
        for label in sorted(set(labels)):
            members = [i for i, other in enumerate(labels) if other == label]
            per_class[label] = {"images": len(members)}
            for name, values in withstood.items():
                per_class[label][name] = 100 * sum(values[i] for i in members) / len(members)
        by_gradient = [attack.name for attack in self.attacks if getattr(attack, "gradient_based", False)]
        results: dict = {"accuracy": accuracy, "per_class": per_class}
        if self.curve is not None and curve:
            results["curve"] = {
                "attack": self.curve.name,
                "images": len(curve[0.0]),
                "eps": list(curve),
                "value": [_accuracy(values)["value"] for values in curve.values()],
            }
        results["gradient_based"] = by_gradient
        results["findings"] = findings(accuracy, by_gradient, results.get("curve"))
        return results


@dataclass(frozen=True)
class _Batch:
    images: Tensor
    labels: Tensor
    right: Tensor  # whether they are classified rightly when clean
    keys: Sequence[str]  # empty if they have none

    def first(self, images: int) -> "_Batch":
        return _Batch(*(part[:images] for part in (self.images, self.labels, self.right, self.keys)))


def _joined(parts: Sequence[dict]) -> dict:
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: [value for part in parts for value in part.get(key, ())] for key in keys}


def _accuracy(withstood: Sequence[bool]) -> dict:
    low, high = wilson_interval(sum(withstood), len(withstood))
    return {
        "value": 100 * sum(withstood) / len(withstood),
        "low": 100 * low,
        "high": 100 * high,
        "images": len(withstood),
    }


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927), which also holds close to 0 and 1."""
    z = 1.959964
    center = successes + z**2 / 2
    spread = z * math.sqrt(successes * (trials - successes) / trials + z**2 / 4)
    return max((center - spread) / (trials + z**2), 0.0), min((center + spread) / (trials + z**2), 1.0)


def grey_eps(norm: str, dimensions: int) -> float:
    """The eps within which every image in [0, 1] can be turned into the same grey image.

    No classifier can be right then, so an attack that fails is misled by its gradients.
    """
    return {"linf": 255 / 2, "l2": math.sqrt(dimensions) / 2, "l1": dimensions / 2}[norm]


def eps_curve(threat_model: ThreatModel, dimensions: int) -> list[tuple[float, ThreatModel]]:
    """From a quarter of eps on, each twice the one before, up to :func:`grey_eps`; each with its ball.

    The balls are that of the last, scaled, since a ThreatModel takes a tiny eps for a mistake.
    """
    end = grey_eps(threat_model.norm, dimensions)
    eps, curve = (threat_model.eps or end / 64) / 4, []
    while eps < end:
        curve.append(eps)
        eps *= 2
    return [(eps, replace(threat_model, eps=end, scale=eps / end)) for eps in (*curve, end)]


def evaluate_classifier(cfg, weights: str, attacks: Sequence[str], images: int) -> dict:
    """Evaluate the file ``weights`` on the recipe's test images; the report goes to train.output_dir.

    What was found of each image is kept there, too. So an evaluation that is interrupted goes on where it
    was, and one with more images or attacks runs only these.

    Args:
        cfg: the recipe; the attacks get its ``threat_model``.
        weights: a classifier that fits ``cfg.model``.
        attacks: names for :func:`rt_detectron.attacks.attack_named`.
        images: how many to use, evenly spaced; of shards about as many.

    Returns:
        In the first process the content of evaluation.json, in the others {}.

    Raises:
        InputError: for unknown or repeated attacks, and weights that do not fit.
    """
    if images < 1:
        raise InputError(f"--images is {images}; it must be >= 1")
    threat_model = build(cfg.threat_model, "threat_model")
    built = [attack_named(name.strip(), threat_model, cfg.train.seed) for name in attacks]
    if len({attack.name for attack in built}) < len(built):
        raise InputError(f"--attacks {','.join(attacks)}: give each attack once")
    model = build_model(cfg)
    load_weights(model.classifier, weights)
    lazy_loader = copy.deepcopy(cfg.dataloader.test)
    dataset = build(lazy_loader.dataset, "dataloader.test.dataset")
    check_takes(model.classifier, dataset)
    lazy_loader.dataset = _evenly_spaced(dataset, min(images, len(dataset)))
    sha256 = file_sha256(weights)
    measurements = Measurements(cfg.train.output_dir, _identity(cfg, sha256))
    evaluator = RobustnessEvaluator(
        model, built, PGD(threat_model, CURVE_STEPS), measurements=measurements, seed=cfg.train.seed
    )
    results = inference_on_dataset(model, build(lazy_loader, "dataloader.test"), evaluator)
    if not comm.is_main_process():
        return {}
    results |= {
        "classifier": f"{cfg.model.classifier.arch} of {os.path.basename(weights)}",
        "sha256": sha256,
        "threat_model": {"norm": threat_model.norm, "eps": threat_model.eps},
        "classes": dict(enumerate(getattr(dataset, "classes", None) or ())),
        "caveats": _caveats(built, cfg.model.classifier.num_classes),
        "versions": versions(),
    }
    for path in write_report(results, cfg.train.output_dir):
        logger.info("Wrote %s", printable(path))
    return results


def _caveats(attacks: Sequence[Attack], classes: int) -> list[str]:
    said = [attack.caveat(classes) for attack in attacks if hasattr(attack, "caveat")]
    return [caveat for caveat in said if caveat]


def _evenly_spaced(dataset: Dataset, images: int) -> Dataset:
    """So many images of the data set; those of a folder in random order, for a curve over all classes."""
    if isinstance(dataset, ShardDataset):
        dataset.choose(images)
        return dataset
    order = torch.randperm(images, generator=seeded_generator(0)).tolist()
    return Subset(dataset, [i * len(dataset) // images for i in order])


def _identity(cfg, sha256: str) -> str:
    """Tells findings about an image that are of this network, these images and this threat model."""
    parts = {"data": cfg.dataloader.test.dataset, "model": cfg.model.classifier, "ball": cfg.threat_model}
    texts = {name: OmegaConf.to_yaml(part, resolve=True) for name, part in parts.items()}
    return text_sha256(json.dumps([sha256, cfg.train.seed, texts]))
