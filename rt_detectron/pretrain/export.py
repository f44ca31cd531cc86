"""What a finished training leaves: the classifier, the backbone for Detectron2, and a card about both."""

import os

from rt_detectron.checkpoint.convert import convert_checkpoint
from rt_detectron.checkpoint.formats import save_atomically
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.engine.lazy_config import as_yaml
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.pretrain.model import Pretraining
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import file_sha256, write_text
from rt_detectron.utils.versions import versions

PRETRAINING = "rt_detectron pretraining"  # where weights come from


class Provenance:
    """Has the checkpointer write :func:`classifier_metadata` into each file; resuming has no use for it."""

    def __init__(self, model: Pretraining):
        self.model = model

    def state_dict(self) -> dict:
        return classifier_metadata(self.model).to_dict()

    def load_state_dict(self, state: dict) -> None:
        pass


def classifier_metadata(model: Pretraining, source: str = PRETRAINING) -> Metadata:
    """What later tools must know of a classifier; written beside its tensors.

    norm and eps are both None, unknown, for an attack without a threat model.
    """
    threat_model = model.strategy.threat_model
    classifier: Classifier = model.classifier
    eps = 0.0 if model.strategy.attack is None else None
    if threat_model is not None:
        eps = threat_model.eps
    return Metadata(
        arch=classifier.arch,
        norm=threat_model.norm if threat_model else None,
        eps=eps,
        input_format="RGB",
        pixel_mean=tuple(classifier.pixel_mean),
        pixel_std=tuple(classifier.pixel_std),
        stride_in_1x1=False,
        source=source,
    )


def export(cfg, model: Pretraining, results: dict) -> list[str]:
    """Write ``classifier.pth``, ``backbone.pkl`` and then ``model_card.md`` to ``cfg.train.output_dir``.

    Args:
        cfg: of the training.
        model: what it trained.
        results: of :func:`rt_detectron.pretrain.trainer.do_eval`.

    Returns:
        The three paths.

    Raises:
        InputError: if one cannot be written.
    """
    folder = cfg.train.output_dir
    classifier, backbone, card = (
        os.path.join(folder, name) for name in ("classifier.pth", "backbone.pkl", "model_card.md")
    )
    try:
        write_classifier(model, classifier)
        convert_checkpoint(classifier, backbone)
        write_text(card, model_card(cfg, model, results, [classifier, backbone]))
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; the training is done: make room and add "
            "--resume for what is missing"
        ) from None
    return [classifier, backbone, card]


def write_classifier(model: Pretraining, path: str, source: str = PRETRAINING) -> None:
    """Write the network under torchvision's names with its metadata, atomically.

    Without the classifier's head if that was not trained.
    """
    state_dict = model.classifier.network.state_dict()
    if not model.strategy.has_head:
        head = model.classifier.architecture.head
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith(head)}
    content = {
        "model": state_dict,
        "rt_detectron": classifier_metadata(model, source).to_dict(),
    }
    save_atomically(content, path)


def model_card(cfg, model: Pretraining, results: dict, files: list[str]) -> str:
    """Markdown: what the weights are, how good, how made and with what."""
    metadata = classifier_metadata(model)
    return CARD.format(
        name=os.path.basename(os.path.normpath(cfg.train.output_dir)),
        arch=metadata.arch,
        builder=model.classifier.architecture.builder("fpn"),
        pixel_mean=list(metadata.pixel_mean),
        pixel_std=list(metadata.pixel_std),
        num_classes=model.classifier.num_classes,
        trained=_trained(model.strategy),
        accuracies="\n".join(_accuracies(cfg, results.get("accuracy", {})) or [NO_HEAD]),
        files="\n".join(f"| `{os.path.basename(path)}` | `{file_sha256(path)}` |" for path in files),
        epochs=cfg.train.epochs,
        batch=cfg.dataloader.train.total_batch_size,
        seed=cfg.train.seed,
        averaged=f", weights averaged with decay {cfg.train.ema:g}" if cfg.train.ema else "",
        versions="\n".join(f"| {name} | {version} |" for name, version in versions().items()),
        config=as_yaml(cfg).strip(),
    )


def _trained(strategy) -> str:
    threat_model = strategy.threat_model
    if threat_model is None:
        return f"against {strategy.attack.name}" if strategy.attack else "without an adversary"
    unit = "/255" if threat_model.norm == "linf" else ""
    return f"against {threat_model.norm} eps {threat_model.eps:g}{unit} (strategy {type(strategy).__name__})"


def _accuracies(cfg, accuracy: dict) -> list[str]:
    threat_model = cfg.evaluator.attack.get("threat_model")
    rows = []
    for name, value in accuracy.items():
        if name in ("images", "attacked_images"):
            continue
        is_clean = name == "clean"
        images = accuracy["images" if is_clean else "attacked_images"]
        is_bounded = threat_model is not None and not is_clean
        label = f"{name}, {threat_model.norm} eps {threat_model.eps:g}" if is_bounded else name
        rows.append(f"| {label} | {value:.2f} | {images} |")
    return rows


NO_HEAD = "| not evaluated: the last linear layer was not trained and is left out of the files | | |"

CARD = """# {name}

{arch} with {num_classes} classes, trained {trained}.

| accuracy | % | images |
|---|---:|---:|
{accuracies}

## Use

`backbone.pkl` is for Detectron2, with `import rt_detectron`:

```yaml
MODEL:
  WEIGHTS: backbone.pkl
  BACKBONE:
    NAME: {builder}
  ROBUST:
    ARCH: {arch}
  PIXEL_MEAN: {pixel_mean}
  PIXEL_STD: {pixel_std}
INPUT:
  FORMAT: RGB
```

`classifier.pth` holds torchvision's names under "model". Images are RGB.

| file | SHA-256 |
|---|---|
{files}

## Recipe

{epochs:g} epochs in batches of {batch}, seed {seed}{averaged}.

| package | version |
|---|---|
{versions}

```yaml
{config}
```
"""
