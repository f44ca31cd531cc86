"""Features of a frozen backbone, computed once for each picture that it sees and then read from disk."""

import functools
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from rt_detectron.detection.loader import ResumableLoader
from rt_detectron.evaluation.robustness.identity import weights_sha256
from rt_detectron.utils.arrays import read_arrays, write_arrays
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import cache_folder, printable, text_sha256

logger = logging.getLogger(__name__)

KEY = "DATALOADER.FEATURE_CACHE_GB"
VERSION = 1  # of the files


class FeatureStore:
    """Features by the pixels that they are of, in files; made for any number of processes at once.

    A file is ``$RT_DETECTRON_CACHE/detection_features/NETWORK/PIXELS.npz``, where both names are SHA-256: of
    the network's tensors, structure and chosen features, and of the normalised, padded image. So the same
    picture of another size, mirrored, or in a wider batch is another file, and nothing has to be known of
    data sets and augmentations. What cannot be stored is computed again.

    Args:
        network: whose features are stored.
        limit: of the whole folder ``detection_features``, in bytes; what is there already counts.
    """

    def __init__(self, network: Backbone, limit: float):
        # Two detectors may take other features of the same network.
        self.network = f"{sorted(network.output_shape())} {network}"
        self.root = cache_folder("detection_features")
        self.limit = limit
        self.room = limit - _bytes_in(self.root)
        self._until_count = self.room / 10  # bytes to write until the others' are counted, too
        self.read = self.computed = 0
        self._folder = ""

    def forget_weights(self, *_) -> None:
        """The network has other weights now."""
        self._folder = ""

    def features(self, network: nn.Module, images: Tensor, compute: Callable) -> dict[str, Tensor]:
        """``compute(images)``, image by image, for ``images`` (N, 3, H, W)."""
        if not self._folder:
            key = text_sha256(f"{weights_sha256(network)} {self.network} {VERSION} {images.dtype}")
            self._folder = os.path.join(self.root, key)
            os.makedirs(self._folder, exist_ok=True)
        found = [self._of_one(image[None], compute) for image in images]
        return {name: torch.cat([features[name] for features in found]) for name in found[0]}

    def _of_one(self, image: Tensor, compute: Callable) -> dict[str, Tensor]:
        digest = hashlib.sha256(str(tuple(image.shape)).encode())
        digest.update(image.contiguous().numpy())
        path = os.path.join(self._folder, f"{digest.hexdigest()}.npz")
        features = _read(path)
        if features is None:
            with torch.no_grad():
                features = compute(image)
            self._write(path, features)
            self.computed += 1
        else:
            self.read += 1
        return features

    def _write(self, path: str, features: dict[str, Tensor]) -> None:
        arrays = {name: tensor.contiguous().numpy() for name, tensor in features.items()}
        size = sum(array.nbytes for array in arrays.values())
        if size > self._until_count and self.room > -math.inf:
            self.room = self.limit - _bytes_in(self.root)
            self._until_count = max(self.room / 10, size)  # so ten processes stay below the limit
        if size > self.room:
            self._stop_writing(f"{KEY} is reached")
            return
        self.room -= size
        self._until_count -= size
        try:
            write_arrays(path, arrays)
        except OSError as error:
            self._stop_writing(error.strerror or str(error))

    def _stop_writing(self, reason: str) -> None:
        if self.room > -math.inf:
            logger.warning("no more features are stored (%s); the rest is computed each time", reason)
        self.room = -math.inf


def _read(path: str) -> dict[str, Tensor] | None:
    try:
        return {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
    except FileNotFoundError:
        return None
    except (OSError, InputError) as error:
        logger.warning("%s and is made again", error)
        return None


def _bytes_in(folder: str) -> int:
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a temporary file of another process
                size += os.path.getsize(os.path.join(parent, name))
    return size


class _Cached(Backbone):
    """A mixin for a frozen backbone; in eval mode, and where images have gradients, nothing is stored."""

    feature_store: FeatureStore

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if not self.training or images.requires_grad:
            return super().forward(images)
        return self.feature_store.features(self, images, super().forward)


def cache_features(model: nn.Module, cfg: CfgNode, loader: Iterable) -> None:
    """Have the frozen backbone of ``model`` read its features from disk in training, if ``cfg`` says so.

    Its outputs are the same up to float rounding, since a batch is computed image by image; its name and
    state dict stay. The log says beforehand how much disk that may take.

    Args:
        loader: of the training. A :class:`ResumableLoader` that groups images by orientation groups them by
            their padded sizes from now on, so that a picture is padded in one way, whatever else its
            batches hold.

    Raises:
        InputError: if the backbone is not wholly frozen or is random in training, if each iteration has
            pictures of its own (crops, random sizes, adversarial training), and if the disk is too full.
    """
    limit = cfg.DATALOADER.FEATURE_CACHE_GB
    if not limit:
        return
    if not 0 < limit < math.inf:
        raise InputError(f"{KEY} is {limit}; it must be in gigabytes, or 0 for none")
    backbone = model.backbone
    trunk = getattr(backbone, "bottom_up", getattr(backbone, "net", backbone))
    _refuse_what_has_no_use(cfg, trunk)
    store = FeatureStore(trunk, limit * 1e9)
    free = shutil.disk_usage(store.root).free
    if store.room > free:
        raise InputError(
            f"{KEY} {limit:g}: only {free / 1e9:.1f} GB of disk are left for {printable(store.root)}: "
            "lower it, or set RT_DETECTRON_CACHE to a folder on another disk"
        )
    images = len(loader.images) if isinstance(loader, ResumableLoader) else 0
    logger.info("features of the frozen backbone: %s", _size(cfg, trunk, images))
    logger.info("at most %g GB of %s are used, %.1f GB are free", limit, printable(store.root), free / 1e9)
    trunk.feature_store = store
    trunk.register_load_state_dict_post_hook(store.forget_weights)
    trunk.__class__ = type(f"Cached{type(trunk).__name__}", (_Cached, type(trunk)), {})
    is_square = backbone.padding_constraints.get("square_size", 0) > 0  # all are padded alike then
    if isinstance(loader, ResumableLoader) and backbone.size_divisibility > 1 and not is_square:
        loader.group = functools.partial(padded_sizes, cfg, backbone.size_divisibility)


def padded_sizes(cfg: CfgNode, divisor: int, record: dict) -> tuple[tuple[int, int], ...]:
    """Height and width of an image for each of INPUT.MIN_SIZE_TRAIN, padded to multiples of ``divisor``."""
    if "width" not in record or "height" not in record:
        return ()
    resized = [
        ResizeShortestEdge.get_output_shape(record["height"], record["width"], size, cfg.INPUT.MAX_SIZE_TRAIN)
        for size in cfg.INPUT.MIN_SIZE_TRAIN
    ]
    return tuple(
        (math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor)
        for height, width in resized
    )


def _refuse_what_has_no_use(cfg: CfgNode, trunk: nn.Module) -> None:
    reasons = {
        "it needs a frozen backbone; set MODEL.BACKBONE.FREEZE_AT 5": any(
            parameter.requires_grad for parameter in trunk.parameters()
        ),
        "batch norms or dropout of the backbone change it in training; set MODEL.RESNETS.NORM FrozenBN": any(
            isinstance(module, _BatchNorm) or _drops(module) for module in trunk.modules()
        ),
        "it is for CPUs, a GPU computes features faster than a disk gives them": cfg.MODEL.DEVICE != "cpu",
        "every crop is another picture; set INPUT.CROP.ENABLED False": cfg.INPUT.CROP.ENABLED,
        "every size is another picture; set INPUT.MIN_SIZE_TRAIN_SAMPLING choice": (
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING != "choice"
        ),
        "adversarial training changes the pictures; set SOLVER.ADVERSARIAL.REPLAYS 0 and STEPS 0": (
            cfg.SOLVER.ADVERSARIAL.REPLAYS > 0 or cfg.SOLVER.ADVERSARIAL.STEPS > 0
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"{KEY}: {reason}, or {KEY} 0")


def _drops(module: nn.Module) -> bool:
    """Whether it is a Dropout, torchvision's StochasticDepth, or timm's, that does something."""
    is_one = isinstance(module, (_DropoutNd, StochasticDepth))
    names = ["p"] if is_one else ["drop_prob", "prob"] if "Drop" in type(module).__name__ else []
    return any((getattr(module, name, None) or 0) > 0 for name in names)


def _size(cfg: CfgNode, trunk: Backbone, images: int) -> str:
    """What the features take, if each image were as large as the config allows and padded in one way."""
    sizes, flips = cfg.INPUT.MIN_SIZE_TRAIN, 1 if cfg.INPUT.RANDOM_FLIP == "none" else 2
    a_pixel = sum(shape.channels / shape.stride**2 for shape in trunk.output_shape().values())
    bytes_ = [4 * a_pixel * size * min(1.5 * size, cfg.INPUT.MAX_SIZE_TRAIN) for size in sizes]
    whole = images * flips * sum(bytes_) / 1e9
    return (
        f"{images} images x {len(sizes)} sizes x {flips} flips of {sum(bytes_) / len(sizes) / 1e6:.1f} MB "
        f"are about {whole:.1f} GB, more where a batch pads them in several ways"
    )
