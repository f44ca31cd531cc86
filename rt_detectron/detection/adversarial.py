"""Adversarial training of a detector, by "free" replays or PGD, and its evaluation under attack."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.evaluation import print_csv_format
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rt_detectron.attacks import PGD, DetectorAttack, LossAttack, ThreatModel, build_detector_attack, free
from rt_detectron.attacks.box_head import clip_proposal_losses
from rt_detectron.attacks.pgd import HALF_PRECISION_SCALE
from rt_detectron.attacks.schedule import EpsSchedule
from rt_detectron.detection.loader import ChangedBatches, batches_from
from rt_detectron.evaluation.robustness.measurement import Metrics
from rt_detectron.evaluation.robustness.test_set import DetectionTestSet
from rt_detectron.utils.errors import InputError, did_you_mean

ATTACKED = "_attacked"  # behind the names of tasks in results
EVALUATED_WITH = "A_cls"  # the strongest single objective on trained detectors
EVALUATION_STEPS = 10
# What replays can follow: sums of some losses of a training step.
REPLAYED = ("all", "classification", "localization", "mask", "A_cls", "A_reg", "A_box")


@dataclass(frozen=True)
class AdversarialTraining:
    """What SOLVER.ADVERSARIAL says, or ``train.adversarial`` of a LazyConfig: see :mod:`rt_detectron.config`.

    Raises:
        InputError: for a value that makes no sense, naming its key.
    """

    replays: int = 0
    steps: int = 0
    norm: str = "l2"
    eps: float = 0.5
    step_size: float = 0.0
    start: str = "random"
    loss: str = "all"
    clip: float = 0.0
    carry_over: bool = False
    clean: float = 0.0
    warmup: float = 0.0
    count_batches: bool = False
    eval_images: int = 0

    @classmethod
    def from_keys(cls, keys: dict[str, Any]) -> "AdversarialTraining":
        """From the keys of a config, in upper or lower case."""
        given = {name.lower(): value for name, value in keys.items()}
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                hint = did_you_mean(name, known)
                raise InputError(f"adversarial training: there is no key {name}{hint}")
        return cls(**given)

    def __post_init__(self):
        for name in ("replays", "steps", "eval_images"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise _refusal(f"{name.upper()} is {value!r}; it must be a whole number >= 0")
        for name in ("step_size", "clip"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < float("inf"):
                raise _refusal(f"{name.upper()} is {value!r}; it must be a number >= 0")
        if self.replays and self.steps:
            raise _refusal("REPLAYS and STEPS are two methods: set one of them to 0")
        if self.norm not in ("l2", "linf"):
            raise _refusal(f"NORM is {self.norm!r}; it must be l2 or linf")
        if self.start not in ("image", "random"):
            raise _refusal(f"START is {self.start!r}; it must be 'image' or 'random'")
        if self.replays and self.step_size:
            raise _refusal("replays take steps of EPS: leave STEP_SIZE at 0")
        if not self.replays and (self.carry_over or self.count_batches):
            raise _refusal("CARRY_OVER and COUNT_BATCHES are for REPLAYS")
        attack, _ = self.attack, self.schedule  # which refuse an unknown loss and shares that are none
        if attack.needs_object_counts or attack.needs_pixel_counts:
            instead = "A_box" if attack.needs_object_counts else "all"
            raise _refusal(f"LOSS {self.loss} is for evaluation; take {instead}")
        if not self.replays and not self.steps:
            for name in ("loss", "step_size", "clean", "warmup"):
                if getattr(self, name) != getattr(type(self), name):  # the default
                    raise _refusal(f"{name.upper()} is for an attack: set STEPS or REPLAYS")
        if self.replays and self.start == "image":
            raise _refusal("START is for STEPS; replays begin at the image, or where CARRY_OVER has them")
        if self.replays and self.loss not in REPLAYED:
            raise _refusal(f"LOSS {self.loss} is for STEPS; with REPLAYS take one of {', '.join(REPLAYED)}")

    @property
    def threat_model(self) -> ThreatModel:
        return ThreatModel(self.norm, self.eps)

    @property
    def schedule(self) -> EpsSchedule:
        return EpsSchedule(self.clean, self.warmup)

    @property
    def attack(self) -> DetectorAttack:
        """PGD on LOSS."""
        steps = max(self.steps, 1)
        size = self.step_size * steps / self.eps if self.step_size and self.eps else 2.5
        pgd = PGD(self.threat_model, steps, size, random_start=self.start == "random")
        return build_detector_attack(self.loss, pgd)

    @property
    def evaluation_attack(self) -> DetectorAttack:
        return build_detector_attack(EVALUATED_WITH, PGD(self.threat_model, EVALUATION_STEPS), clip=self.clip)

    @property
    def iterations(self) -> int:
        """Iterations for each one in the config."""
        return self.replays if self.count_batches else 1

    def batches(self, loader: Iterable, detector: nn.Module, max_iter: int, amp: bool = False) -> Iterable:
        """``loader`` with images that move against ``detector``, which trains on them; itself without attack.

        CLIP is also set in the detector. Copies of the detector, such as its average, are made before.

        Args:
            detector: on its device, without DistributedDataParallel.
            max_iter: iterations of the training, which the schedule refers to.
            amp: attack in mixed precision.
        """
        if self.clip:
            clip_proposal_losses(detector, self.clip)

        def strength(iteration: int) -> float:
            return self.schedule(iteration / max_iter)

        attack = self.attack
        if self.replays:
            gradients = None
            if isinstance(attack, LossAttack) and self.loss != "all":
                gradients = LossGradients(detector, attack)
            device = str(next(detector.parameters()).device)
            return FreeReplays(
                loader,
                self.threat_model,
                self.replays,
                device,
                carry_over=self.carry_over,
                strength=strength,
                gradients=gradients,
            )
        if self.steps:
            return AttackedBatches(loader, detector, attack, strength, amp)
        return loader


class EvaluationUnderAttack:
    """AP of a detector under the attack on some images of a test set.

    Args:
        images: read with their objects.
        settings: EVAL_IMAGES of them, evenly spread, are attacked.

    Raises:
        InputError: if the test set's evaluator cannot score a part of it.
    """

    def __init__(self, images: DetectionTestSet, settings: AdversarialTraining):
        try:
            self.images = images.spread(settings.eval_images)
        except InputError:
            name = type(images.evaluator).__name__
            raise _refusal(f"{name} only scores whole test sets: set EVAL_IMAGES to 0") from None
        self.attack = settings.evaluation_attack

    def __call__(self, model: nn.Module, clean: Metrics) -> Metrics:
        """The metrics, as "bbox_attacked" and so on, printed; {} in all processes but the first.

        Args:
            clean: metrics without an attack.
        """
        found = self.images.evaluate(model, "attacked", perturb=self.attack.perturb, clean=clean)
        results = {f"{task}{ATTACKED}": metrics for task, metrics in found.items()}
        if comm.is_main_process():
            print_csv_format(results)
        return results


def _refusal(text: str) -> InputError:
    return InputError(f"adversarial training: {text}")


class LossGradients:
    """The gradient of some of a detector's losses with respect to what the images were moved by.

    Taken after the forward pass of a training step, whose own gradient is that of all losses. It costs a
    backward pass to the images.

    Args:
        detector: in training mode it gives its losses by name.
        attack: its ``objective`` chooses among them.
    """

    def __init__(self, detector: nn.Module, attack: LossAttack):
        self.attack = attack
        self.perturbations: list[Tensor] = []
        self.found: list[Tensor | None] = []
        detector.register_forward_hook(self._after_forward)

    def begin(self, perturbations: list[Tensor]) -> None:
        """What the images of the next step are moved by."""
        self.perturbations, self.found = perturbations, [None] * len(perturbations)

    def _after_forward(self, detector: nn.Module, inputs: tuple, losses) -> None:
        if not (detector.training and torch.is_grad_enabled() and self.perturbations):
            return
        scale = HALF_PRECISION_SCALE if torch.is_autocast_enabled() else 1.0
        objective = scale * self.attack.objective(losses)
        grads = torch.autograd.grad(objective, self.perturbations, retain_graph=True, allow_unused=True)
        # A step may have several forward passes, with some of the images each.
        self.found = [grad if last is None else last for grad, last in zip(grads, self.found, strict=True)]


class FreeReplays(ChangedBatches):
    """A training loader that repeats each batch on perturbed images ("free" adversarial training).

    Each batch comes ``replays`` times in a row: first clean, then moved by a step of eps along the gradient
    that the previous training step left on its images, and so on (Shafahi et al. 2019, algorithm 1). The
    images stay within the ball of ``threat_model`` and within 0..255. So the attack costs no pass of its
    own; the same number of iterations covers ``replays`` times fewer batches.

    The perturbed images are float (3, H, W) in 0..255, after resizing and before padding, so the padding is
    not perturbed. The consumer must run backward before it asks for the next batch, as Detectron2's trainers
    do.

    Args:
        loader: gives lists of dicts with an "image", uint8 (3, H, W).
        threat_model: "l2" or "linf", for one image in [0, 1] after resizing.
        replays: training steps on each batch.
        device: where perturbations are kept; on the model's own device they need no copy.
        carry_over: an image begins with the perturbation of the image in its place of the last batch,
            interpolated to its size, instead of clean (Li et al., TIFS 2025).
        strength: the factor of eps at an iteration.
        gradients: whose gradient is followed; None for that of the training step.
    """

    def __init__(
        self,
        loader: Iterable,
        threat_model: ThreatModel,
        replays: int,
        device: str = "cpu",
        carry_over: bool = False,
        strength: Callable[[int], float] = lambda iteration: 1.0,
        gradients: LossGradients | None = None,
    ):
        super().__init__(loader)
        self.threat_model = threat_model
        self.replays = replays
        self.device = device
        self.carry_over = carry_over
        self.strength = strength
        self.gradients = gradients
        self._current: list[Tensor] = []  # the perturbations of the batch in use
        self._left = 0  # how often that batch still comes
        self._restored: list[Tensor] = []
        self._iteration = 0

    def batches(self, start: int = 0) -> Iterator[list[dict]]:
        number, skipped = divmod(start, self.replays)
        if not hasattr(self.loader, "batches"):
            skipped, self._restored = 0, []
        moved, self._restored = [image.to(self.device) for image in self._restored], []
        self._iteration = start
        for batch in batches_from(self.loader, number):
            images = [inputs["image"].to(self.device, torch.float32, non_blocking=True) for inputs in batch]
            if skipped and [each.shape for each in moved] != [each.shape for each in images]:
                moved = []  # of a batch of another size, before the training was resumed
            if not (skipped and moved):
                moved = self._first(images, moved)
            for left in reversed(range(self.replays - skipped)):
                for perturbation in moved:
                    perturbation.requires_grad_(True)
                self._current, self._left = moved, left
                if self.gradients is not None:
                    self.gradients.begin(moved)
                yield [
                    {**inputs, "image": free.perturbed(image, 255 * perturbation, white=255)}
                    for inputs, image, perturbation in zip(batch, images, moved, strict=True)
                ]
                moved = self._next()
                self._iteration += 1
            skipped = 0

    def state_of_process(self) -> dict:
        """The perturbations that come next; none if the next batch begins clean."""
        goes_on = self._left or self.carry_over
        return {"moved_images": [moved.detach().cpu() for moved in self._next()] if goes_on else []}

    def load_state_of_process(self, states: list[dict]) -> None:
        if all("moved_images" in state for state in states):
            # Process r of w has the images [r::w] of a batch.
            rows = zip(*(state["moved_images"] for state in states), strict=True)
            whole = [image for row in rows for image in row]
            self._restored = whole[comm.get_rank() :: comm.get_world_size()]

    def _first(self, images: list[Tensor], last: list[Tensor]) -> list[Tensor]:
        """The perturbations that a batch begins with."""
        if not self.carry_over or len(last) != len(images):
            return [torch.zeros_like(image) for image in images]
        ball = self._ball(self._iteration)
        resized = [
            F.interpolate(moved[None], image.shape[-2:])  # to the nearest: a mean would make it smaller
            for image, moved in zip(images, last, strict=True)
        ]
        return [ball.project(moved)[0] for moved in resized]  # a larger L2 perturbation would leave the ball

    def _ball(self, iteration: int) -> ThreatModel:
        return replace(self.threat_model, scale=self.strength(iteration))

    def _next(self) -> list[Tensor]:
        """The perturbations after the step on the present ones."""
        ball = self._ball(self._iteration + 1)
        grads = [moved.grad for moved in self._current] if self.gradients is None else self.gradients.found
        # There is no gradient if there was nothing to learn from an image.
        return [
            free.moved(moved[None], None if grad is None else grad[None], ball)[0]
            for moved, grad in zip(self._current, grads, strict=True)
        ]


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


class AttackedBatches(ChangedBatches):
    """A training loader whose images are attacked, on the detector as it is when they are asked for.

    The attack sees the detector in eval mode, whatever it trains in. (Madry et al. 2018; with the attack
    "MTD" as Zhang & Wang 2019 train detectors.)

    Args:
        loader: gives lists of dicts with an "image", uint8 (3, H, W), and "instances".
        detector: that trains on them, on its device.
        attack: its seed is replaced, so that each iteration has its own random starts.
        strength: the factor of eps at an iteration; at 0 the images stay as they are.
        amp: attack in mixed precision.
    """

    def __init__(
        self,
        loader: Iterable,
        detector: nn.Module,
        attack: DetectorAttack,
        strength: Callable[[int], float] = lambda iteration: 1.0,
        amp: bool = False,
    ):
        super().__init__(loader)
        self.detector = detector
        self.attack = attack
        self.strength = strength
        self.amp = amp
        self._restored: dict[str, Tensor] = {}

    def batches(self, start: int = 0) -> Iterator[list[dict]]:
        buffers, restored = dict(self.detector.named_buffers()), self._restored
        for name in restored.keys() & buffers.keys():
            buffers[name].copy_(restored[name])
        self._restored = {}
        seed = self.state_dict().get("seed", 0)  # that of the images' order, the same in all processes
        for iteration, batch in enumerate(batches_from(self.loader, start), start):
            scale = self.strength(iteration)
            yield self._attacked(batch, scale, seed + iteration) if scale else batch

    def state_of_process(self) -> dict:
        """The running statistics of the detector's batch norms, which differ between processes.

        A checkpoint has those of the first process only.
        """
        if comm.get_world_size() == 1:
            return {}
        names = [name for name, module in self.detector.named_modules() if _has_statistics(module)]
        buffers = dict(self.detector.named_buffers())
        parts = [f"{name}.{part}" for name in names for part in ("running_mean", "running_var")]
        return {"statistics": {part: buffers[part].detach().cpu() for part in parts}}

    def load_state_of_process(self, states: list[dict]) -> None:
        """The statistics are set with the first batch, once all processes have the first one's buffers."""
        self._restored = states[comm.get_rank() % len(states)].get("statistics", {})

    def _attacked(self, batch: list[dict], scale: float, seed: int) -> list[dict]:
        pgd = self.attack.pgd
        ball = replace(pgd.threat_model, scale=scale)
        attack = replace(self.attack, pgd=replace(pgd, threat_model=ball), seed=seed, amp=self.amp)
        return attack.perturb(self.detector, batch)
