"""Pretraining on Detectron2's engine: its trainers, hooks, checkpointer and writers."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.engine import HookBase, create_ddp_model
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from rt_detectron.checkpoint.checkpointer import TrainingCheckpointer, has_checkpoint
from rt_detectron.data.images import check_same_classes
from rt_detectron.data.loader import TrainLoader, check_batch
from rt_detectron.engine.base_trainer import BaseTrainer, LossesOnTheWay
from rt_detectron.engine.lazy_config import build
from rt_detectron.engine.loop import build_optimizer, refuse_other_training, run
from rt_detectron.engine.processes import share_buffers, share_state
from rt_detectron.engine.train_hooks import ExponentialMovingAverage
from rt_detectron.layers.small_maps import use_small_maps
from rt_detectron.layers.sync_bn import use_sync_bn
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.modeling.load import load_weights
from rt_detectron.pretrain.export import Provenance, export
from rt_detectron.pretrain.model import Pretraining, check_takes
from rt_detectron.pretrain.strategies import Free, Standard
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import printable
from rt_detectron.utils.ranges import images_are_checked
from rt_detectron.utils.seeds import torch_seed

logger = logging.getLogger(__name__)

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(cfg) -> Pretraining:
    """The model of ``cfg.model`` on ``cfg.train.device``, ready for training and evaluation."""
    model = build(cfg.model, "model")
    model.classifier = for_training(model.classifier, cfg.train)
    model.to(cfg.train.device)
    if backend := cfg.train.get("compile"):
        if not model.strategy.compilable:
            name = type(model.strategy).__name__
            raise InputError(f"train.compile: strategy {name} looks into the network; set train.compile=null")
        model.compile_networks(backend)
    return model


def for_training(classifier: Classifier, train) -> Classifier:
    """``classifier`` as ``train.device`` and ``train.sync_bn`` say; its state dict stays the same."""
    if train.sync_bn:
        classifier = use_sync_bn(classifier, train.device)
    if not train.get("compile"):  # which brings kernels of its own
        use_small_maps(classifier, train.device)
    return classifier


def do_train(cfg, resume: bool = False) -> None:
    """Train as ``cfg`` says, evaluate, and export to ``cfg.train.output_dir``.

    Args:
        cfg: a LazyConfig with ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier``, ``evaluator``
            and ``train``; configs/pretrain/common/train.py explains the keys of the last.
        resume: go on from the last checkpoint of the output folder, where there is one.

    Raises:
        InputError: for a folder that holds another training, and if the training diverges.
    """
    refuse_other_training(cfg.train.output_dir, resume)
    model = build_model(cfg)
    loader = build(cfg.dataloader.train, "dataloader.train")
    test = build(cfg.dataloader.test.dataset, "dataloader.test.dataset")
    check_same_classes(loader.dataset, test)
    check_takes(model.classifier, loader.dataset, model.resolution)
    check_takes(model.classifier, test)
    resume = resume and has_checkpoint(cfg.train.output_dir)
    start(model, cfg.train.init_checkpoint, resume)

    def finish(evaluated: Pretraining, results: dict) -> None:
        for path in export(cfg, evaluated, results):
            logger.info("Wrote %s", printable(path))

    train_classifier(
        cfg, model, loader, evaluate=lambda evaluated: do_eval(cfg, evaluated), finish=finish, resume=resume
    )


def start(model: Pretraining, init_checkpoint: str, resume: bool) -> None:
    """Load the weights that the training starts from, if any, and show them to the strategy.

    In all processes those of the first one: another machine's copy of the file may be old. A resumed training
    takes them from its checkpoint.

    Raises:
        InputError: as :func:`rt_detectron.modeling.load.load_weights`, and if the strategy needs weights.
    """
    has_head = True
    if init_checkpoint and not resume:
        has_head = load_weights(model.classifier, init_checkpoint, fresh_head=True)
    elif model.strategy.needs_weights and not resume:
        name = type(model.strategy).__name__
        raise InputError(f"strategy {name} keeps a network's features: set train.init_checkpoint to its file")
    share_state(model.classifier)
    model.strategy.begin(model.classifier, has_head)


def train_classifier(
    cfg,
    model: Pretraining,
    loader: TrainLoader,
    evaluate: Callable[[Pretraining], dict],
    finish: Callable[[Pretraining, dict], None],
    resume: bool = False,
) -> None:
    """Train ``model`` on ``loader`` as ``optimizer``, ``lr_multiplier`` and ``train`` of ``cfg`` say.

    Args:
        cfg: a LazyConfig with these three.
        model: what is trained.
        loader: of the images.
        evaluate: gives Detectron2's evaluation results for a model: ``model`` or its average (``train.ema``).
        finish: called once at the end, in the first process, with that model and its last results.
        resume: go on from the last checkpoint of ``cfg.train.output_dir``, where there is one.

    Raises:
        InputError: if the training diverges.
    """
    train = cfg.train
    trainer = ClassifierTrainer(
        model, loader, build_optimizer(cfg, model), train.accumulate, train.amp, train.sync_bn
    )
    if train.get("attack_amp"):
        _use_attack_amp(train.attack_amp, model)
    parts = {"trainer": trainer, "rt_detectron": Provenance(model)}
    if hasattr(model.strategy, "state_dict"):
        parts["strategy"] = model.strategy
    evaluated, average = model, None
    if train.ema:
        average = ExponentialMovingAverage(model.classifier, train.ema)
        parts["ema"] = average.averaged
        evaluated = Pretraining(average.averaged.module, model.strategy)
    epoch = loader.iterations_per_epoch * trainer.replays
    logger.info(
        "%g epochs of %d iterations on %d images; output in %s",
        train.epochs, epoch, len(loader.dataset), train.output_dir,
    )  # fmt: skip
    with _compiling(train.get("compile")):
        run(
            cfg,
            trainer,
            TrainingCheckpointer(model.classifier, train.output_dir, **parts),
            epoch,
            evaluate=lambda: evaluate(evaluated),
            finish=lambda results: finish(evaluated, results),
            resume=resume,
            first_hooks=(StepState(model, train.seed), average),
        )


@contextmanager
def _compiling(backend: str | None) -> Iterator[None]:
    """Within this, what torch.compile cannot do, for want of a compiler, say, is one line."""
    try:
        yield
    except Exception as error:
        if not (backend and type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))):
            raise
        reason = one_line(error)[:200]
        raise InputError(f"train.compile={backend} fails here ({reason}); set train.compile=null") from None


def do_eval(cfg, model: Pretraining) -> dict:
    """Clean and robust accuracy of ``model`` on ``cfg.dataloader.test``, printed and returned.

    Nothing, {}, for a network whose last layer is not trained.
    """
    if not model.strategy.has_head:
        logger.info("The last layer is not trained, so there is no accuracy to evaluate.")
        return {}
    lazy_evaluator = copy.deepcopy(cfg.evaluator)
    lazy_evaluator.model = model
    return evaluate(model, build(cfg.dataloader.test, "dataloader.test"), build(lazy_evaluator, "evaluator"))


def evaluate(model: Pretraining, loader: DataLoader, evaluator: DatasetEvaluator) -> dict:
    """The results of ``evaluator`` for ``model`` on the images of ``loader``, printed and returned."""
    share_buffers(model)
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _use_attack_amp(attack_amp: str, model: Pretraining) -> None:
    """Have attacks computed in half precision, with a warning where that saves no time."""
    model.attack_dtype = AMP[attack_amp]
    strategy = model.strategy
    # Older versions of torch do not say.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    emulated = known.get("architecture") == "x86_64" and not (known["avx512_bf16"] or known["amx_bf16"])
    if isinstance(strategy, Free) or type(strategy).perturb is Standard.perturb:
        reason = f"{type(strategy).__name__} needs no passes for an attack"
    elif model.device.type == "cpu" and emulated:
        reason = "this CPU has no bfloat16 instructions"
    else:
        return
    logger.warning("train.attack_amp=%s saves no time: %s", attack_amp, reason)


class ClassifierTrainer(BaseTrainer):
    """Detectron2's trainer with gradient accumulation, mixed precision and asynchronous checks of the loss.

    With several processes, each step starts from the BN statistics of the first process, so only those are
    part of the training's state.

    Args:
        model: what is trained.
        loader: of this process's batches. Each is used for ``model.strategy.replays`` steps in a row.
        optimizer: over the parameters of ``model``.
        accumulate: number of equal parts of a batch whose gradients are summed for one optimiser step, as if
            each part had its own process. BN sees one part at a time.
        amp: "bf16", "fp16" (with gradient scaling) or None.
        sync_bn: whether batch norm is synchronised over all processes.
    """

    _data_loader_iter_obj: Iterator | None
    diverged = "the loss is not finite around iteration {}; log.txt names the images"

    def __init__(
        self,
        model: Pretraining,
        loader: TrainLoader,
        optimizer: torch.optim.Optimizer,
        accumulate: int = 1,
        amp: str | None = None,
        sync_bn: bool = False,
    ):
        # device_ids=None: the model's own device, CPU or this process's GPU.
        wrapped = create_ddp_model(model, device_ids=None, broadcast_buffers=not sync_bn)
        super().__init__(wrapped, loader, optimizer)
        self.strategy = model.strategy
        self.replays = model.strategy.replays
        if accumulate > 1 and self.replays > 1:
            strategy = type(model.strategy).__name__
            raise InputError(f"train.accumulate: strategy {strategy} needs each step's gradient; set it to 1")
        images = loader.batch_size
        if images % accumulate:
            raise InputError(
                f"train.accumulate={accumulate} does not divide the {images} images of a process"
            )
        self.accumulate = accumulate
        self.device = model.device
        self.amp = AMP[amp] if amp else None
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self._on_the_way = LossesOnTheWay()
        self._diverged = False

    @property
    def _data_loader_iter(self) -> Iterator:
        if self._data_loader_iter_obj is None:
            self._data_loader_iter_obj = self._replayed(self.start_iter)
        return self._data_loader_iter_obj

    def _replayed(self, start: int) -> Iterator:
        skip = start % self.replays
        for images, labels, keys in self.data_loader.batches(start // self.replays):
            check_batch(images)
            images = images.to(self.device, non_blocking=True)  # whole: parts of it are not in pinned memory
            for _ in range(self.replays - skip):
                yield images, labels, keys
            skip = 0

    def after_train(self):
        self._data_loader_iter_obj = None  # ends the loader's workers
        super().after_train()

    def run_step(self):
        start = time.perf_counter()
        images, labels, keys = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses: dict[str, Tensor] = {}
        for part in range(self.accumulate):
            chunk = (images[part :: self.accumulate], labels[part :: self.accumulate])
            is_last = part == self.accumulate - 1
            with self._without_reduction() if not is_last else nullcontext():
                autocast = torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)
                with autocast, images_are_checked():
                    part_losses = self.model(chunk)
                part_losses = {name: loss / self.accumulate for name, loss in part_losses.items()}
                self.grad_scaler.scale(sum(part_losses.values())).backward()
            for name, loss in part_losses.items():
                losses[name] = losses.get(name, 0) + loss.detach()
        self.after_backward()
        self._on_the_way.add(sum(losses.values()), self.iter, keys)
        if (self.iter + 1) % self.gather_metric_period == 0:
            self.has_diverged(wait=True)  # names the images, in the process that has them
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _without_reduction(self):
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def has_diverged(self, wait: bool = False) -> bool:
        """Whether a loss of this process was not finite; logs the images of the first such batch.

        Args:
            wait: wait for losses that a GPU has not computed yet; without it they are left to the next call.
        """
        for loss, iteration, keys in self._on_the_way.arrived(wait):
            if not self._diverged and not torch.isfinite(loss):
                self._diverged = True
                logger.error("Loss %s at iteration %d on %s", loss.item(), iteration, ", ".join(keys))
        return self._diverged

    def state_of_process(self) -> dict:
        return self.strategy.state_of_process()

    def load_state_of_process(self, states: list[dict]) -> None:
        self.strategy.load_state_of_process(states)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        if state["grad_scaler"]:  # empty without fp16
            self.grad_scaler.load_state_dict(state["grad_scaler"])


class StepState(HookBase):
    """Sets what a step depends on besides weights and batch: the progress and the random seed.

    The random numbers of a step depend on the training's seed, the iteration and the process only, so a
    resumed training draws the same ones as an uninterrupted one.
    """

    def __init__(self, model: Pretraining, seed: int):
        self.model = model
        self.seed = seed

    def before_step(self):
        iteration = self.trainer.iter
        self.model.progress = iteration / self.trainer.max_iter
        torch.manual_seed(torch_seed(self.seed, iteration, comm.get_rank()))
