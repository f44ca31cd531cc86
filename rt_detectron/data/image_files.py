"""The image files of a detection set: checked before a training starts, and again whenever one is read."""

import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from rt_detectron.data.unreadable import UnreadableImages
from rt_detectron.utils.errors import InputError, one_line
from rt_detectron.utils.pictures import DepthError, check_narrow, read_upright, upright_size

logger = logging.getLogger(__name__)

SKIPPING = "INPUT.ON_CORRUPT skip"
_THREADS = 4  # network file systems answer several at once; more only compete for Python's lock
_SECONDS = 60.0
_MOST_NAMED = 3


class _Problem(NamedTuple):
    number: int  # of the image
    text: str
    unreadable: bool  # it may be skipped; the others do not fit the annotations or the detector


def check_image(record: dict, verify: bool = False) -> None:
    """Check the image of a dataset dict by its header and its last bytes.

    Args:
        verify: as for :func:`.upright_size`.

    Raises:
        OSError: if it is missing, truncated, not an image, or has more pixels than Pillow reads.
        InputError: if it can be read but does not fit: another size than the annotations say, or one channel
            of more than 8 bits.
    """
    path = record["file_name"]
    try:
        with PathManager.open(path, "rb") as file:
            size = upright_size(file, verify)
    except FileNotFoundError:
        raise OSError("there is no such file") from None
    except DepthError as error:
        raise InputError(f"{path}: {error}") from None
    said = record.get("width", size[0]), record.get("height", size[1])
    if size != said:
        way_out = "correct the annotations' width and height"
        if size == said[::-1]:  # most often the sizes, and maybe the boxes, are those of the stored pixels
            way_out += ", or remove the EXIF tag by which it is turned if the boxes are for the stored pixels"
        raise InputError(
            f"{path}: is {size[0]} x {size[1]} pixels, turned upright, but {said[0]} x {said[1]} in its "
            f"annotations: {way_out}"
        )


def check_images(
    records: Sequence[dict], on_corrupt: str = "stop", skipping: str = SKIPPING, seconds: float = _SECONDS
) -> list[dict]:
    """``records`` without those whose image cannot be read.

    All are looked at before a training starts, since it reads each of them sooner or later: header and last
    bytes only, about 0.2 ms for an image, shared among the processes. If this takes longer than ``seconds``,
    as on a slow disk, the rest are checked when they are read, by :class:`CheckedMapper`.

    Args:
        records: dataset dicts, in all processes the same.
        on_corrupt: "stop" or "skip", for images that cannot be read. Those that do not fit always stop.
        skipping: what sets "skip", for messages; "" if nothing does.

    Raises:
        InputError: in all processes, naming an image and how many more there are.
    """
    skips = UnreadableImages(on_corrupt, skipping).policy == "skip"  # checks the value, too
    problems = sorted(each for part in comm.all_gather(_find_problems(records, seconds)) for each in part)
    stopping = [problem for problem in problems if not (skips and problem.unreadable)]
    if stopping:
        first, more = stopping[0], len(stopping) - 1
        way_out = "; repair or delete it" if first.unreadable else ""
        way_out += f", or set {skipping}" if first.unreadable and skipping else ""
        raise InputError(first.text + way_out + (f" ({more} more images have such faults)" if more else ""))
    if problems:
        examples = "; ".join(problem.text for problem in problems[:_MOST_NAMED])
        logger.warning("Skipped %d of %d images: %s", len(problems), len(records), examples)
    if len(problems) == len(records):
        raise InputError(f"none of the {len(records)} images can be read, such as {problems[0].text}")
    skipped = {problem.number for problem in problems}
    return [record for number, record in enumerate(records) if number not in skipped]


def _find_problems(records: Sequence[dict], seconds: float) -> list[_Problem]:
    """Those in this process's share of the images, as far as the time allows."""
    share = list(range(comm.get_rank(), len(records), comm.get_world_size()))
    random.Random(0).shuffle(share)  # so that a part of them shows what they are like
    end = time.monotonic() + seconds

    def look(number: int) -> _Problem | None:
        if time.monotonic() > end:
            return None
        try:
            check_image(records[number])
        except OSError as error:
            text = f"{records[number]['file_name']}: cannot be read ({one_line(error)})"
            return _Problem(number, text, unreadable=True)
        except InputError as error:
            return _Problem(number, str(error), unreadable=False)
        return None

    with ThreadPoolExecutor(_THREADS) as threads:
        silent = None if comm.is_main_process() else True  # None: where there is no terminal
        bar = tqdm(threads.map(look, share), "images", len(share), leave=False, delay=2, disable=silent)
        problems = [problem for problem in bar if problem is not None]
    if time.monotonic() > end:
        logger.info("Checked images for %.0f s; the others are checked when they are read", seconds)
    return problems


class CheckedMapper:
    """A DatasetMapper that names the file of an image that cannot be read or does not fit.

    Args:
        mapper: Detectron2's DatasetMapper, or any other function of a dataset dict that reads its image.
        on_corrupt: "stop", or "skip": the mapper gives None for an image that cannot be read, and
            Detectron2's loader takes another one. Not for test sets, whose AP would be of other images.
        skipping: what sets "skip", for messages; "" if nothing does.

    Raises:
        InputError: when called, instead of the errors of Pillow and Detectron2.
    """

    def __init__(self, mapper: Callable[[dict], dict], on_corrupt: str = "stop", skipping: str = SKIPPING):
        self.mapper = mapper
        self.unreadable = UnreadableImages(on_corrupt, skipping)

    def __call__(self, record: dict) -> dict | None:
        path = record["file_name"]
        try:
            check_image(record, verify=True)
        except OSError as error:
            self.unreadable.report(path, error)
            return None
        try:
            return self.mapper(record)
        except InputError:
            raise
        except Exception as error:
            try:
                with PathManager.open(path, "rb") as file:
                    size = read_upright(file).size
            except OSError as fault:  # it is the image's, although its header is sound
                self.unreadable.report(path, fault)
                return None
            check_narrow(error, *size, path)
            # OSError: another file's, such as that of the semantic segmentation.
            if isinstance(error, OSError | SizeMismatchError):
                raise InputError(f"{path}: {one_line(error)}") from None
            raise
