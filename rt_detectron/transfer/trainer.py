"""Transfer of a pretrained classifier to another data set, on Detectron2's engine."""

import json
import logging
import os
import time
from collections.abc import Callable

import torch
from detectron2.evaluation import print_csv_format
from detectron2.utils import comm
from torch import nn

from rt_detectron.checkpoint.checkpointer import TrainingCheckpointer
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.data.loader import TrainLoader, build_test_loader
from rt_detectron.engine.lazy_config import build, lazy_config_sha256
from rt_detectron.engine.loop import build_optimizer, refuse_other_training, run
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.modeling.load import load_classifier
from rt_detectron.pretrain.export import write_classifier
from rt_detectron.pretrain.model import Pretraining, check_takes
from rt_detectron.pretrain.strategies import Standard
from rt_detectron.pretrain.trainer import AMP, evaluate, for_training, train_classifier
from rt_detectron.transfer.datasets import ClassificationDataset, classification_dataset
from rt_detectron.transfer.evaluation import TransferEvaluator, predictions_file
from rt_detectron.transfer.features import Features, compute_features
from rt_detectron.transfer.head import HeadTrainer, fit_logistic_regression, fresh_linear
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import printable, write_json
from rt_detectron.utils.numbers import finite
from rt_detectron.utils.versions import versions

logger = logging.getLogger(__name__)

# Called once, in the first process, with the whole network, the evaluation's results, the number of
# iterations, and further entries for results.json.
Finish = Callable[..., None]


def is_finished(cfg, resume: bool) -> bool:
    """Whether the output folder already holds the results of this transfer.

    Raises:
        InputError: if it holds those of another configuration, or any and ``resume`` is False.
    """
    folder = cfg.train.output_dir
    try:
        with open(os.path.join(folder, "results.json")) as file:
            known = json.load(file)["config_sha256"]
    except FileNotFoundError:
        refuse_other_training(folder, resume)
        return False
    except (ValueError, KeyError, TypeError):
        known = None
    if not resume:
        raise InputError(
            f"{folder} holds results: add --resume to keep them, or choose another train.output_dir"
        )
    if known != lazy_config_sha256(cfg):
        raise InputError(
            f"{folder} holds the results of another configuration: choose another train.output_dir"
        )
    return True


def do_transfer(cfg, resume: bool = False) -> None:
    """Transfer as ``cfg`` says and write ``results.json`` to ``cfg.train.output_dir``.

    Args:
        cfg: a LazyConfig; configs/transfer/common/transfer.py explains its keys.
        resume: go on from the last checkpoint of the output folder, if there is one. Call
            :func:`is_finished` first: it refuses the folder of another training.

    Raises:
        InputError: for weights and data sets that cannot be used, and if the training diverges.
    """
    start = time.perf_counter()
    train, test = build_datasets(cfg)
    classifier = load_classifier(str(cfg.transfer.weights), cfg.transfer.arch, len(train.classes))
    fresh_linear(classifier.network.get_submodule(classifier.last_linear), cfg.train.seed)
    classifier.to(cfg.train.device)
    for dataset in (train, test):
        check_takes(classifier, dataset)

    def finish(model: Pretraining, results: dict, iterations: int, **more) -> None:
        if cfg.train.export:
            path = os.path.join(cfg.train.output_dir, "classifier.pth")
            write_classifier(model, path, f"transfer of {cfg.transfer.weights} to {train.name}")
        path = _write_results(cfg, classifier.metadata, test, results, iterations, start, more)
        logger.info("Wrote %s", printable(path))

    methods = {"fixed_feature": fixed_feature, "last_layer": last_layer, "full_network": full_network}
    methods[cfg.transfer.method](cfg, classifier, train, test, finish, resume)


def build_datasets(cfg) -> tuple[ClassificationDataset, ClassificationDataset]:
    """The training and test sets; both have the test transform, unless there is one for training."""
    spec = cfg.dataset
    transforms = spec.get("train_transform", spec.test_transform), spec.test_transform
    splits = ("fit", "held_out") if spec.held_out else ("train", "test")
    train, test = (
        classification_dataset(
            spec.name,
            split,
            spec.root,
            spec.download,
            build(transform, "the transforms of dataset"),
            spec.downscale,
            None if spec.classes is None else list(spec.classes),
            spec.per_class,
        )
        for split, transform in zip(splits, transforms, strict=True)
    )
    if train.classes != test.classes:
        name = min(set(train.classes) ^ set(test.classes), default="(order)")
        raise InputError(
            f"{spec.name}: training and test images differ in the class {name!r}: make them agree"
        )
    return train, test


def full_network(cfg, classifier: Classifier, train, test, finish: Finish, resume: bool = False) -> None:
    """Train all of ``classifier``."""
    loader = TrainLoader(
        train,
        cfg.dataloader.total_batch_size,
        cfg.dataloader.num_workers,
        cfg.train.seed,
        device=cfg.train.device,
    )
    test_loader = build_test_loader(test, loader.batch_size, cfg.dataloader.num_workers)
    train_classifier(
        cfg,
        Pretraining(for_training(classifier, cfg.train), Standard()),
        loader,
        evaluate=lambda model: evaluate(model, test_loader, TransferEvaluator(test, cfg.train.output_dir)),
        finish=lambda model, results: finish(
            model, results, max(round(cfg.train.epochs * loader.iterations_per_epoch), 1)
        ),
        resume=resume,
    )


def last_layer(cfg, classifier: Classifier, train, test, finish: Finish, resume: bool = False) -> None:
    """Train only the last layer of ``classifier``, as the code of Salman et al. 2020 does it.

    Each epoch passes over the augmented images, with batch norm in train mode: features depend on the batch,
    and the running statistics become those of this data set.
    """
    classifier.network.requires_grad_(False)
    classifier.network.get_submodule(classifier.last_linear).requires_grad_(True)
    full_network(cfg, classifier, train, test, finish, resume)


def fixed_feature(cfg, classifier: Classifier, train, test, finish: Finish, resume: bool = False) -> None:
    """Fit only the last layer of ``classifier``, on cached features.

    Several processes share the forward passes. Then each fits the same layer, which is less work than
    exchanging gradients.
    """
    amp = AMP[cfg.features.amp] if cfg.features.amp and classifier.mean.is_cuda else None
    options = {"amp": amp, "batch_size": cfg.features.batch_size, "num_workers": cfg.dataloader.num_workers}
    train_features = compute_features(classifier, train, flip=cfg.features.flip, **options)
    test_features = compute_features(classifier, test, **options)
    for features in (train_features, test_features):
        features.views = features.views.to(cfg.train.device)
        features.labels = features.labels.to(cfg.train.device)
    head = classifier.network.get_submodule(classifier.last_linear)
    model = Pretraining(classifier, Standard())

    def test_head() -> dict:
        return evaluate_head(head, test_features, TransferEvaluator(test, cfg.train.output_dir))

    if cfg.head.solver == "logistic_regression":
        scoring = {"top1": "accuracy", "mean_per_class": "balanced_accuracy"}[test.metric]
        c, iterations = fit_logistic_regression(
            head, train_features.views[0], train_features.labels, list(cfg.head.C), scoring, cfg.train.seed
        )
        logger.info("logistic regression with C=%g after %d iterations", c, iterations)
        results = test_head()
        if comm.is_main_process():
            finish(model, results, iterations, C=c)
        return
    optimizer = build_optimizer(cfg, head)
    trainer = HeadTrainer(head, train_features, optimizer, cfg.dataloader.total_batch_size, cfg.train.seed)
    logger.info(
        "%g epochs of %d steps on features of %d images; output in %s",
        cfg.train.epochs, trainer.steps_per_epoch, len(train), cfg.train.output_dir,
    )  # fmt: skip
    run(
        cfg,
        trainer,
        TrainingCheckpointer(head, cfg.train.output_dir, trainer=trainer),
        epoch=1,
        evaluate=test_head,
        finish=lambda results: finish(model, results, trainer.max_iter * trainer.steps_per_epoch),
        resume=resume,
    )


@torch.no_grad()
def evaluate_head(head: nn.Linear, features: Features, evaluator: TransferEvaluator) -> dict:
    """The results of ``evaluator`` for a linear layer on features, printed and returned."""
    evaluator.reset()
    mine = slice(comm.get_rank(), None, comm.get_world_size())  # all have the same layer and features
    logits = head(features.views[0][mine])
    if len(logits):
        evaluator.process((None, features.labels[mine], features.keys[mine]), logits)
    results = evaluator.evaluate()
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _write_results(
    cfg, source: Metadata, test, results: dict, iterations: int, start: float, more: dict
) -> str:
    folder = cfg.train.output_dir
    content = {
        "metrics": finite(results),
        "iterations": iterations,
        "seed": cfg.train.seed,
        "wall_time_s": round(time.perf_counter() - start, 1),
        "config_sha256": lazy_config_sha256(cfg),
        "weights": str(cfg.transfer.weights),
        "source": {key: getattr(source, key) for key in ("arch", "norm", "eps", "sha256")},
        "versions": versions(),
        "datasets": [
            {
                "name": test.name,
                "root": cfg.dataset.root,
                "images": len(test),
                "metric": test.metric,
                "predictions": predictions_file(folder),
            }
        ],
        **more,
    }
    path = os.path.join(folder, "results.json")
    write_json(path, content)
    return path
