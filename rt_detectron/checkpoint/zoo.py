"""The published robust classifiers by name, and ``robust://NAME.pkl``: their Detectron2 backbones."""

import builtins
import errno
import functools
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from iopath.common.file_io import PathHandler

from rt_detectron.checkpoint.architectures import IMAGENET_MEAN, IMAGENET_STD
from rt_detectron.checkpoint.convert import UNIT_PIXELS, convert_checkpoint
from rt_detectron.checkpoint.formats import backbone_metadata, check_file
from rt_detectron.checkpoint.metadata import Metadata
from rt_detectron.utils.errors import InputError, did_you_mean, one_line, optional_import
from rt_detectron.utils.files import cache_folder, file_sha256, locked, text_sha256, write_text

logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("zoo.json")
PREFIX = "robust://"
# Where RobustBench's cache, by default the folder "models", has a file.
IN_ROBUSTBENCH = os.path.join("imagenet", "Linf")
BGR = "-bgr"  # ends the names of weights that absorb Detectron2's default preprocessing
# What an image is normalised by, mean and std of RGB in 0..255, by what the table calls it.
PIXELS = {
    "wrap": (IMAGENET_MEAN, IMAGENET_STD),
    "raw": UNIT_PIXELS,
    "clip": ((122.7709, 116.746, 104.0937), (68.5005, 66.6322, 70.3232)),
}


@dataclass(frozen=True)
class Entry:
    """One published checkpoint.

    Attributes:
        name: e.g. "resnet50_l2_eps3", for ``robust://resnet50_l2_eps3.pkl``.
        arch: a name of :data:`rt_detectron.checkpoint.architectures.ARCHITECTURES`, or ``timm/NAME``.
        norm, eps: the threat model of its training: "l2" with eps in [0,1] pixels, or "linf" in 1/255.
        file: where it is in a mirror; its last part is the name that it was published under.
        top1: accuracy on clean ImageNet, in percent as its source gives it; None if it does not.
        input_format: the order of the colours that it takes.
        size, sha256: of the file, in bytes and hexadecimal; None where not recorded.
        source: whose file it is, such as "robustbench".
        robust: accuracy under AutoAttack of that norm and eps, in percent; None where not published.
        pixels: a key of :data:`PIXELS`. "wrap": ImageNet's mean and std belong in front; "raw": it takes
            images in [0, 1] as they are; "clip": CLIP's mean and std.
        hub, revision: the repository on the Hugging Face Hub, and its commit; a file without both is
            brought by users.
        link: where users get such a file.
        licence: of the file, as its source states it; None if it does not.
        kind: "classifier", or "encoder" for one without classes.
    """

    name: str
    arch: str
    norm: str
    eps: float
    file: str
    top1: float | None
    input_format: str
    size: int | None
    sha256: str | None
    source: str
    robust: float | None = None
    pixels: str = "wrap"
    hub: str | None = None
    revision: str | None = None
    link: str | None = None
    licence: str | None = None
    kind: str = "classifier"

    @property
    def mean_and_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What an image is normalised by, RGB in 0..255."""
        return PIXELS[self.pixels]

    @property
    def is_downloaded(self) -> bool:
        """Whether we download the file, since a hash of it can be had; else users bring it."""
        return self.hub is not None and self.revision is not None

    @property
    def url(self) -> str:
        """Where the file can be had; ``$HF_ENDPOINT`` names another server than the Hub."""
        if not self.is_downloaded:
            return self.link or _sources()[self.source]["page"]
        endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        return f"{endpoint}/{self.hub}/resolve/{self.revision}/{self.published_name}"

    @property
    def published_name(self) -> str:
        """The file's name at its source."""
        return self.file.rpartition("/")[2]


@functools.cache
def _sources() -> dict[str, dict]:
    sources = json.loads(TABLE.read_text(encoding="utf-8"))["sources"]
    return {source["name"]: source for source in sources}


@functools.cache
def _entries() -> dict[str, Entry]:
    shared = ("hub", "revision", "licence")  # of a source, unless a checkpoint has its own
    entries = [
        Entry(**{**{key: source[key] for key in shared}, "source": name, **fields})
        for name, source in _sources().items()
        for fields in source["checkpoints"]
    ]
    return {entry.name: entry for entry in entries}


def list(
    norm: str | None = None, arch: str | None = None, eps: float | None = None, source: str | None = None
) -> "builtins.list[Entry]":
    """The published checkpoints, all or those of a norm ("l2", "linf"), an architecture, an eps, a source.

    Raises:
        InputError: for a norm, an architecture or a source that the table does not have.
    """
    for key, wanted in (("norm", norm), ("arch", arch), ("source", source)):
        known = dict.fromkeys(getattr(entry, key) for entry in _entries().values())
        if wanted is not None and wanted not in known:
            raise InputError(f"the zoo has no {key} {wanted!r}: {', '.join(known)}")
    filters = {"norm": norm, "arch": arch, "eps": eps, "source": source}
    return [
        entry
        for entry in _entries().values()
        if all(value is None or getattr(entry, key) == value for key, value in filters.items())
    ]


def find(name: str) -> Entry:
    """The published checkpoint ``name``, such as "resnet50_l2_eps3".

    Raises:
        InputError: if there is none, with the nearest names.
    """
    if name in _entries():
        return _entries()[name]
    plain = name.lower().replace("-", "_")
    same = [known for known in _entries() if known.lower().replace("-", "_") == plain]
    hint = did_you_mean(plain, same or _entries()) or did_you_mean(name, same or _entries())
    raise InputError(f"the zoo has no {name}; docs/MODEL_ZOO.md lists all names{hint}")


def checkpoint(name: str) -> str:
    """The local path of a published classifier's own file, verified.

    It is taken from the folder ``$RT_DETECTRON_ZOO`` if it is there. Else RobustBench's are taken from its
    own cache, and those that the Hub has from huggingface_hub's cache or the Hub, at the revision that the
    table pins; the others are brought by users alone. Size and SHA-256 must be those of the table. Where
    these are not recorded, a download must have the SHA-256 that the Hub announces, and the log says that a
    file that a user brings is used as it is.

    Raises:
        InputError: for an unknown name, a file that cannot be read or downloaded, and one with another hash.
    """
    return _verified(find(name))[0]


def weights(name: str) -> str:
    """The local path of the classifier if there is one, else of the backbone.

    The latter is ``NAME.pkl`` of the folder ``$RT_DETECTRON_ZOO``, where that has no file of the classifier.

    Raises:
        InputError: as for :func:`checkpoint`.
    """
    own = _in_mirror(f"{name}.pkl")
    if own and not (name in _entries() and _local(find(name))):
        _check_backbone(own, name)
        return own
    return checkpoint(name)


def backbone(name: str, force: bool = False) -> str:
    """The local path of a backbone ``.pkl``, converted once and cached.

    Whichever it is, our reader has read it and run no code of it, and it says of itself what its name says.
    The cache is :func:`.cache_folder`; the source's SHA-256 and the code that converts are part of its key.

    Args:
        name: of ``NAME.pkl`` in the folder ``$RT_DETECTRON_ZOO``, taken as it is, or of a published
            checkpoint; with ``-bgr`` at its end the weights absorb Detectron2's default preprocessing.
        force: download and convert again.

    Raises:
        InputError: as for :func:`checkpoint`, for a ``.pkl`` that is refused, and if the file cannot be
            converted or the cache be written.
    """
    _check_name(name)
    own = _in_mirror(f"{name}.pkl")
    if own:
        _check_backbone(own, name)
        return own
    entry = _find_for(name)
    source, sha256 = None, None if _local(entry) or force else _known_sha256(entry)
    if sha256 is None:
        source, sha256 = _verified(entry, force)
    output = os.path.join(cache_folder("zoo"), f"{sha256}-{_converter()}", f"{name}.pkl")
    if _is_backbone(output, name) and not force:
        return output
    with locked(output, "set RT_DETECTRON_CACHE to a folder that can be written"):
        if force or not _is_backbone(output, name):  # else another process converted it meanwhile
            source = source or checkpoint(entry.name)
            logger.info("converting %s to %s", source, output)
            input_format = "BGR" if name.endswith(BGR) else "RGB"
            convert_checkpoint(
                source, output, entry.arch, entry.norm, entry.eps, input_format, published=entry.mean_and_std
            )
    return output


@functools.cache
def _converter() -> str:
    """Changes with the code that reads and converts, all of which is in this folder."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return text_sha256("".join(path.read_text(encoding="utf-8") for path in sources))[:16]


def _check_backbone(path: str, name: str) -> None:
    """Raise :class:`InputError` for a ``.pkl`` that may run code, or is not ``name``."""
    found, known = backbone_metadata(path), _entries().get(name.removesuffix(BGR))
    wanted: dict[str, object] = {"input_format": "BGR"} if name.endswith(BGR) else {}
    if known:
        wanted = {"arch": known.arch, "norm": known.norm, "eps": known.eps, "input_format": "RGB", **wanted}
    wrong = [
        f"{key} {getattr(found, key)} instead of {value}"
        for key, value in wanted.items()
        if getattr(found, key) != value
    ]
    if wrong:
        raise InputError(
            f"{path} is not what its name says ({', '.join(wrong)}): rename it, or replace it by what "
            "tools/convert_checkpoint.py writes"
        )


def _is_backbone(path: str, name: str) -> bool:
    """Whether the cache has the file; one that is damaged counts as missing."""
    if not os.path.lexists(path):
        return False
    try:
        _check_backbone(path, name)
    except InputError as error:
        logger.warning("%s; it is made anew", error)
        return False
    return True


def metadata(name: str) -> Metadata:
    """What the ``.pkl`` that :func:`backbone` gives for ``name`` says of itself; nothing is downloaded.

    Raises:
        InputError: for an unknown name, and for a file in the folder ``$RT_DETECTRON_ZOO`` that is damaged.
    """
    _check_name(name)
    own = _in_mirror(f"{name}.pkl")
    if own:
        return backbone_metadata(own)
    entry = _find_for(name)
    pixel_mean, pixel_std = entry.mean_and_std
    rgb = Metadata(
        arch=entry.arch,
        norm=entry.norm,
        eps=entry.eps,
        input_format=entry.input_format,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        stride_in_1x1=False,
        source=entry.published_name,
        sha256=entry.sha256,
    )
    return rgb.folded() if name.endswith(BGR) else rgb


def name_in(path: str) -> str:
    """ "NAME" of ``robust://NAME.pkl``.

    Raises:
        InputError: for another ending.
    """
    name = path.removeprefix(PREFIX)
    if not name.endswith(".pkl"):
        stem = name.removesuffix(".ckpt").removesuffix(".pth")
        raise InputError(f"{path} names no backbone: write {PREFIX}{stem}.pkl")
    return name.removesuffix(".pkl")


def _check_name(name: str) -> None:
    if name != os.path.basename(name) or not name:
        raise InputError(f"robust://{name}.pkl: a name of the zoo has no folders: write robust://NAME.pkl")


def _find_for(name: str) -> Entry:
    try:
        return find(name.removesuffix(BGR))
    except InputError as error:
        folder = os.environ.get("RT_DETECTRON_ZOO") or "not set"
        raise InputError(f"no {name}.pkl in RT_DETECTRON_ZOO ({folder}), and {error}") from None


def _in_mirror(file: str) -> str | None:
    """The path of ``file`` in the folder ``$RT_DETECTRON_ZOO``, if it is there."""
    folder = os.environ.get("RT_DETECTRON_ZOO", "")
    if folder and not os.path.isdir(folder):
        raise InputError(f"RT_DETECTRON_ZOO is {folder}, which is no folder: set it to one, or unset it")
    path = os.path.join(folder, file)
    return path if folder and os.path.lexists(path) else None


def _local(entry: Entry) -> str | None:
    """The path of the entry's file in ``$RT_DETECTRON_ZOO`` or RobustBench's cache, if it is there."""
    path = _in_mirror(entry.file)
    if path is None and entry.source == "robustbench":
        path = _in_mirror(os.path.join(IN_ROBUSTBENCH, entry.file))
        caches = (os.path.join("models", IN_ROBUSTBENCH), os.path.join(torch.hub.get_dir(), "checkpoints"))
        found = (os.path.join(cache, entry.file) for cache in caches)
        path = path or next(filter(os.path.isfile, found), None)
    return path


def _verified(entry: Entry, force: bool = False) -> tuple[str, str]:
    """The local path of ``entry``'s file and its SHA-256."""
    path = _local(entry)
    if path is None and not entry.is_downloaded:
        raise InputError(f"there is no {entry.file}: {_by_hand(entry)}")
    if path is None:
        return _download(entry, force)
    if entry.sha256 is None:
        logger.warning("No SHA-256 of %s is known: %s is used as it is", entry.file, path)
    problem = _problem(path, entry, entry.sha256)
    if problem:
        raise InputError(f"{problem}: replace it by the published file or take it out of RT_DETECTRON_ZOO")
    return path, entry.sha256 or file_sha256(path)


def _problem(path: str, entry: Entry, sha256: str | None) -> str:
    """How the file differs from the published one; "" if it does not, as far as that is known."""
    try:
        check_file(path)
    except InputError as error:
        return str(error)
    size = os.path.getsize(path)
    if entry.size is not None and size != entry.size:
        return f"{path} has {size} bytes, but {entry.size} were published"
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        return f"{path} has SHA-256 {found}, but {sha256} was published"
    return ""


def _known_sha256(entry: Entry) -> str | None:
    """The file's SHA-256: as recorded in the table, or as announced when it was downloaded first."""
    if entry.sha256 is not None or not entry.is_downloaded:
        return entry.sha256
    try:
        return Path(_note(entry)).read_text().strip()
    except FileNotFoundError:
        return None


def _note(entry: Entry) -> str:
    """A file for what the Hub announced: its pinned revision never changes, and may be needed offline."""
    return os.path.join(cache_folder("zoo"), f"{entry.revision}-{entry.published_name}.sha256")


def _download(entry: Entry, force: bool) -> tuple[str, str]:
    try:
        huggingface_hub = optional_import("huggingface_hub", "huggingface_hub>=0.30", "downloads")
    except InputError as error:
        raise InputError(f"cannot download {entry.file}: {error}; or {_by_hand(entry)}") from None
    where = {"repo_id": entry.hub, "filename": entry.published_name, "revision": entry.revision}
    sha256 = _known_sha256(entry)
    # Networks, servers and disks fail in every way there is, and under the names of whichever HTTP package
    # this huggingface_hub is made on: hence the broad `except`.
    try:
        path = huggingface_hub.hf_hub_download(**where, force_download=force)
        announced = sha256 or _announced_sha256(path, huggingface_hub.hf_hub_url(**where))
    except Exception as error:
        raise InputError(f"cannot download {entry.file}: {_reason(error)}; or {_by_hand(entry)}") from None
    problem = _problem(path, entry, announced)
    if announced is None or problem:
        problem = problem or f"{entry.url} comes without a SHA-256 to verify it by"
        then = "it was removed; try again" if _discard(path) else "remove it and try again"
        raise InputError(f"{problem}: {then}, or {_by_hand(entry)}")
    if sha256 is None:
        write_text(_note(entry), f"{announced}\n")
    return path, announced


def _announced_sha256(path: str, url: str) -> str | None:
    """The Hub's ETag of a large file, which is its SHA-256; huggingface_hub names the cached file by it."""
    if os.path.islink(path):
        # The first link only: the cached file may be a link itself, into a store with other names.
        etag = os.path.basename(os.readlink(path))
    else:  # on disks without links
        from huggingface_hub import get_hf_file_metadata

        etag = get_hf_file_metadata(url).etag or ""
    is_sha256 = len(etag) == 64 and set(etag) <= set("0123456789abcdef")
    return etag if is_sha256 else None


def _discard(path: str) -> bool:
    """Remove a file from huggingface_hub's cache: the links and what they lead to, as far as that is in it.

    Returns:
        Whether ``path`` is gone.
    """
    from huggingface_hub import constants

    cache, link = Path(os.path.realpath(constants.HF_HUB_CACHE)), path
    while os.path.lexists(link) and Path(os.path.realpath(os.path.dirname(link))).is_relative_to(cache):
        target = os.path.join(os.path.dirname(link), os.readlink(link)) if os.path.islink(link) else ""
        os.remove(link)
        link = target
    return not os.path.lexists(path)


def _by_hand(entry: Entry) -> str:
    folder = os.environ.get("RT_DETECTRON_ZOO", "")
    if folder and entry.is_downloaded:
        return f"download {entry.url} to {os.path.join(folder, entry.file)}"
    other = ", or get it by RobustBench's load_model" if entry.source == "robustbench" else ""
    return (
        f"download {entry.url} to FOLDER/{entry.file} and export RT_DETECTRON_ZOO=FOLDER{other} "
        f"(RT_DETECTRON_ZOO is {folder or 'not set'})"
    )


def _reason(error: Exception) -> str:
    """Why a download failed and what to do, in a few words."""
    cause = error.__cause__  # what huggingface_hub wraps when it finds nothing in its cache either
    error = cause if isinstance(cause, Exception) else error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the server wants a login (status {status}): run `hf auth login` or set HF_TOKEN"
    if status == 404:
        return "the server does not have it (status 404)"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: free some space, or set HF_HOME to a folder on another disk"
    return one_line(error)[:300]


class RobustPathHandler(PathHandler):
    """Makes ``robust://NAME.pkl`` the file :func:`backbone` gives, wherever Detectron2 takes a path."""

    PREFIX = PREFIX

    def _get_supported_prefixes(self) -> builtins.list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        return backbone(name_in(path), force)

    def _isfile(self, path: str, **kwargs) -> bool:
        """Whether the name is in the mirror or was published; downloads nothing."""
        try:
            name = name_in(path)
            _check_name(name)
            return _in_mirror(f"{name}.pkl") is not None or bool(find(name.removesuffix(BGR)))
        except InputError:
            return False

    _exists = _isfile

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        if mode not in ("r", "rb"):
            raise InputError(f"{path}: the zoo is read-only")
        return open(self._get_local_path(path), mode, buffering)
