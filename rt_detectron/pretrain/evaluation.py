"""Accuracy of a classifier on clean and attacked images, by Detectron2's evaluators, and its report."""

import copy
import json
import logging
import math
import os
import re
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

from rt_detectron.attacks import PGD, AutoAttack, ThreatModel
from rt_detectron.data.shards import ShardDataset
from rt_detectron.pretrain.strategies import Pretraining
from rt_detectron.pretrain.trainer import build_model, load_weights
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import file_sha256, replaced_atomically
from rt_detectron.utils.versions import versions
from rt_detectron.visualization.plots import accuracy_plot

logger = logging.getLogger(__name__)
CURVE_STEPS = 20  # of PGD
WORST_CASE = "worst case"  # an image counts if it withstands all attacks
MAX_LEFT = 1.0  # percent that may withstand an attack that could turn every image grey
MAX_RISE = 2.0  # percentage points by which a larger eps may leave more than a smaller one
MAX_MISSED = 5.0  # percentage points that the attacks by plain gradients may miss


class AccuracyEvaluator(DatasetEvaluator):
    """Top-1 accuracy on clean images and on images made by an attack, in percent.

    Args:
        model: what is evaluated.
        attack: what the robust accuracy is measured under.
        max_attacked: attack only that many images, the first ones (each process its share); None is all.
    """

    def __init__(self, model: Pretraining, attack: PGD, max_attacked: int | None = None):
        self.model = model
        self.attack = attack
        self.max_attacked = max_attacked
        self.reset()

    def reset(self):
        self.seen = self.correct = self.attacked = self.withstood = 0

    def process(self, inputs, outputs: torch.Tensor):
        """``inputs``: the batch; ``outputs``: the clean logits (N, num_classes)."""
        images, labels = self.model.to_device(inputs)
        self.seen += len(labels)
        self.correct += (outputs.argmax(1) == labels).sum().item()
        if self.max_attacked is not None:
            left = self.max_attacked // comm.get_world_size() - self.attacked
            images, labels = images[: max(left, 0)], labels[: max(left, 0)]
        if len(labels):
            adversarial = self.attack(self.model.target(), images, labels)
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


def write_report(results: dict, folder: str) -> list[str]:
    """Write ``evaluation.json``, ``evaluation.md`` and ``eps_curve.png`` to ``folder``; gives their paths.

    Args:
        results: of :meth:`RobustnessEvaluator.evaluate`, with "classifier" (what was evaluated, a line),
            "threat_model" ({"norm", "eps"}), "classes" ({class: name}) and "versions".
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
    """The same, to be read."""
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
    lines += ["", "## Can the numbers be trusted?", ""]
    if results["findings"]:
        lines += ["Gradients may be masked, and the numbers too good:", ""]
        lines += [f"- {finding}" for finding in results["findings"]]
    elif "curve" in results:
        attack, last, eps = (results["curve"][key] for key in ("attack", "value", "eps"))
        lines.append(
            f"No sign of masked gradients: accuracy under {attack} falls to {last[-1]:.1f} % at eps "
            f"{eps[-1]:.4g}, within which every image can be turned grey, and never rises on the way"
            + (", and AutoAttack finds little that PGD does not." if "autoattack" in accuracy else ".")
        )
    else:
        lines.append("Not looked into: there is no curve over eps.")
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


class RobustnessEvaluator(DatasetEvaluator):
    """Which images withstand which attack.

    Images that are misclassified as they are count as not withstanding, and are not attacked.

    Args:
        model: what is evaluated.
        attacks: each maps (model, images, labels) to images, and has a ``name``.
        curve: measured over eps, from a quarter of its own to :func:`grey_eps`; None for no curve.
        max_images: only so many images, the first ones (each process its share); None is all.
        curve_images: of those, so many for the curve.
    """

    def __init__(
        self,
        model: Pretraining,
        attacks: Sequence,
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
        images, labels = self.model.to_device(inputs)
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
            self._follow_curve(images[: max(left, 0)], labels[: max(left, 0)], right[: max(left, 0)])
        self.labels.extend(labels.tolist())

    def _with_progress(self, attacks: Sequence, images: int) -> tqdm:
        """A bar for the long time that a batch takes."""
        description = f"attacking images {len(self.labels)} to {len(self.labels) + images}"
        return tqdm(attacks, description, unit="attack", leave=False, disable=None)

    def _share(self, total: int | None) -> int:
        return sys.maxsize if total is None else math.ceil(total / comm.get_world_size())

    def _withstands(self, attack, images: Tensor, labels: Tensor, right: Tensor) -> Tensor:
        withstands = right.clone()
        if right.any():
            adversarial = attack(self.model.target(), images[right], labels[right])
            withstands[right] = self.model.classifier(adversarial).argmax(1) == labels[right]
        return withstands

    def _follow_curve(self, images: Tensor, labels: Tensor, right: Tensor) -> None:
        if not len(labels):
            return
        self.curve_withstood.setdefault(0.0, []).extend(right.tolist())
        threat_models = eps_curve(self.curve.threat_model, images[0].numel())
        for threat_model in self._with_progress(threat_models, len(labels)):
            withstands = self._withstands(
                replace(self.curve, threat_model=threat_model), images, labels, right
            )
            self.curve_withstood.setdefault(threat_model.eps, []).extend(withstands.tolist())

    def evaluate(self) -> dict:
        """In the first process::

            {"accuracy": {NAME: {"value", "low", "high", "images"}},
             "per_class": {CLASS: {"images": N, NAME: value}},
             "curve": {"attack": NAME, "images": N, "eps": [...], "value": [...]},
             "findings": [what speaks against trusting the numbers]}

        Accuracies are in percent, with 95 % Wilson intervals.
        """
        parts = comm.gather((self.labels, self.withstood, self.curve_withstood))
        if not comm.is_main_process():
            return {}
        labels = [label for part, _, _ in parts for label in part]
        withstood = _joined([part for _, part, _ in parts])
        curve = _joined([part for _, _, part in parts])
        accuracy = {name: _accuracy(values) for name, values in withstood.items()}
        per_class = {}
        for label in sorted(set(labels)):
            members = [i for i, other in enumerate(labels) if other == label]
            per_class[label] = {"images": len(members)}
            for name, values in withstood.items():
                per_class[label][name] = 100 * sum(values[i] for i in members) / len(members)
        results = {"accuracy": accuracy, "per_class": per_class}
        if curve:
            results["curve"] = {
                "attack": self.curve.name,
                "images": len(curve[0.0]),
                "eps": list(curve),
                "value": [_accuracy(values)["value"] for values in curve.values()],
            }
        return results | {"findings": findings(accuracy, results.get("curve"))}


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
    """The 95 % interval of a share (Wilson 1927), also right for shares close to 0 and 1."""
    z = 1.959964
    center = successes + z**2 / 2
    spread = z * math.sqrt(successes * (trials - successes) / trials + z**2 / 4)
    return max((center - spread) / (trials + z**2), 0.0), min((center + spread) / (trials + z**2), 1.0)


def grey_eps(norm: str, dimensions: int) -> float:
    """The eps within which every image in [0, 1] can be turned into the same grey one.

    No classifier withstands that; an attack that does not find it is fooled by its gradients.
    """
    return {"linf": 255 / 2, "l2": math.sqrt(dimensions) / 2, "l1": dimensions / 2}[norm]


def eps_curve(threat_model: ThreatModel, dimensions: int) -> list[ThreatModel]:
    """A quarter of eps, twice that and so on, and at the end :func:`grey_eps`."""
    end = grey_eps(threat_model.norm, dimensions)
    eps, curve = (threat_model.eps or end / 64) / 4, []
    while eps < end:
        curve.append(replace(threat_model, eps=eps))
        eps *= 2
    return [*curve, replace(threat_model, eps=end)]


def findings(accuracy: dict, curve: dict | None) -> list[str]:
    """What speaks for masked gradients (Athalye et al. 2018, section 3.1), that is for numbers too good."""
    found = []
    if curve:
        last, eps = curve["value"][-1], curve["eps"][-1]
        if last > MAX_LEFT:
            found.append(
                f"{last:.1f} % withstand {curve['attack']} at eps {eps:.4g}, which can turn every image "
                "grey: the attack is misled"
            )
        for i in range(1, len(curve["eps"])):
            if curve["value"][i] > min(curve["value"][:i]) + MAX_RISE:
                found.append(
                    f"more withstand {curve['attack']} at eps {curve['eps'][i]:.4g} than at a smaller one"
                )
                break
    by_gradients = [value["value"] for name, value in accuracy.items() if name.startswith("pgd")]
    if by_gradients and "autoattack" in accuracy:
        missed = min(by_gradients) - accuracy["autoattack"]["value"]
        if missed > MAX_MISSED:
            found.append(f"AutoAttack turns {missed:.1f} % of the images over that PGD does not")
    return found


def attack_named(name: str, threat_model: ThreatModel, seed: int = 0):
    """The attack that "pgd20" (20 steps), "pgd100x5" (and 5 restarts) or "autoattack" stands for."""
    if name == AutoAttack.name:
        return AutoAttack(threat_model, seed)
    match = re.fullmatch(r"pgd(\d+)(?:x(\d+))?", name)
    if not match:
        raise InputError(f"attack {name!r} is unknown; use e.g. pgd20, pgd100x5 (5 restarts) or autoattack")
    steps, restarts = int(match[1]), int(match[2] or 1)
    return PGD(threat_model, steps, random_start=restarts > 1, restarts=restarts)


def evaluate_classifier(cfg, weights: str, attacks: Sequence[str], images: int) -> dict:
    """Evaluate the file ``weights`` on the recipe's test images and write a report to its output folder.

    Args:
        cfg: the recipe; its ``threat_model`` is what the attacks may do.
        weights: a classifier that fits ``cfg.model``.
        attacks: names for :func:`attack_named`.
        images: how many to use, of a folder every n-th, of shards the first ones.

    Returns:
        In the first process the content of evaluation.json.
    """
    if images < 1:
        raise InputError(f"--images is {images}; it must be >= 1")
    threat_model = instantiate(cfg.threat_model)
    built = [attack_named(name.strip(), threat_model, cfg.train.seed) for name in attacks]
    if len({attack.name for attack in built}) < len(built):
        raise InputError(f"--attacks {','.join(attacks)}: one is there twice")
    model = build_model(cfg)
    load_weights(model, weights)
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
