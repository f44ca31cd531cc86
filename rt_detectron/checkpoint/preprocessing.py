"""The guard: a detector must feed a backbone the pixels that it was trained on."""

from collections.abc import Sequence

from detectron2.modeling.backbone.resnet import BottleneckBlock, DeformBottleneckBlock
from torch import nn

from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.utils.errors import InputError

# Of 0..255. Lets configs round (57.38 for 57.375), yet tells any two conventions apart.
TOLERANCE = 0.01


def preprocessing_lines(metadata: Metadata) -> dict[str, str]:
    """The config lines that ``metadata`` demands, by key: {"INPUT.FORMAT": 'INPUT.FORMAT "RGB"', ...}."""
    values = {
        "INPUT.FORMAT": f'"{metadata.input_format}"',
        "MODEL.PIXEL_MEAN": str(list(metadata.pixel_mean)),
        "MODEL.PIXEL_STD": str(list(metadata.pixel_std)),
        "MODEL.RESNETS.STRIDE_IN_1X1": str(metadata.stride_in_1x1),
    }
    return {key: f"{key} {value}" for key, value in values.items()}


def check_preprocessing(model: nn.Module, metadata: Metadata) -> None:
    """Compare a built detector with what the weights it is to load were trained on.

    Looks at the model and not at its config, so it serves yacs and LazyConfig alike.

    Args:
        model: a Detectron2 model. What it does not have (a bare backbone has no mean) is not compared.
        metadata: of the weights.

    Raises:
        InputError: listing exactly the config lines to set.
    """
    wrong = []
    input_format = getattr(model, "input_format", None)
    if input_format is not None and input_format != metadata.input_format:
        wrong.append("INPUT.FORMAT")
    for name, key in (("pixel_mean", "MODEL.PIXEL_MEAN"), ("pixel_std", "MODEL.PIXEL_STD")):
        if hasattr(model, name) and not _close(
            getattr(model, name).flatten().tolist(), getattr(metadata, name)
        ):
            wrong.append(key)
    if not metadata.stride_in_1x1 and any(_strides_in_1x1(module) for module in model.modules()):
        wrong.append("MODEL.RESNETS.STRIDE_IN_1X1")
    if wrong:
        lines = preprocessing_lines(metadata)
        raise InputError(
            f"the weights ({metadata.source}) were trained with other preprocessing than this config's: "
            f"set {'; '.join(lines[key] for key in wrong)}"
        )


def _close(found: Sequence[float], needed: Sequence[float]) -> bool:
    return len(found) == len(needed) and all(
        abs(a - b) <= TOLERANCE for a, b in zip(found, needed, strict=True)
    )


def _strides_in_1x1(module: nn.Module) -> bool:
    return isinstance(module, BottleneckBlock | DeformBottleneckBlock) and module.conv1.stride[0] > 1
