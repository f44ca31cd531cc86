"""Check that a detector preprocesses images as its backbone was trained."""

from collections.abc import Mapping, Sequence

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


def check_preprocessing(model: nn.Module, metadata: Metadata, input_format: str | None = None) -> None:
    """Check that a built detector preprocesses images as the weights to load were trained.

    Looks at the model and not at its config, so it serves yacs and LazyConfig alike.

    Args:
        model: a Detectron2 model. What it does not have (a bare backbone has no mean) is not compared.
        metadata: of the weights.
        input_format: the colour order of its images, if known; counts where the model does not say.

    Raises:
        InputError: listing exactly the config lines to set.
    """
    found = {
        "INPUT.FORMAT": getattr(model, "input_format", None) or input_format,
        "MODEL.RESNETS.STRIDE_IN_1X1": _strides_in_1x1(model),
    }
    for name in ("pixel_mean", "pixel_std"):
        if hasattr(model, name):
            found[f"MODEL.{name.upper()}"] = getattr(model, name).flatten().tolist()
    compare(found, metadata)


def compare(found: Mapping, metadata: Metadata) -> None:
    """Raise :class:`InputError` for values of config keys that are not what ``metadata`` demands.

    ``found`` may lack keys, and a value that is not known may be None.
    """
    agrees = {
        "INPUT.FORMAT": lambda value: value == metadata.input_format,
        "MODEL.PIXEL_MEAN": lambda value: close(value, metadata.pixel_mean),
        "MODEL.PIXEL_STD": lambda value: close(value, metadata.pixel_std),
        "MODEL.RESNETS.STRIDE_IN_1X1": lambda value: value == metadata.stride_in_1x1,
    }
    lines = preprocessing_lines(metadata)
    wrong = [
        lines[key] for key, fits in agrees.items() if found.get(key) is not None and not fits(found[key])
    ]
    if wrong:
        raise InputError(
            f"the weights ({metadata.source}) were trained with other preprocessing than this config's: "
            f"set {'; '.join(wrong)}"
        )


def close(found: Sequence[float], needed: Sequence[float], tolerance: float = TOLERANCE) -> bool:
    """Whether two means, or stds, are the same but for rounding."""
    return len(found) == len(needed) and all(
        abs(a - b) <= tolerance for a, b in zip(found, needed, strict=True)
    )


def _strides_in_1x1(model: nn.Module) -> bool | None:
    """Whether bottlenecks have their stride in the first convolution; None without bottlenecks."""
    strided = [
        block.conv1.stride[0] > 1
        for block in model.modules()
        if isinstance(block, BottleneckBlock | DeformBottleneckBlock) and block.stride > 1
    ]
    return any(strided) if strided else None
