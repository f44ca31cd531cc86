"""Detectron2's checkpointer, strict about files that carry our metadata."""

import os
import re

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor, nn

from rt_detectron.checkpoint.architectures import get_architecture
from rt_detectron.checkpoint.atomic import AtomicCheckpointer
from rt_detectron.checkpoint.formats import check_archive, check_file, read_pickle, unreadable
from rt_detectron.checkpoint.preprocessing import check_preprocessing
from rt_detectron.utils.errors import InputError

# What a backbone's file fills, and the stage that a tensor belongs to. A network that is not Detectron2's
# sits in its backbone as `trunk` with names of its own, of which two words tell one stage from another.
TRUNK = re.compile(r"(?:^|\.)(stem|res[2-5]|trunk(?:\.\w+){1,2})(?=\.)")
# In the trunk of a model, but in no classifier: BN's counter and a deformable convolution's own layer.
NOT_FROM_CLASSIFIER = re.compile(r"\.num_batches_tracked$|\.conv2_offset\.")


class RobustCheckpointer(AtomicCheckpointer):
    """Loads like Detectron2's; a file with ``rt_detectron`` metadata must moreover fit exactly.

    Such a file is compared with the model's preprocessing; then each of its tensors must find its place
    and each trunk tensor of the model must be filled (Detectron2 only warns). A whole stage that the
    model does not have may stay unused. A file without matching heuristics, a detector, must have all of
    the model's tensors. The metadata goes into every checkpoint saved afterwards, so a fine-tuned
    detector is guarded when it is evaluated, too.

    No code in any file is ever run: a ``.pkl`` may hold arrays in plain containers and nothing else.

    Raises:
        InputError: from ``load``, for a file that is not there, cannot be read, is refused or does not fit.
    """

    def __init__(self, model: nn.Module, save_dir: str = "", **kwargs):
        super().__init__(model, save_dir, **kwargs)
        self.metadata: dict | None = None

    def save(self, name: str, **kwargs) -> None:
        if self.metadata is not None:
            kwargs.setdefault("rt_detectron", self.metadata)
        super().save(name, **kwargs)

    def load(self, path: str, *args, **kwargs) -> dict:
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise InputError(f"there is no weights file {path}: check MODEL.WEIGHTS")
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # Detectron2 forgets this when loading fails

    def _load_file(self, filename: str) -> dict:
        check_file(filename)
        if not filename.endswith(".pkl"):
            return super()._load_file(filename)
        content = _dict(read_pickle(filename), filename)
        if "model" in content and "__author__" in content:
            return content
        # Caffe2 or Detectron1, told apart and cleaned as in Detectron2's own _load_file
        tensors = _dict(content.get("blobs", content), filename)
        tensors = {name: value for name, value in tensors.items() if not name.endswith("_momentum")}
        return {"model": tensors, "__author__": "Caffe2", "matching_heuristics": True}

    def _torch_load(self, f: str) -> dict:
        check_archive(f)
        try:
            loaded = super()._torch_load(f)  # weights_only is torch's default
        except Exception as error:  # damaged and hostile files fail in every way there is
            raise InputError(unreadable(f, error)) from None
        return _dict(loaded, f)

    def _load_model(self, checkpoint: dict):
        metadata = checkpoint.get("rt_detectron")
        if metadata is None:
            return super()._load_model(checkpoint)
        stem = f"{get_architecture(metadata['arch']).stem}.weight"
        if any(name.removeprefix("network.") == stem for name in checkpoint["model"]):
            raise InputError(
                "MODEL.WEIGHTS is a classifier: convert it with tools/convert_checkpoint.py and load the .pkl"
            )
        check_preprocessing(self.model, metadata)
        whole_model = not checkpoint.pop("matching_heuristics", False)
        if not whole_model:
            self._convert_ndarray_to_tensor(checkpoint["model"])
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(), checkpoint["model"], c2_conversion=False
            )
        self._check_fit(checkpoint["model"], metadata, whole_model)
        self.metadata = metadata
        return super()._load_model(checkpoint)

    def _check_fit(self, loaded: dict[str, Tensor], metadata: dict, whole_model: bool) -> None:
        # Asked here and not of load_state_dict, since FrozenBatchNorm2d fills in statistics that are
        # missing from the file without reporting them.
        model = self.model.state_dict()
        stages = {match[1] for match in map(TRUNK.search, model) if match}
        problems = {
            "not in the model": [n for n in loaded if n not in model and not _of_absent_stage(n, stages)],
            "misshaped": [n for n in loaded if n in model and model[n].shape != torch.Size(loaded[n].shape)],
            "not in the file": [
                n
                for n in model
                if n not in loaded and (whole_model or TRUNK.search(n)) and not NOT_FROM_CLASSIFIER.search(n)
            ],
        }
        parts = [
            f"{len(names)} tensors {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for problem, names in problems.items()
            if names
        ]
        if parts:
            way_out = (
                "load it under the config it was trained with, or start from its backbone's .pkl instead"
                if whole_model
                else f"set MODEL.ROBUST.ARCH {metadata['arch']} and MODEL.RESNETS.NORM FrozenBN, BN or SyncBN"
            )
            raise InputError(
                f"the weights ({metadata['source']}, {metadata['arch']}) do not fit the model: "
                f"{'; '.join(parts)}: {way_out}"
            )


def _dict(content, path: str) -> dict:
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no weights by name: check MODEL.WEIGHTS")
    return content


def _of_absent_stage(name: str, stages: set[str]) -> bool:
    match = TRUNK.search(name)
    return match is not None and match[1] not in stages
