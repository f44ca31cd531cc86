"""Annotations in the formats of Pascal VOC, YOLO and LabelMe, read as COCO's.

Each reader gives the content of a COCO file, whose file names are relative to the folder. What it cannot read
stops it, so that no object is lost silently.
"""

import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pycocotools import mask as rle_masks

from rt_detectron.data.annotations import annotations_of
from rt_detectron.utils.errors import InputError, did_you_mean, one_line
from rt_detectron.utils.pictures import upright_size

IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_VOC_SIDES = ("xmin", "ymin", "xmax", "ymax")
_ROUNDING = 0.01  # by how much a YOLO number may lie outside of the image


class CocoContent:
    """The content of a COCO file, as it is put together image by image.

    Args:
        folder: that file names are relative to.
        classes: in the order of their ids, which count from 1.

    Raises:
        InputError: for classes that are not text, or two of the same name.
    """

    def __init__(self, folder: Path, classes: Sequence[str]):
        for name in classes:
            if not isinstance(name, str) or not name or classes.count(name) > 1:
                raise InputError(f"{folder}: {name!r} is no name of a class, or of two: {list(classes)}")
        self.folder = folder
        self.ids = {name: number for number, name in enumerate(classes, start=1)}
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add_image(self, path: Path, size: tuple[int, int]) -> None:
        """Later objects are of this image, of ``size`` (width, height)."""
        name = os.path.relpath(path, self.folder)
        self.images.append(
            {"id": len(self.images) + 1, "file_name": name, "width": size[0], "height": size[1]}
        )

    def add_box(self, label: str, x: float, y: float, width: float, height: float) -> None:
        self._add(label, bbox=[x, y, width, height], area=width * height)

    def add_polygons(self, label: str, polygons: list[list[float]]) -> None:
        """One object, of polygons x, y, x, y, ... in pixels."""
        image = self.images[-1]
        xs = [x for polygon in polygons for x in polygon[::2]]
        ys = [y for polygon in polygons for y in polygon[1::2]]
        mask = rle_masks.merge(rle_masks.frPyObjects(polygons, image["height"], image["width"]))
        self._add(
            label,
            bbox=[min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
            area=float(rle_masks.area(mask)),
            segmentation=polygons,
        )

    def _add(self, label: str, **shape: Any) -> None:
        common = {"id": len(self.annotations) + 1, "image_id": self.images[-1]["id"], "iscrowd": 0}
        self.annotations.append({**common, "category_id": self.ids[label], **shape})

    def content(self) -> dict:
        categories = [{"id": number, "name": name} for name, number in self.ids.items()]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}


def read_voc(folder: Path, split: str) -> dict:
    """Pascal VOC: ``Annotations/*.xml``, ``JPEGImages``, and ``ImageSets/Main/SPLIT.txt``.

    Boxes only, as in VOC from pixel 1 on and with their last pixel. Objects marked as difficult or truncated
    are objects like the others. The classes are those of all splits, by name.
    """
    lines = _lines(folder / "ImageSets" / "Main" / f"{split}.txt")
    names = [line.split()[0] for line in lines]  # behind a name may stand 1 or -1, for one class's objects
    trees = {path.stem: _xml(path) for path in sorted((folder / "Annotations").glob("*.xml"))}
    labels = {label.text or "" for tree in trees.values() for label in tree.iterfind("object/name")}
    found = CocoContent(folder, sorted(labels))
    for name in names:
        path = folder / "Annotations" / f"{name}.xml"
        if name not in trees:
            raise InputError(f"{path}: there is no such file, which {split}.txt asks for")
        tree = trees[name]
        with annotations_of(str(path)):
            image = _voc_image(folder, name, tree)
            found.add_image(image, _size(image, tree.findtext("size/width"), tree.findtext("size/height")))
            for each in tree.iterfind("object"):
                sides = (each.findtext(f"bndbox/{side}", "nothing") for side in _VOC_SIDES)
                x1, y1, x2, y2 = map(float, sides)
                found.add_box(each.findtext("name") or "", x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1)
    return found.content()


def read_yolo(folder: Path, split: str) -> dict:
    """YOLO: a ``data.yaml`` with ``names`` and the images of each split, and a text file for each image.

    Without a ``data.yaml``, ``classes.txt`` names the classes, and images are in ``images/SPLIT``, or in
    ``images`` without a split. The text file is at the image's path with ``labels`` for ``images``. A line is
    a box (class, x and y of its middle, width, height) or a polygon (class, x, y, x, y, ...), in parts of the
    image's size. An image without a file has no object. Keypoints and predictions are not read; a box that is
    turned is read as the polygon of its corners.
    """
    classes, images = _yolo_layout(folder, split)
    found = CocoContent(folder, classes)
    for image in images:
        size = _size(image)
        found.add_image(image, size)
        path = _yolo_labels(image)
        for number, line in enumerate(_lines(path) if path.exists() and any(size) else (), start=1):
            try:
                _add_yolo_object(found, line.split(), classes)
            except ValueError as error:
                raise InputError(f"{path}: line {number}: {error}") from None
    return found.content()


def read_labelme(folder: Path, split: str) -> dict:
    """LabelMe: a JSON file for each image, polygons and rectangles.

    Shapes with the same label and ``group_id`` are one object. Rectangles have no mask. The classes are those
    of a ``labels.txt`` in the folder or the one above, else all labels of the folder, by name.
    """
    if split:
        raise InputError(f"labelme:{folder}:{split}: name one folder for each split, without {split!r}")
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no LabelMe annotations (*.json)")
    files = {}
    labels: set[str] = set()
    for path in paths:
        with annotations_of(str(path)):
            files[path] = json.loads(path.read_text(encoding="utf-8"))
            labels.update(_text(shape["label"]) for shape in files[path]["shapes"])
    found = CocoContent(folder, _labelme_classes(folder, labels))
    for path, content in files.items():
        with annotations_of(str(path)):
            image = path.parent / content["imagePath"].replace("\\", "/")
            found.add_image(image, _size(image, content.get("imageWidth"), content.get("imageHeight")))
            _add_shapes(found, content["shapes"], path)
    return found.content()


READERS = {"voc": read_voc, "yolo": read_yolo, "labelme": read_labelme}


def _voc_image(folder: Path, name: str, tree: ElementTree.Element) -> Path:
    images = folder / "JPEGImages"
    names = [tree.findtext("filename") or name, *(f"{name}{ending}" for ending in IMAGE_ENDINGS)]
    return next((images / each for each in names if (images / each).is_file()), images / f"{name}.jpg")


def _yolo_layout(folder: Path, split: str) -> tuple[list[str], list[Path]]:
    """The classes in their order, and the images."""
    listed = folder / "classes.txt"
    files = [folder / "data.yaml", *sorted(folder.glob("*.y*ml"))]
    path = next((path for path in files if path.is_file()), None)
    if path is None and not listed.is_file():
        raise InputError(f"{folder}: neither data.yaml nor classes.txt, which name a YOLO set's classes")
    if path is None:
        return _lines(listed), _images_in(folder / "images" / split)
    with annotations_of(str(path)):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(one_line(error)) from None
        names = content["names"]
        classes = [names[index] for index in range(len(names))]  # a list, or a dict by index
        if "kpt_shape" in content:
            raise InputError(f"{path}: a set with keypoints (kpt_shape), which are not read")
        if split not in content:
            splits = [key for key in ("train", "val", "test") if content.get(key)]
            raise InputError(f"{path}: has no {split!r}; splits are {', '.join(splits)}")
        given = content[split] if isinstance(content[split], list) else [content[split]]
        folders = [_beside(path, content.get("path"), each) for each in given]
        return classes, [image for each in folders for image in _images_in(each)]


def _beside(file: Path, root: str | None, given: str) -> Path:
    """A path of data.yaml: below its "path", else its own folder, which "../" in front may mean as well."""
    folder = file.parent / (root or "")
    known = [folder / given, file.parent / given, file.parent / given.removeprefix("../")]
    return next((path for path in known if path.exists()), known[0])


def _images_in(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.suffix.lower() in IMAGE_ENDINGS)
    elif path.suffix == ".txt":
        found = [path.parent / line for line in _lines(path)]
    else:
        raise InputError(f"{path}: there is no such folder of images")
    if not found:
        raise InputError(f"{path}: holds no image")
    return found


def _yolo_labels(image: Path) -> Path:
    before, folder, behind = str(image).rpartition(f"{os.sep}images{os.sep}")
    path = Path(f"{before}{os.sep}labels{os.sep}{behind}") if folder else image
    return path.with_suffix(".txt")


def _add_yolo_object(found: CocoContent, words: list[str], classes: list[str]) -> None:
    index, values = int(words[0]), [float(word) for word in words[1:]]
    if not 0 <= index < len(classes):
        raise ValueError(f"there is no class {index}; {len(classes)} are named")
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in values):
        raise ValueError("a number lies outside of 0 to 1, the image's size")
    size = found.images[-1]["width"], found.images[-1]["height"]
    pixels = [min(max(value, 0.0), 1.0) * size[position % 2] for position, value in enumerate(values)]
    if len(pixels) == 4:
        x, y, width, height = pixels
        found.add_box(classes[index], x - width / 2, y - height / 2, width, height)
    elif len(pixels) >= 6 and len(pixels) % 2 == 0:
        found.add_polygons(classes[index], [pixels])
    else:
        raise ValueError("neither a box of 4 numbers nor a polygon of 6, 8, ...")


def _labelme_classes(folder: Path, labels: set[str]) -> list[str]:
    for path in (folder / "labels.txt", folder.parent / "labels.txt"):
        if path.is_file():
            classes = [line for line in _lines(path) if not line.startswith("_")]  # _background_, __ignore__
            if unknown := labels - set(classes):
                name = min(unknown)
                hint = did_you_mean(name, classes)
                raise InputError(f"{folder}: the label {name!r} is not in {path}{hint}")
            return classes
    return sorted(labels)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _add_shapes(found: CocoContent, shapes: list[dict], path: Path) -> None:
    polygons: dict[tuple, list[list[float]]] = {}
    for number, shape in enumerate(shapes):
        kind, points = shape.get("shape_type", "polygon"), shape["points"]
        if kind == "rectangle" and len(points) == 2:
            (x1, y1), (x2, y2) = points
            found.add_box(shape["label"], min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1))
        elif kind == "polygon" and len(points) >= 3:
            group = shape.get("group_id")
            key = (shape["label"], number if group is None else f"group {group}")
            polygons.setdefault(key, []).append([float(value) for point in points for value in point])
        else:
            raise InputError(
                f"{path}: shape {number} is a {kind} of {len(points)} points; only rectangles of two points "
                "and polygons of three or more are read"
            )
    for (label, _), parts in polygons.items():
        found.add_polygons(label, parts)


def _size(image: Path, width: Any = None, height: Any = None) -> tuple[int, int]:
    """As written down, else of the image itself; (0, 0) if it cannot be read, which is told later."""
    if width and height and int(width) and int(height):
        return int(width), int(height)
    try:
        with open(image, "rb") as file:
            return upright_size(file)
    except OSError:
        return 0, 0


def _xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise InputError(f"{path}: not an XML file ({one_line(error)})") from None


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    with annotations_of(str(path)):
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
