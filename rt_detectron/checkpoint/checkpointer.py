"""Detectron2's checkpointer: atomic files, safe resuming, and strict loading of pretrained weights."""

import glob
import logging
import os
import re
import socket
import zipfile

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.utils import comm
from torch import Tensor, nn

from rt_detectron.checkpoint.architectures import get_architecture
from rt_detectron.checkpoint.formats import (
    check_archive,
    check_file,
    read_pickle,
    save_atomically,
    unreadable,
)
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.checkpoint.preprocessing import check_preprocessing
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.files import text_sha256, write_text

logger = logging.getLogger(__name__)
TO_KEEP = 2  # one to fall back on, should the last one turn out damaged
# What a backbone's file fills, and the stage that a tensor belongs to. A network that is not Detectron2's
# sits in its backbone as `trunk` with names of its own, of which two words tell one stage from another.
# DeepLab's decoders have layers `res2` ... of their own.
TRUNK = re.compile(r"^(?:(?!\w*(?:head|decoder)\.)\w+\.)*?(stem|res[2-5]|trunk(?:\.\w+){1,2})(?=\.)")
# In the trunk of a model, but in no classifier: BN's counter and a deformable convolution's own layer.
NOT_FROM_CLASSIFIER = re.compile(r"\.num_batches_tracked$|\.conv2_offset\.")
# Caffe2's files have batch norms' statistics merged into weight and bias.
STATISTICS = re.compile(r"\.running_(mean|var)$")
CONVERT = "convert it with tools/convert_checkpoint.py and set MODEL.WEIGHTS to the .pkl"


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic writes: an interrupted save leaves no partial file.

    Raises:
        InputError: from ``save``, when the file cannot be written.
    """

    def last_whole(self) -> str:
        """The newest checkpoint of the folder that is not damaged; "" if the folder has none.

        The first process chooses for all, since folders may differ: there may be one on each machine's disk,
        or a file server may show an old one. Call it in all processes.

        Raises:
            InputError: in all processes, if no checkpoint can be read, or if one lacks the chosen file.
        """
        chosen, problem = "", ""
        if comm.is_main_process():
            remove_leftovers(self.save_dir)
            try:
                chosen = self._newest_whole() if self.has_checkpoint() else ""
            except InputError as error:
                problem = str(error)
        chosen, problem = comm.all_gather((chosen, problem))[0]
        if chosen:
            found = comm.all_gather((socket.gethostname(), _fingerprint(chosen)))
            lacking = [f"{rank} on {host}" for rank, (host, mark) in enumerate(found) if mark != found[0][1]]
            if lacking:
                problem = (
                    f"cannot resume from {chosen}: process {lacking[0]} lacks this file or has another one; "
                    "use an output folder that all machines share"
                )
        if problem:
            raise InputError(problem)
        return chosen

    def _newest_whole(self) -> str:
        last = self.get_checkpoint_file()
        files = periodic_checkpoints(self.save_dir)
        older = files[: files.index(last)] if last in files else files
        damages = []
        for path in (last, *reversed(older)):
            try:
                _check_whole(path)
            except InputError as error:
                damages.append(str(error))
                logger.warning("%s; trying the checkpoint before it", error)
                continue
            return path
        raise InputError(f"{self.save_dir} has no checkpoint that can be read: {damages[0]}")

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        content = {"model": self.model.state_dict(), **kwargs}
        content |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        try:
            save_atomically(content, path)
            self.tag_last_checkpoint(os.path.basename(path))
        except OSError as error:
            last = self.get_checkpoint_file()
            raise InputError(
                f"cannot write {path}: {error.strerror}; "
                + (
                    f"{last} is whole: make room and go on with --resume"
                    if last
                    else "make room and start again"
                )
            ) from None
        self.logger.info("Saved %s", path)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)


def periodic_checkpoints(folder: str) -> list[str]:
    """The files ``model_NUMBER.pth`` of the folder, oldest first."""
    names = [name for name in os.listdir(folder) if re.fullmatch(r"model_\d+\.pth", name)]
    return [os.path.join(folder, name) for name in sorted(names, key=checkpoint_number)]


def checkpoint_number(path: str) -> int:
    """NUMBER of a file ``model_NUMBER.pth``: its last iteration."""
    return int(os.path.basename(path)[len("model_") : -len(".pth")])


def _check_whole(path: str) -> None:
    if not os.path.isfile(path):
        raise InputError(f"{path} is missing")
    if not zipfile.is_zipfile(path):  # torch's older format, too, but no training here writes that
        raise InputError(f"{path} is damaged: it is no whole checkpoint")
    check_archive(path)
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files fail in every way there is
        raise InputError(unreadable(path, error)) from None


def _fingerprint(path: str) -> str:
    """A hash of the checksums in a checkpoint, which differs between checkpoints; "" without such a file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return text_sha256(str([(record.filename, record.CRC) for record in archive.infolist()]))
    except (OSError, zipfile.BadZipFile):
        return ""


class TrainingCheckpointer(AtomicCheckpointer):
    """Resumes from the newest whole checkpoint; no code in a file is run when it is loaded.

    Attributes:
        processes: after ``resume``, what each process saved for itself.

    Raises:
        InputError: from ``save``, when the file cannot be written; from ``resume``, when no checkpoint of the
            folder can be read or the last one does not fit the configuration.
    """

    def resume(self) -> bool:
        """Load the last checkpoint, or the newest that is not damaged; False if the folder has none.

        Call it in all processes; the first one's folder counts.
        """
        path = self.last_whole()
        if path:
            self._fill(torch.load(path, map_location="cpu", weights_only=True), path)
        return bool(path)

    def _fill(self, content: dict, path: str) -> None:
        try:
            self.model.load_state_dict(content["model"])
            for key, part in self.checkpointables.items():
                part.load_state_dict(content[key])
            self.processes = content.get("processes", [])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(_other_configuration(path, error, "train.output_dir")) from None
        logger.info("Resuming from %s", path)


def _other_configuration(path: str, error: Exception, key: str) -> str:
    return (
        f"{path} is of another configuration ({type(error).__name__}: {one_line(error)[:200]}): "
        f"resume with the one in config.yaml beside it, or choose another {key}"
    )


def has_checkpoint(folder: str) -> bool:
    """Whether the first process's ``folder`` holds a training to resume. Call it in all processes."""
    return comm.all_gather(os.path.isfile(os.path.join(folder, "last_checkpoint")))[0]


def remove_leftovers(folder: str) -> None:
    """Delete the temporary files of a process that was killed while it wrote; nobody else may be writing."""
    for path in glob.glob(os.path.join(glob.escape(folder), "*.[0-9]*.tmp")):
        os.remove(path)


class RobustCheckpointer(AtomicCheckpointer):
    """Loads like Detectron2's, but stops where weights do not fit: Detectron2 only warns.

    - A backbone's file must fill the whole pretrained network (:data:`TRUNK`), a detector's file all of the
      model. Where a training starts from a detector (``resume_or_load``, which loads no ``checkpointables``),
      only its pretrained network must fit: other heads start at random, with a warning, for other classes.
    - A file with ``rt_detectron`` metadata is compared with the model's preprocessing, and each tensor of a
      backbone's file must find its place. A whole stage that the model does not have may stay unused. The
      metadata goes into every checkpoint saved afterwards, so a fine-tuned detector is guarded, too.
    - With ``trained`` any file must fill all of the model.

    No code in any file is ever run: a ``.pkl`` may hold arrays in plain containers and nothing else.

    Args:
        trained: only a whole trained detector will do, as for an evaluation; not a backbone, and not "".
        input_format: the colour order of the images, such as cfg.INPUT.FORMAT; counts where the model does
            not know it (semantic segmentation).
        kwargs: see Detectron2's.

    Raises:
        InputError: from ``load``, for a file that is not there, cannot be read, is refused or does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        trained: bool = False,
        input_format: str | None = None,
        **kwargs,
    ):
        super().__init__(model, save_dir, **kwargs)
        self.trained = trained
        self.input_format = input_format
        self.metadata: Metadata | None = None
        self.resumed = False

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict:
        """As Detectron2's, but all processes resume from the file that :meth:`last_whole` gives.

        ``resumed`` says whether there was one.
        """
        last = self.last_whole() if resume else ""
        self.resumed = bool(last)
        if not last:
            return self.load(path, checkpointables=[])
        try:
            return self.load(last)
        except InputError:
            raise
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(_other_configuration(last, error, "OUTPUT_DIR")) from None

    def save(self, name: str, **kwargs) -> None:
        if self.metadata is not None:
            kwargs.setdefault("rt_detectron", self.metadata.to_dict())
        super().save(name, **kwargs)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        if not path and self.trained:
            raise InputError(
                "no weights are given: set MODEL.WEIGHTS (in a LazyConfig train.init_checkpoint) to those of "
                "a trained detector, such as model_final.pth"
            )
        if path and "://" not in path and not os.path.isfile(path.split("?")[0]):
            raise InputError(f"there is no weights file {path}: check MODEL.WEIGHTS")
        self._heads_may_differ = checkpointables == [] and not self.trained
        try:
            return super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # Detectron2 forgets this when loading fails

    def _load_file(self, filename: str) -> dict:
        check_file(filename)
        self._loading = filename
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
            raise InputError(f"{unreadable(f, error)}; if it is a classifier, {CONVERT}") from None
        return _dict(loaded, f)

    def _load_model(self, checkpoint: dict):
        tensors = _dict(checkpoint["model"], self._loading)
        if not all(isinstance(tensor, Tensor | np.ndarray) for tensor in tensors.values()):
            raise InputError(f"{self._loading} is no detector and no backbone: {CONVERT}")
        metadata = None
        if "rt_detectron" in checkpoint:
            metadata = Metadata.from_dict(checkpoint["rt_detectron"], self._loading)
            stem = f"{get_architecture(metadata.arch).stem}.weight"
            if any(name.removeprefix("network.") == stem for name in tensors):
                raise InputError(f"{self._loading} is a classifier: {CONVERT}")
            check_preprocessing(self.model, metadata, self.input_format)
        is_backbone = checkpoint.pop("matching_heuristics", False)
        if is_backbone:
            self._convert_ndarray_to_tensor(tensors)
            checkpoint["model"] = align_and_update_state_dicts(
                self.model.state_dict(), tensors, c2_conversion=checkpoint.get("__author__") == "Caffe2"
            )
        self._check_fit(_without_module(checkpoint["model"]), metadata, is_backbone)
        self.metadata = metadata
        return super()._load_model(checkpoint)

    def _check_fit(self, loaded: dict[str, Tensor], metadata: Metadata | None, is_backbone: bool) -> None:
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
                if n not in loaded
                and not NOT_FROM_CLASSIFIER.search(n)
                and not (metadata is None and is_backbone and STATISTICS.search(n))
            ],
        }
        if metadata is None:  # Detectron2's files have more than a model needs: a classifier's layer, anchors
            problems["not in the model"] = []
        serious = {
            problem: [name for name in names if self._is_serious(name, problem, metadata, is_backbone)]
            for problem, names in problems.items()
        }
        file = f"{self._loading} ({metadata.source}, {metadata.arch})" if metadata else self._loading
        if any(serious.values()) or not any(name in model for name in loaded):
            found = _described(serious) or f"none of its {len(loaded)} tensors is in the model"
            raise InputError(
                f"the weights {file} do not fit the model: {found}: {self._way_out(metadata, is_backbone)}"
            )
        if not is_backbone and any(problems.values()):
            logger.warning("Starting without what does not fit of %s: %s", file, _described(problems))

    def _is_serious(self, name: str, problem: str, metadata: Metadata | None, is_backbone: bool) -> bool:
        """Whether nothing may be trained or evaluated with such a tensor; a head's may start at random."""
        if self.trained or not (is_backbone or self._heads_may_differ):
            return True
        all_is_trunk = is_backbone and metadata is not None and problem != "not in the file"
        return all_is_trunk or TRUNK.search(name) is not None

    def _way_out(self, metadata: Metadata | None, is_backbone: bool) -> str:
        if self.trained or (metadata is not None and not is_backbone):
            return "load a trained detector (model_final.pth) under the config it was trained with, " + (
                "not a backbone" if is_backbone else "or start from its backbone's .pkl instead"
            )
        if metadata is None:
            return f'if it is a classifier, {CONVERT}; MODEL.WEIGHTS "" starts at random'
        return f"set MODEL.ROBUST.ARCH {metadata.arch} and MODEL.RESNETS.NORM FrozenBN, BN or SyncBN"


def _described(problems: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{len(names)} tensors {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    )


def _without_module(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By their names outside DistributedDataParallel, as Detectron2 loads them."""
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()} if wrapped else tensors


def _dict(content, path: str) -> dict:
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no weights by name: check MODEL.WEIGHTS")
    return content


def _of_absent_stage(name: str, stages: set[str]) -> bool:
    match = TRUNK.search(name)
    return match is not None and match[1] not in stages
