"""Own data by name: one small set written in every format is the same set, and each mistake is one line."""

import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.structures import BoxMode
from PIL import Image

from rt_detectron.data import check_datasets, classes_of
from rt_detectron.data.own import split_modifiers
from rt_detectron.utils.errors import InputError

WIDTH, HEIGHT = 100, 80
CLASSES = ["ant", "bee"]
# By image: label and x, y, width, height, in whole pixels.
OBJECTS = {"a": [("bee", [10, 20, 30, 40])], "b": [("ant", [0, 0, 100, 80]), ("bee", [5, 6, 7, 8])], "c": []}


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "cache"))
    before = set(DatasetCatalog.list())
    yield
    forget(set(DatasetCatalog.list()) - before)


def forget(names):
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(OBJECTS):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 50 * number, np.uint8)).save(folder / f"{name}.jpg")
    return folder


def corners(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def scaled(values):
    return [value / (WIDTH, HEIGHT)[position % 2] for position, value in enumerate(values)]


@pytest.fixture
def coco(tmp_path):
    annotations = []
    for image_id, objects in enumerate(OBJECTS.values(), start=1):
        for label, box in objects:
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, "bbox": box}
            annotation |= {"category_id": CLASSES.index(label) + 1, "area": box[2] * box[3]}
            annotations.append({**annotation, "segmentation": [corners(box)]})
    content = {
        "images": [
            {"id": i, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT}
            for i, name in enumerate(OBJECTS, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
        "annotations": annotations,
    }
    images(tmp_path / "photos")
    (tmp_path / "set.json").write_text(json.dumps(content))
    return f"coco:{tmp_path}/set.json:{tmp_path}/photos"


@pytest.fixture
def voc(tmp_path):
    folder = tmp_path / "voc"
    images(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\nb\nc\n")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("a  1\n")
    for name, objects in OBJECTS.items():
        lines = [f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"]
        for label, (x, y, w, h) in objects:
            sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
            box = "".join(f"<{side}>{value}</{side}>" for side, value in sides.items())
            lines.append(
                f"<object><name>{label}</name><difficult>1</difficult><bndbox>{box}</bndbox></object>"
            )
        path = folder / "Annotations" / f"{name}.xml"
        path.write_text(f"<annotation><filename>{name}.jpg</filename>{''.join(lines)}</annotation>")
    return f"voc:{folder}:train"


@pytest.fixture
def yolo(tmp_path):
    folder = tmp_path / "yolo"
    images(folder / "images" / "train")
    (folder / "labels" / "train").mkdir(parents=True)
    for name, objects in OBJECTS.items():
        if objects:  # an image without objects has no file
            lines = [
                " ".join(map(str, [CLASSES.index(label), *scaled([x + w / 2, y + h / 2, w, h])]))
                for label, (x, y, w, h) in objects
            ]
            (folder / "labels" / "train" / f"{name}.txt").write_text("\n".join(lines) + "\n\n")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nnames: {0: ant, 1: bee}\n")
    return f"yolo:{folder}:train"


@pytest.fixture
def labelme(tmp_path):
    folder = images(tmp_path / "labelme")
    for name, objects in OBJECTS.items():
        shapes = [
            {"label": label, "points": np.reshape(corners(box), (4, 2)).tolist(), "shape_type": "polygon"}
            for label, box in objects
        ]
        content = {"imagePath": f"{name}.jpg", "imageHeight": HEIGHT, "imageWidth": WIDTH, "shapes": shapes}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return f"labelme:{folder}"


def objects_of(name) -> list:
    """(file, size, [(class, box) ...]) of each image, as Detectron2 loads the set."""
    check_datasets([name])
    found = []
    for record in get_detection_dataset_dicts(name, filter_empty=False):
        assert os.path.isfile(record["file_name"])
        objects = []
        for annotation in record["annotations"]:
            assert annotation["bbox_mode"] == BoxMode.XYWH_ABS
            label = MetadataCatalog.get(name).thing_classes[annotation["category_id"]]
            objects.append((label, np.round(annotation["bbox"], 6).tolist()))
        found.append((os.path.basename(record["file_name"])[0], record["width"], record["height"], objects))
    return found


def message(*names) -> str:
    with pytest.raises(InputError) as error:
        check_datasets(names)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("format", ["coco", "voc", "yolo", "labelme"])
class TestAllFormats:
    @pytest.fixture
    def name(self, format, request):
        return request.getfixturevalue(format)

    def test_are_the_same_set(self, name):
        expected = [(image, WIDTH, HEIGHT, objects) for image, objects in OBJECTS.items()]
        assert objects_of(name) == expected
        assert classes_of(name) == CLASSES
        assert MetadataCatalog.get(name).evaluator_type == "coco"
        with open(MetadataCatalog.get(name).json_file) as file:
            annotations = json.load(file)["annotations"]
        assert np.allclose([annotation["area"] for annotation in annotations], [1200, 8000, 56])
        check_datasets([name])  # once more is no error

    def test_modifiers_stand_behind(self, name):
        assert [objects for *_, objects in objects_of(f"{name}@ant")] == [[], [("ant", [0, 0, 100, 80])], []]
        check_datasets([f"{name}@any@fit", f"{name}@any@held_out"])
        sizes = [
            len(get_detection_dataset_dicts(f"{name}@any@{part}", filter_empty=False))
            for part in ("fit", "held_out")
        ]
        assert sizes == [2, 1]

    def test_paths_may_be_relative_or_of_the_home(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        expected = objects_of(name)
        assert objects_of(name.replace(f"{tmp_path}/", "")) == expected
        assert objects_of(name.replace(f"{tmp_path}/", "~/")) == expected

    def test_a_missing_path_is_named(self, name, tmp_path):
        wrong = name.replace(str(tmp_path), "nowhere")
        assert "nowhere" in message(wrong).removeprefix(f"dataset {wrong}")


class TestNames:
    def test_an_at_sign_in_a_path(self, coco, tmp_path):
        assert split_modifiers(f"{coco}@bee@fit") == (coco, ["bee", "fit"])
        odd = tmp_path / "me@home"
        odd.mkdir()
        images(odd / "photos@2x")
        (odd / "set.json").write_text((tmp_path / "set.json").read_text())
        name = f"coco:{odd}/set.json:{odd}/photos@2x"
        assert split_modifiers(f"{name}@bee") == (name, ["bee"])
        assert len(objects_of(f"{name}@bee")) == 3

    @pytest.mark.parametrize("name", ["coco:a.json", "coco:a:b:c", "voc:folder", "voc:", "yolo:", "labelme:"])
    def test_another_form_is_refused(self, name):
        kind = name.partition(":")[0]
        assert message(name).startswith(f"dataset {name}: write {kind}:")

    def test_an_unknown_name_shows_the_forms(self):
        assert "coco:ANNOTATIONS.json:IMAGES_FOLDER, voc:FOLDER:SPLIT" in message("zzz")


@pytest.mark.parametrize("format", ["voc", "yolo", "labelme"])
def test_links_to_nowhere_and_folders_for_files_are_one_line(format, request, tmp_path):
    name = request.getfixturevalue(format)
    path = tmp_path / {"voc": "voc/Annotations/b.xml", "yolo": "yolo/labels/train/b.txt"}.get(
        format, "labelme/b.json"
    )
    path.unlink()
    path.mkdir()
    assert str(path) in message(name)
    path.rmdir()
    path.symlink_to("nowhere")
    if format != "yolo":  # there, an image without a file has no object
        assert str(path) in message(name)


def test_it_is_read_again_when_a_file_changes(yolo, tmp_path):
    objects_of(yolo)
    file = MetadataCatalog.get(yolo).json_file
    forget([yolo])
    objects_of(yolo)
    assert MetadataCatalog.get(yolo).json_file == file
    forget([yolo])
    (tmp_path / "yolo" / "labels" / "train" / "c.txt").write_text("0 0.5 0.5 0.2 0.1\n")
    assert objects_of(yolo)[2][3] == [("ant", [40, 36, 20, 8])]


class TestVoc:
    def test_detectron2s_reader_finds_the_same(self, voc, tmp_path):
        theirs = load_voc_instances(str(tmp_path / "voc"), "train", CLASSES)
        ours = objects_of(voc)
        for (_, width, height, objects), record in zip(ours, theirs, strict=True):
            assert (width, height) == (record["width"], record["height"])
            boxes = [
                BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYWH_ABS) for a in record["annotations"]
            ]
            assert [box for _, box in objects] == boxes

    def test_every_split_has_all_classes(self, voc):
        name = voc.replace(":train", ":val")
        assert objects_of(name) == [("a", WIDTH, HEIGHT, OBJECTS["a"])]
        assert classes_of(name) == CLASSES

    def test_mistakes(self, voc, tmp_path):
        assert "Main/trian.txt: there is no such file" in message(voc.replace("train", "trian"))
        path = tmp_path / "voc" / "Annotations" / "b.xml"
        path.write_text("<annotation><object><name>ant</name></object></annotation>")
        assert message(voc).startswith(f"{path}: not usable annotations (")
        path.write_text("<annotation>")
        assert message(voc).startswith(f"{path}: not an XML file")
        path.unlink()
        assert message(voc) == f"{path}: there is no such file, which train.txt asks for"


class TestYolo:
    def test_polygons(self, yolo, tmp_path):
        path = tmp_path / "yolo" / "labels" / "train" / "c.txt"
        path.write_text(" ".join(map(str, [1, *scaled(corners([10, 8, 50, 40]))])))
        check_datasets([yolo])
        (annotation,) = get_detection_dataset_dicts(yolo, filter_empty=False)[2]["annotations"]
        assert np.allclose(annotation["bbox"], [10, 8, 50, 40])
        assert np.allclose(annotation["segmentation"], [corners([10, 8, 50, 40])])

    def test_without_a_yaml_and_a_split(self, yolo, tmp_path):
        folder = tmp_path / "yolo"
        expected = objects_of(yolo)
        (folder / "data.yaml").unlink()
        (folder / "classes.txt").write_text("ant\nbee\n")
        assert objects_of(f"yolo:{folder}:train") == expected
        flat = tmp_path / "flat"
        (folder / "images" / "train").rename(folder / "images.tmp")
        (folder / "labels" / "train").rename(folder / "labels.tmp")
        flat.mkdir()
        for part in ("images", "labels"):
            (folder / f"{part}.tmp").rename(flat / part)
        (folder / "classes.txt").rename(flat / "classes.txt")
        assert objects_of(f"yolo:{flat}") == expected

    def test_the_yaml_of_an_export_points_beside_its_folder(self, yolo, tmp_path):
        (tmp_path / "yolo" / "data.yaml").write_text("train: ../images/train\nnames: [ant, bee]\n")
        assert len(objects_of(yolo)) == 3

    def test_a_list_of_images(self, yolo, tmp_path):
        (tmp_path / "yolo" / "train.txt").write_text("./images/train/b.jpg\n")
        (tmp_path / "yolo" / "data.yaml").write_text("train: train.txt\nnames: [ant, bee]\n")
        assert objects_of(yolo) == [("b", WIDTH, HEIGHT, OBJECTS["b"])]

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("2 0.5 0.5 0.1 0.1", "there is no class 2; 2 are named"),
            ("-1 0.5 0.5 0.1 0.1", "there is no class -1"),
            ("0 0.5 0.5 0.1", "neither a box of 4 numbers nor a polygon"),
            ("0 0.5 0.5 0.1 0.1 0.9", "neither a box of 4 numbers nor a polygon"),
            ("0 50 50 10 10", "outside of 0 to 1"),
            ("0 nan 0.5 0.1 0.1", "outside of 0 to 1"),
            ("ant 0.5 0.5 0.1 0.1", "ant"),
        ],
    )
    def test_a_wrong_line_is_named(self, yolo, tmp_path, line, words):
        path = tmp_path / "yolo" / "labels" / "train" / "b.txt"
        path.write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
        text = message(yolo)
        assert text.startswith(f"{path}: line 2: ")
        assert words in text

    def test_mistakes(self, yolo, tmp_path):
        path = tmp_path / "yolo" / "data.yaml"
        assert message(yolo.replace(":train", ":test")) == f"{path}: has no 'test'; splits are train"
        path.write_text("train: images/none\nnames: [ant, bee]\n")
        assert "images/none: there is no such folder of images" in message(yolo)
        path.write_text("train: images/train\nnames: [ant, bee]\nkpt_shape: [17, 3]\n")
        assert "keypoints (kpt_shape), which are not read" in message(yolo)
        for text in (
            "train: images/train\n",
            "names: [a",
            "names: [a, b]\ntrain: 3\n",
            "path: 3\nnames: [a]\ntrain: x\n",
        ):
            path.write_text(text)
            assert message(yolo).startswith(f"{path}: not usable annotations (")
        for names in ("[a, a]", "[1, 2]", "[null, a]"):
            path.write_text(f"train: images/train\nnames: {names}\n")
            assert "is no name of a class, or of two" in message(yolo)
        path.unlink()
        assert "neither data.yaml nor classes.txt" in message(yolo)


class TestLabelMe:
    def change(self, tmp_path, *shapes, **keys):
        path = tmp_path / "labelme" / "c.json"
        content = {**json.loads(path.read_text()), "shapes": list(shapes), **keys}
        path.write_text(json.dumps(content))
        return path

    def test_rectangles_and_groups(self, labelme, tmp_path):
        triangle = [[0, 0], [9, 0], [9, 9]]
        moved = [[x + 20, y] for x, y in triangle]
        self.change(
            tmp_path,
            {"label": "ant", "points": [[30, 40], [10, 20]], "shape_type": "rectangle", "group_id": None},
            {"label": "bee", "points": triangle, "shape_type": "polygon", "group_id": 4},
            {"label": "bee", "points": moved, "shape_type": "polygon", "group_id": 4},
            imageHeight=None,
        )
        objects = objects_of(labelme)[2]
        assert objects == ("c", WIDTH, HEIGHT, [("ant", [10, 20, 20, 20]), ("bee", [0, 0, 29, 9])])

    def test_labels_txt_gives_the_classes_and_their_order(self, labelme, tmp_path):
        (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nbee\nant\ncat\n")
        check_datasets([labelme])
        assert classes_of(labelme) == ["bee", "ant", "cat"]
        forget([labelme])
        (tmp_path / "labelme" / "labels.txt").write_text("bee\n")
        assert "the label 'ant' is not in" in message(labelme)

    def test_mistakes(self, labelme, tmp_path):
        path = self.change(tmp_path, {"label": "ant", "points": [[1, 1], [2, 2]], "shape_type": "circle"})
        assert message(labelme).startswith(f"{path}: shape 0 is a circle of 2 points; only rectangles")
        path.write_text("{}")
        assert message(labelme).startswith(f"{path}: not usable annotations (")
        polygon = {"label": "ant", "points": [[1, 1], [2, 2], [3, 1]]}
        for wrong in ({"label": 3}, {"points": [["a", 1]] * 3}):
            path.write_text(json.dumps({"imagePath": "c.jpg", "shapes": [{**polygon, **wrong}]}))
            assert message(labelme).startswith(f"{path}: not usable annotations (")
        for height in (-1, 10**20, float("inf")):
            path.write_text(
                json.dumps(
                    {"imagePath": "c.jpg", "imageWidth": 9, "imageHeight": height, "shapes": [polygon]}
                )
            )
            assert message(labelme).startswith(f"{path}: not usable annotations (")
        (tmp_path / "empty").mkdir()
        assert "no LabelMe annotations" in message(f"labelme:{tmp_path}/empty")
        assert "without 'train'" in message(f"{labelme}:train")
