"""Find pictures and videos, draw on them, and write the results."""

import glob
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from tqdm import tqdm

from rt_detectron.utils.errors import InputError, one_line, optional_import
from rt_detectron.utils.files import printable, replaced_atomically
from rt_detectron.utils.pictures import read_upright

IMAGE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_WRITTEN_IMAGES = (".jpeg", ".jpg", ".png")  # other formats become JPEG
_DEFAULT_FPS = 25.0  # for a video without a frame rate


def find_media(inputs: Iterable[str]) -> tuple[list[Path], list[str]]:
    """The pictures and videos in files, folders (without subfolders) and glob patterns.

    Returns:
        Each file once, in the order of the inputs, a folder's sorted by name; and a line for each input
        without pictures and videos.
    """
    found: dict[Path, None] = {}
    problems = []
    for name in inputs:
        if os.path.isdir(name):
            endings = IMAGE_ENDINGS + VIDEO_ENDINGS
            paths = [path for path in sorted(Path(name).iterdir()) if path.suffix.lower() in endings]
            reason = f"the folder holds no picture or video ({' '.join(endings)})"
        else:
            names = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True))
            paths = [path for path in map(Path, names) if path.is_file()]
            reason = "there is no such file or folder, and no file matches it as a pattern"
        if not paths:
            problems.append(f"{name}: {reason}")
        found.update(dict.fromkeys(path.absolute() for path in paths))
    return list(found), problems


def output_paths(sources: Sequence[Path], folder: str | Path) -> list[Path]:
    """The path of each source's annotated copy: below ``folder`` as the source is below their common folder.

    So no two are the same. If a format cannot be written, the new ending is appended to the old one.

    Raises:
        InputError: if a source would be overwritten.
    """
    if not sources:
        return []
    common = os.path.commonpath([source.parent for source in sources])
    paths = []
    for source in sources:
        ending, written = source.suffix.lower(), ".mp4" if is_video(source) else ".jpg"
        keeps = ending == ".mp4" or ending in _WRITTEN_IMAGES
        below = source.relative_to(common)
        paths.append(Path(folder) / (below if keeps else below.with_name(below.name + written)))
    overwritten = {path.resolve() for path in paths} & {source.resolve() for source in sources}
    if overwritten:
        raise InputError(f"--output {folder} would overwrite {min(overwritten)}: give another folder")
    return paths


def annotate_files(
    jobs: Iterable[tuple[Path, Path]], annotate: Callable[[Image.Image], Image.Image]
) -> list[str]:
    """Apply ``annotate`` to each picture, or each frame of a video, and write the result atomically.

    Args:
        jobs: (source, output) for each file. The path of an output is printed when it is written.

    Returns:
        A line for each source that could not be read. The others are still written.
    """
    problems = []
    for source, output in jobs:
        try:
            _make_folder(output.parent)
            (_annotate_video if is_video(source) else _annotate_picture)(source, output, annotate)
            print(printable(str(output)), flush=True)
        except InputError as error:
            problems.append(str(error))
    return problems


def load_picture(path: str | Path) -> Image.Image:
    """:func:`rt_detectron.utils.pictures.read_upright` of a file.

    Raises:
        InputError: naming the file, if it cannot be read as a picture.
    """
    try:
        return read_upright(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a picture ({one_line(error)})") from None


def is_video(path: Path) -> bool:
    """Whether a file is taken for a video, by its ending."""
    return path.suffix.lower() in VIDEO_ENDINGS


def _opencv() -> ModuleType:
    """OpenCV, which only videos need."""
    return optional_import("cv2", "opencv-python-headless", "videos")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be made a folder ({error.strerror}): choose another output"
        ) from None


def _annotate_picture(source: Path, output: Path, annotate: Callable[[Image.Image], Image.Image]) -> None:
    picture = load_picture(source)
    try:
        picture = annotate(picture)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    with replaced_atomically(output) as temporary:
        picture.save(temporary, "PNG" if output.suffix.lower() == ".png" else "JPEG", quality=95)


def _annotate_video(source: Path, output: Path, annotate: Callable[[Image.Image], Image.Image]) -> None:
    cv2 = _opencv()
    with _opened(source) as capture, tempfile.TemporaryDirectory(dir=output.parent) as folder:
        fps = capture.get(cv2.CAP_PROP_FPS)
        fps = fps if np.isfinite(fps) and fps > 0 else _DEFAULT_FPS
        count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT))) or None  # some containers do not say
        part = os.path.join(folder, output.name)  # cv2 chooses the format by the ending
        writer = None
        try:
            for frame in tqdm(_frames(capture), desc=source.name, total=count, unit="frame"):
                picture = _even(np.asarray(annotate(frame)))
                if writer is None:
                    size = picture.shape[1::-1]
                    writer = cv2.VideoWriter(part, cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
                writer.write(picture[:, :, ::-1])
        finally:
            if writer is not None:
                writer.release()
        if writer is None:
            raise InputError(f"{source}: the video has no readable frame")
        if not os.path.isfile(part):
            raise InputError(f"{output}: OpenCV cannot write MP4 here; its build needs FFmpeg")
        os.replace(part, output)


@contextmanager
def _opened(source: Path) -> Iterator:
    capture = _opencv().VideoCapture(str(source))
    try:
        if not capture.isOpened():
            raise InputError(f"{source}: cannot be read as a video")
        yield capture
    finally:
        capture.release()


def _frames(capture) -> Iterator[Image.Image]:
    while True:
        is_there, frame = capture.read()
        if not is_there:
            return
        yield Image.fromarray(np.ascontiguousarray(frame[:, :, ::-1]))


def _even(picture: np.ndarray) -> np.ndarray:
    """Crop to an even height and width, since players need colours in blocks of two by two."""
    height, width = picture.shape[:2]
    return picture[: height - height % 2, : width - width % 2]
