"""Features of a data set from a frozen network, computed once and cached."""

import hashlib
import json
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import Tensor, nn
from tqdm import tqdm

from rt_detectron.checkpoint.architectures import is_counter
from rt_detectron.data.loader import build_test_loader, in_order, to_device
from rt_detectron.engine.processes import patient_group
from rt_detectron.layers.folding import fold
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.transfer.datasets import ClassificationDataset
from rt_detectron.utils.arrays import read_arrays, write_arrays
from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import cache_folder, locked

logger = logging.getLogger(__name__)

# Of the features and their file format: part of the cache key. Version 1 may be wrong for networks of timm's
# whose norms or convolutions do more than torch's.
_VERSION = 2


@dataclass
class Features:
    """Inputs of a last linear layer.

    Attributes:
        views: (V, N, D), float32: features of the N images and, if V is 2, of the mirrored images.
        labels: (N,).
        keys: names of the images.
    """

    views: Tensor
    labels: Tensor
    keys: list[str]


class FeatureExtractor(nn.Module):
    """A classifier without its last linear layer, in eval mode with folded batch norms.

    Args:
        classifier: one whose layer ``last_linear`` has been replaced by an Identity.
        flip: also give the features of the mirrored images.
        amp: torch's autocast dtype; None computes in float32.
    """

    def __init__(self, classifier: Classifier, flip: bool, amp: torch.dtype | None):
        super().__init__()
        self.device = classifier.mean.device
        self.network = fold(classifier)
        self.flip = flip
        self.amp = amp
        self.eval()

    def forward(self, batch) -> Tensor:
        """Features (N, V, D), with V views, of a batch (images (N, 3, H, W), labels, keys)."""
        images, _ = to_device(batch, self.device)
        views = [images, images.flip(3)] if self.flip else [images]
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            return torch.stack([self.network(view) for view in views], 1)


class _Collector(DatasetEvaluator):
    """Collects all features in all processes."""

    def reset(self):
        self.batches = []

    def process(self, inputs, outputs):
        _, labels, keys = inputs
        self.batches.append((outputs.cpu().numpy(), labels.numpy(), np.array(keys)))

    def evaluate(self) -> dict[str, np.ndarray]:
        gathered = comm.all_gather(self.batches)
        return {
            name: in_order([[batch[i] for batch in batches] for batches in gathered])
            for i, name in enumerate(("features", "labels", "keys"))
        }


def compute_features(
    classifier: Classifier,
    dataset: ClassificationDataset,
    flip: bool = False,
    amp: torch.dtype | None = None,
    batch_size: int = 256,
    num_workers: int = 4,
) -> Features:
    """The inputs of the classifier's last linear layer, from the cache if they were computed before.

    The cache is ``$RT_DETECTRON_CACHE/features``, by default ``~/.cache/rt_detectron/features``. Its key
    depends on the network's tensors and normalisation, the data set's fingerprint and transform, and the
    precision. If several runs need the same features, one computes them and the others wait; the processes
    of one run share the work.

    Args:
        classifier: its last linear layer has no effect.
        dataset: of the images.
        flip, amp: as for :class:`FeatureExtractor`.
        batch_size: images of a forward pass, in each process.
        num_workers: loader processes for each process.

    Raises:
        InputError: for an image that cannot be read, a cache that cannot be written or is damaged, and
            features that are not finite.
    """
    name, last = classifier.last_linear, classifier.network.get_submodule(classifier.last_linear)
    classifier.network.set_submodule(name, nn.Identity())
    try:
        path = os.path.join(cache_folder("features"), f"{_key(classifier, dataset, flip, amp)}.npz")
        with _made_by_one_run(path):
            group = patient_group()  # another run may be computing them, and the first process waits for it
            if not all(comm.all_gather(os.path.isfile(path), group=group)):
                logger.info("computing features of %d images: %s", len(dataset), dataset.name)
                loader = build_test_loader(dataset, batch_size, num_workers)
                bar = tqdm(loader, f"features of {dataset.name}", disable=None)
                arrays = inference_on_dataset(FeatureExtractor(classifier, flip, amp), bar, _Collector())
                _write_everywhere(path, arrays)
    finally:
        classifier.network.set_submodule(name, last)
    return _read(path)


def _key(classifier: Classifier, dataset: ClassificationDataset, flip: bool, amp: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for name, tensor in classifier.network.state_dict().items():
        if not is_counter(name):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().cpu().numpy().tobytes())
    rest: list = [classifier.arch, classifier.pixel_mean, classifier.pixel_std, dataset.fingerprint()]
    rest += [repr(dataset.transform), flip, str(amp), _VERSION]
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()


def _made_by_one_run(path: str) -> AbstractContextManager:
    """A context in which no other run makes the file.

    Only the first process of the run has the lock. If one of each machine had it, the machines of a run that
    share a folder would wait for each other.
    """
    if not comm.is_main_process():
        return nullcontext()
    return locked(path, "set RT_DETECTRON_CACHE to a folder that can be written")


def _write_everywhere(path: str, arrays: dict[str, np.ndarray]) -> None:
    """The first process writes, and then one on each machine that does not see that file."""
    if comm.is_main_process():
        _write(path, arrays)
    comm.synchronize()
    if comm.get_local_rank() == 0 and not os.path.isfile(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _write(path, arrays)
    comm.synchronize()


def _write(path: str, arrays: dict[str, np.ndarray]) -> None:
    if not np.isfinite(arrays["features"]).all():
        raise InputError("the features are not finite: the weights are damaged, or set features.amp=null")
    try:
        write_arrays(path, arrays)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}): make room, or set RT_DETECTRON_CACHE to another folder"
        ) from None


def _read(path: str) -> Features:
    try:
        arrays = read_arrays(path)
        features, labels, keys = (arrays[name] for name in ("features", "labels", "keys"))
    except KeyError as error:
        raise InputError(f"{path} is damaged (no {error}): delete it and it will be computed again") from None
    except (OSError, InputError) as error:
        raise InputError(f"{error}: delete it and it will be computed again") from None
    views = torch.from_numpy(features).float().transpose(0, 1).contiguous()
    return Features(views, torch.from_numpy(labels), keys.tolist())
