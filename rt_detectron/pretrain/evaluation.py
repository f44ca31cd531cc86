"""Accuracy of a classifier on clean and attacked images, checks for gradient masking, and the report."""

import copy
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from rt_detectron.attacks import PGD, ThreatModel, attack_named
from rt_detectron.attacks.registry import Attack
from rt_detectron.data.loader import to_device
from rt_detectron.data.shards import ShardDataset
from rt_detectron.modeling.load import load_weights
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.pretrain.trainer import build_model
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import file_sha256, replaced_atomically
from rt_detectron.utils.versions import versions
from rt_detectron.visualization.plots import accuracy_plot

logger = logging.getLogger(__name__)
CURVE_STEPS = 20  # of PGD
WORST_CASE = "worst case"  # an image counts as correct if it is under all attacks
# Beyond these, gradients may be masked:
MAX_LEFT = 1.0  # percent that are correct when every image can be turned grey
MAX_RISE = 2.0  # percentage points that accuracy may rise with eps
MAX_MISSED = 5.0  # percentage points by which other attacks may beat those by gradient


class AccuracyEvaluator(DatasetEvaluator):
    """Top-1 accuracy on clean and on attacked images, in percent.

    Args:
        model: what is evaluated.
        attack: any attack on classifiers, see :class:`rt_detectron.attacks.registry.Attack`.
        max_attacked: attack only the first images, this many over all processes; None attacks all.
    """

    def __init__(self, model: Pretraining, attack: Attack, max_attacked: int | None = None):
        self.model = model
        self.attack = attack
        self.max_attacked = max_attacked
        self.reset()

    def reset(self):
        self.seen = self.correct = self.attacked = self.withstood = 0

    def process(self, inputs, outputs: torch.Tensor):
        """``inputs``: the batch; ``outputs``: the clean logits (N, num_classes)."""
        images, labels = to_device(inputs, self.model.device)
        self.seen += len(labels)
        self.correct += (outputs.argmax(1) == labels).sum().item()
        if self.max_attacked is not None:
            left = self.max_attacked // comm.get_world_size() - self.attacked
            images, labels = images[: max(left, 0)], labels[: max(left, 0)]
        if len(labels):
            adversarial = self.attack(self.model.attacked.now(), images, labels)
            self.attacked += len(labels)
            self.withstood += (self.model.classifier(adversarial).argmax(1) == labels).sum().item()

    def evaluate(self):
        counts = comm.gather((self.seen, self.correct, self.attacked, self.withstood))
        if not comm.is_main_process():
            return {}
        seen, correct, attacked, withstood = (sum(column) for column in zip(*counts, strict=True))
        return {
            "accuracy": {
                "clean": 100 * correct / max(seen, 1),
                self.attack.name: 100 * withstood / max(attacked, 1),
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
        max_images: use only the first images, this many over all processes; None uses all.
        curve_images: how many of those the curve uses.
    """

    def __init__(
        self,
        model: Pretraining,
        attacks: Sequence[Attack],
        curve: PGD | None = None,
        max_images: int | None = None,
        curve_images: int = 256,
    ):
        self.model = model
        self.attacks = attacks
        self.curve = curve
        self.max_images = max_images
        self.curve_images = curve_images
        self.reset()

    def reset(self):
        self.labels: list[int] = []
        self.withstood: dict[str, list[bool]] = {}
        self.curve_withstood: dict[float, list[bool]] = {}

    def process(self, inputs, outputs: Tensor):
        """``inputs``: the batch; ``outputs``: the clean logits (N, num_classes)."""
        images, labels = to_device(inputs, self.model.device)
        left = self._share(self.max_images) - len(self.labels)
        images, labels, right = (
            part[: max(left, 0)] for part in (images, labels, outputs.argmax(1) == labels)
        )
        if not len(labels):
            return
        found = {"clean": right}
        for attack in self._with_progress(self.attacks, len(labels)):
            found[attack.name] = self._withstands(attack, images, labels, right)
        found[WORST_CASE] = torch.stack(list(found.values())).all(0)
        for name, values in found.items():
            self.withstood.setdefault(name, []).extend(values.tolist())
        if self.curve is not None:
            left = self._share(self.curve_images) - len(self.labels)
            self._follow_curve(
                self.curve, images[: max(left, 0)], labels[: max(left, 0)], right[: max(left, 0)]
            )
        self.labels.extend(labels.tolist())

    def _with_progress(self, attacks: Sequence, images: int) -> tqdm:
        """A progress bar, since a batch can take hours."""
        description = f"attacking images {len(self.labels)} to {len(self.labels) + images}"
        return tqdm(attacks, description, unit="attack", leave=False, disable=None)

    def _share(self, total: int | None) -> int:
        return sys.maxsize if total is None else math.ceil(total / comm.get_world_size())

    def _withstands(self, attack: Attack, images: Tensor, labels: Tensor, right: Tensor) -> Tensor:
        withstands = right.clone()
        if right.any():
            adversarial = attack(self.model.attacked.now(), images[right], labels[right])
            withstands[right] = self.model.classifier(adversarial).argmax(1) == labels[right]
        return withstands

    def _follow_curve(self, attack: PGD, images: Tensor, labels: Tensor, right: Tensor) -> None:
        if not len(labels):
            return
        self.curve_withstood.setdefault(0.0, []).extend(right.tolist())
        threat_models = eps_curve(attack.threat_model, images[0].numel())
        for threat_model in self._with_progress(threat_models, len(labels)):
            withstands = self._withstands(replace(attack, threat_model=threat_model), images, labels, right)
            self.curve_withstood.setdefault(threat_model.eps, []).extend(withstands.tolist())

    def evaluate(self) -> dict:
        """In the first process::

            {"accuracy": {NAME: {"value", "low", "high", "images"}},
             "per_class": {CLASS: {"images": N, NAME: value}},
             "curve": {"attack": NAME, "images": N, "eps": [...], "value": [...]},
             "gradient_based": [NAME of each attack that follows the gradient alone],
             "findings": [signs of gradient masking]}

        Accuracies are in percent, with 95 % Wilson intervals.
        """
        parts = comm.gather((self.labels, self.withstood, self.curve_withstood))
        if not comm.is_main_process():
            return {}
        labels = [label for part, _, _ in parts for label in part]
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


def _joined(parts: Sequence[dict]) -> dict:
    return {key: [value for part in parts for value in part.get(key, ())] for key in parts[0]}


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


def eps_curve(threat_model: ThreatModel, dimensions: int) -> list[ThreatModel]:
    """From a quarter of eps on, each twice the one before, up to :func:`grey_eps`."""
    end = grey_eps(threat_model.norm, dimensions)
    eps, curve = (threat_model.eps or end / 64) / 4, []
    while eps < end:
        curve.append(replace(threat_model, eps=eps))
        eps *= 2
    return [*curve, replace(threat_model, eps=end)]


def findings(accuracy: dict, gradient_based: Sequence[str], curve: dict | None) -> list[str]:
    """Signs of gradient masking, which makes accuracies too high (Athalye et al. 2018, section 3.1).

    Args:
        accuracy, gradient_based, curve: as :meth:`RobustnessEvaluator.evaluate` gives them.
    """
    found = []
    if curve:
        last, eps = curve["value"][-1], curve["eps"][-1]
        if last > MAX_LEFT:
            found.append(
                f"accuracy under {curve['attack']} is {last:.1f} % at eps {eps:.4g}, which can turn every "
                "image grey: the attack is misled"
            )
        for i in range(1, len(curve["eps"])):
            if curve["value"][i] > min(curve["value"][:i]) + MAX_RISE:
                found.append(
                    f"accuracy under {curve['attack']} is higher at eps {curve['eps'][i]:.4g} than at a "
                    "smaller one"
                )
                break
    for name in _others(accuracy, gradient_based):
        missed = min(accuracy[other]["value"] for other in gradient_based) - accuracy[name]["value"]
        if missed > MAX_MISSED:
            found.append(
                f"accuracy under {name} is {missed:.1f} points lower than under the attacks by gradient"
            )
    return found


def _others(accuracy: dict, gradient_based: Sequence[str]) -> list[str]:
    """The attacks that those by gradient can be compared with."""
    if not gradient_based:
        return []
    return [name for name in accuracy if name not in ("clean", WORST_CASE, *gradient_based)]


def write_report(results: dict, folder: str) -> list[str]:
    """Write ``evaluation.json``, ``evaluation.md`` and ``eps_curve.png`` to ``folder``; gives their paths.

    Args:
        results: of :meth:`RobustnessEvaluator.evaluate`, plus "classifier" (one line), "threat_model"
            ({"norm", "eps"}), "classes" ({class: name}) and "versions".
    """
    contents = {"evaluation.json": json.dumps(results, indent=1).encode()}
    if "curve" in results:
        norm, eps = results["threat_model"]["norm"], results["threat_model"]["eps"]
        curve = results["curve"]
        label = f"{norm} eps" + (" (1/255)" if norm == "linf" else "")
        contents["eps_curve.png"] = accuracy_plot(curve["eps"], curve["value"], eps, label)
    contents["evaluation.md"] = markdown(results).encode()
    paths = []
    for name, content in contents.items():
        paths.append(os.path.join(folder, name))
        with replaced_atomically(paths[-1]) as temporary, open(temporary, "wb") as file:
            file.write(content)
    return paths


def markdown(results: dict) -> str:
    """The report in Markdown."""
    accuracy, threat_model = results["accuracy"], results["threat_model"]
    unit = "/255" if threat_model["norm"] == "linf" else ""
    lines = [
        f"# {results['classifier']}",
        "",
        f"Under {threat_model['norm']} eps {threat_model['eps']:g}{unit}.",
        "",
        "| attack | accuracy % | 95 % interval | images |",
        "|---|---:|---:|---:|",
    ]
    for name, row in accuracy.items():
        lines.append(
            f"| {name} | {row['value']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['images']} |"
        )
    lines += ["", "## Gradient masking", ""]
    if results["findings"]:
        lines += ["Gradients may be masked, and the accuracies too high:", ""]
        lines += [f"- {finding}" for finding in results["findings"]]
    elif "curve" in results:
        attack, last, eps = (results["curve"][key] for key in ("attack", "value", "eps"))
        lines.append(
            f"No sign of it: accuracy under {attack} falls to {last[-1]:.1f} % at eps {eps[-1]:.4g}, which "
            "can turn every image grey, and never rises with eps."
        )
        if others := _others(accuracy, results["gradient_based"]):
            names = ", ".join(others)
            lines.append(f"It is hardly lower under {names} than under the attacks by gradient.")
    else:
        lines.append("Not checked: there is no curve over eps.")
    if "curve" in results:
        curve = results["curve"]
        lines += ["", "![accuracy over eps](eps_curve.png)", "", "| eps | accuracy % |", "|---:|---:|"]
        lines += [
            f"| {eps:.4g} | {value:.2f} |" for eps, value in zip(curve["eps"], curve["value"], strict=True)
        ]
    lines += ["", "## Classes", "", f"| class | images | {' | '.join(accuracy)} |"]
    lines.append(f"|---|---:|{'---:|' * len(accuracy)}")
    for label, row in results["per_class"].items():
        values = " | ".join(f"{row[name]:.1f}" for name in accuracy)
        lines.append(f"| {results['classes'].get(label, label)} | {row['images']} | {values} |")
    lines += ["", "| package | version |", "|---|---|"]
    lines += [f"| {name} | {version} |" for name, version in results["versions"].items()]
    return "\n".join(lines) + "\n"


def evaluate_classifier(cfg, weights: str, attacks: Sequence[str], images: int) -> dict:
    """Evaluate the file ``weights`` on the recipe's test images; the report goes to train.output_dir.

    Args:
        cfg: the recipe; the attacks get its ``threat_model``.
        weights: a classifier that fits ``cfg.model``.
        attacks: names for :func:`rt_detectron.attacks.attack_named`.
        images: how many to use: every n-th of a folder, the first ones of shards.

    Returns:
        In the first process the content of evaluation.json, in the others {}.

    Raises:
        InputError: for unknown or repeated attacks, and weights that do not fit.
    """
    if images < 1:
        raise InputError(f"--images is {images}; it must be >= 1")
    threat_model = instantiate(cfg.threat_model)
    built = [attack_named(name.strip(), threat_model, cfg.train.seed) for name in attacks]
    if len({attack.name for attack in built}) < len(built):
        raise InputError(f"--attacks {','.join(attacks)}: give each attack once")
    model = build_model(cfg)
    load_weights(model.classifier, weights)
    lazy_loader = copy.deepcopy(cfg.dataloader.test)
    dataset = instantiate(lazy_loader.dataset)
    images = min(images, len(dataset))
    if isinstance(dataset, ShardDataset):
        lazy_loader.dataset = dataset
    else:
        lazy_loader.dataset = Subset(dataset, [i * len(dataset) // images for i in range(images)])
    evaluator = RobustnessEvaluator(model, built, PGD(threat_model, CURVE_STEPS), images)
    results = inference_on_dataset(model, instantiate(lazy_loader), evaluator)
    if not comm.is_main_process():
        return {}
    results |= {
        "classifier": f"{cfg.model.classifier.arch} of {os.path.basename(weights)}",
        "sha256": file_sha256(weights),
        "threat_model": {"norm": threat_model.norm, "eps": threat_model.eps},
        "classes": dict(enumerate(getattr(dataset, "classes", ()))),
        "versions": versions(),
    }
    for path in write_report(results, cfg.train.output_dir):
        logger.info("Wrote %s", path)
    return results
