"""datasets/prepare_demo.py: the split, the masks, determinism, and what happens to the output folder."""

import hashlib
import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from tool_process import run_tool

from rt_detectron.utils.errors import InputError

SCRIPT = Path(__file__).parents[2] / "datasets" / "prepare_demo.py"
pytest.importorskip("skimage")
pytest.importorskip("sklearn")

spec = importlib.util.spec_from_file_location("prepare_demo", SCRIPT)
prepare_demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_demo)

SMALL = [
    "--detection-train=24",
    "--detection-val=12",
    "--classification-train=60",
    "--classification-val=40",
]


def make(output: Path, *options: str) -> Path:
    prepare_demo.main(["--output", str(output), *SMALL, *options])
    return output


def tree_hash(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "demo")


@pytest.fixture(scope="module")
def sources():
    return prepare_demo.load_sources()


def coco(demo: Path, split: str) -> COCO:
    return COCO(demo / "detection" / "annotations" / f"instances_{split}.json")


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- the split


def test_sources_share_neither_photographs_nor_digits(sources):
    pictures, digits = (
        {split: {array.tobytes() for array in arrays(source)} for split, source in sources.items()}
        for arrays in (lambda source: source.photographs.values(), lambda source: source.digits)
    )
    for contents in (pictures, digits):
        assert contents["train"]
        assert contents["val"]
        assert not contents["train"] & contents["val"]


def test_written_data_use_only_their_own_split(demo):
    used = {}
    for split in ("train", "val"):
        data = coco(demo, split).dataset
        names = [path.stem.rsplit("_", 1) for path in (demo / "classification" / split).glob("*/*.png")]
        photographs = {Path(image["photograph"]).stem for image in data["images"]}
        photographs |= {name.split("_", 1)[1] for name, _ in names}
        samples = {annotation["digit_sample"] for annotation in data["annotations"]}
        used[split] = photographs, samples | {int(sample) for _, sample in names}
    for train, val in zip(used["train"], used["val"], strict=True):
        assert train
        assert val
        assert not train & val


def test_recorded_samples_carry_the_annotated_digit(demo):
    from sklearn.datasets import load_digits

    target = load_digits().target
    for split in ("train", "val"):
        for annotation in coco(demo, split).dataset["annotations"]:
            assert target[annotation["digit_sample"]] == annotation["category_id"] - 1
        for path in (demo / "classification" / split).glob("*/*.png"):
            assert target[int(path.stem.rsplit("_", 1)[1])] == int(path.parent.name)


# ---- annotations


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 12)])
def test_annotations_agree_with_their_masks(demo, split, count):
    data = coco(demo, split)
    names = {category["id"]: category["name"] for category in data.dataset["categories"]}
    assert list(names) == list(range(1, 11))
    assert (names[1], names[10]) == ("zero", "nine")
    assert len(data.imgs) == count
    for image in data.imgs.values():
        picture = cv2.imread(str(demo / "detection" / split / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3) == (160, 160, 3)
        annotations = data.imgToAnns[image["id"]]
        assert 1 <= len(annotations) <= 5
        painted = np.zeros((160, 160), int)
        for annotation in annotations:
            mask = data.annToMask(annotation)
            rows, columns = np.nonzero(mask)
            width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
            assert annotation["bbox"] == [columns.min(), rows.min(), width, height]
            assert annotation["area"] == mask.sum() >= prepare_demo.MIN_VISIBLE_PIXELS
            assert annotation["iscrowd"] == 0
            painted += mask
        assert painted.max() == 1  # the visible parts of two digits never overlap


def test_masks_are_exactly_the_painted_pixels(sources, monkeypatch):
    grey = np.full((160, 160, 3), 128, np.float32)
    monkeypatch.setattr(prepare_demo, "background", lambda *_: ("grey", grey.copy()))
    for seed in range(8):
        picture, _, objects = prepare_demo.detection_image(rng(seed), sources["train"], 160)
        assert np.array_equal((picture != 128).any(axis=2), np.any([mask for _, mask in objects], axis=0))


def test_jpeg_keeps_digits_where_their_masks_are(demo, sources):
    data = coco(demo, "val")
    picture, _, objects = prepare_demo.detection_image(
        prepare_demo._rng(0, "detection", "val", 1), sources["val"], 160
    )
    stored = cv2.imread(str(demo / "detection" / "val" / data.imgs[1]["file_name"]))[..., ::-1]
    assert np.abs(stored.astype(int) - picture).mean() < 4
    masks = [data.annToMask(annotation) for annotation in data.imgToAnns[1]]
    assert np.array_equal(masks, [mask for _, mask in objects])


def square(top: int, left: int, side: int):
    coverage = np.zeros((64, 64), np.float32)
    coverage[top : top + side, left : left + side] = 1
    return prepare_demo.Layer(0, 0, coverage)


def test_occlusion_leaves_the_visible_part_and_drops_what_is_hidden():
    top, partly = square(0, 0, 20), square(10, 15, 20)
    hidden, below_hidden, tiny = square(5, 0, 20), square(21, 0, 16), square(50, 50, 3)
    kept = prepare_demo.visible_masks([top, partly, hidden, below_hidden, tiny])
    assert [layer for layer, _ in kept] == [top, partly, below_hidden]
    assert [int(mask.sum()) for _, mask in kept] == [400, 400 - 10 * 5, 256 - 9 * 1]


@pytest.mark.parametrize("size", [64, 160])
def test_digits_lie_inside_the_image_at_the_promised_scale(sources, size):
    generator = rng()
    for _ in range(60):
        layer = prepare_demo.random_layer(generator, sources["train"], size, prepare_demo.DIGIT_HEIGHT)
        rows, columns = np.nonzero(layer.mask)
        assert min(rows.min(), columns.min()) > 0
        assert max(rows.max(), columns.max()) < size - 1
        assert 0.1 * size < np.ptp(rows) < 0.5 * size


def test_glyphs_keep_the_digits_shape(sources):
    """Shrunk back to 8x8, an enlarged digit is most like its own original among all of them."""
    digits = sources["val"].digits[:40]
    flat = digits.reshape(40, -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    hits = 0
    for index, digit in enumerate(digits):
        rows, columns = np.nonzero(digit > 0.25)
        low, high = (rows.min(), columns.min()), (rows.max() + 1, columns.max() + 1)
        small = np.zeros((8, 8), np.float32)
        shape = (int(high[1] - low[1]), int(high[0] - low[0]))
        small[low[0] : high[0], low[1] : high[1]] = cv2.resize(
            prepare_demo.glyph(digit), shape, interpolation=cv2.INTER_AREA
        )
        hits += int((flat @ small.ravel()).argmax() == index)
    assert hits >= 34


def test_colors_stand_out_from_any_background():
    generator = rng()
    for behind in generator.uniform(0, 255, (200, 3)):
        color = prepare_demo._contrasting_color(generator, behind)
        assert (
            np.linalg.norm(color - behind) > prepare_demo.MIN_COLOR_DISTANCE - 26
        )  # the jitter: 15 * sqrt(3)


def test_detectron2_reads_the_set_and_its_masks(demo):
    pytest.importorskip("detectron2")
    from detectron2.data import detection_utils
    from detectron2.data.datasets import load_coco_json

    root = demo / "detection"
    records = load_coco_json(str(root / "annotations" / "instances_val.json"), str(root / "val"))
    data = coco(demo, "val")
    assert len(records) == 12
    for record in records:
        instances = detection_utils.annotations_to_instances(
            [
                detection_utils.transform_instance_annotations(dict(a), [], (160, 160))
                for a in record["annotations"]
            ],
            (160, 160),
            mask_format="bitmask",
        )
        expected = [data.annToMask(annotation) for annotation in data.imgToAnns[record["image_id"]]]
        assert np.array_equal(instances.gt_masks.tensor.numpy(), np.array(expected, bool))
        assert instances.gt_masks.get_bounding_boxes().tensor.equal(instances.gt_boxes.tensor)


# ---- classification


def test_classification_is_a_balanced_image_folder(demo):
    for split, each in (("train", 6), ("val", 4)):
        root = demo / "classification" / split
        assert sorted(path.name for path in root.iterdir()) == [str(label) for label in range(10)]
        for folder in root.iterdir():
            files = list(folder.glob("*.png"))
            assert len(files) == each
            assert {cv2.imread(str(path)).shape for path in files} == {(64, 64, 3)}


# ---- determinism and the output folder


def test_same_seed_gives_the_same_bytes_and_another_does_not(demo, tmp_path):
    assert tree_hash(make(tmp_path / "again")) == tree_hash(demo)
    other = make(tmp_path / "other", "--seed=1")
    assert tree_hash(other / "detection" / "val") != tree_hash(demo / "detection" / "val")
    assert tree_hash(other / "classification") != tree_hash(demo / "classification")


def test_finished_data_are_left_alone(tmp_path, capsys, monkeypatch):
    output = make(tmp_path / "demo")
    monkeypatch.setattr(prepare_demo, "build", lambda *_: pytest.fail("built again"))
    make(output)
    assert "nothing to do" in capsys.readouterr().out


def test_other_arguments_or_a_lost_file_make_it_anew(tmp_path):
    output = make(tmp_path / "demo")
    before = tree_hash(output)
    next((output / "detection" / "train").iterdir()).unlink()
    assert tree_hash(make(output)) == before
    make(output, "--image-size=96")
    assert json.loads((output / "prepare_demo.json").read_text())["arguments"]["image_size"] == 96
    assert cv2.imread(str(next((output / "detection" / "val").iterdir()))).shape == (96, 96, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_an_interrupted_run_leaves_the_old_data_and_nothing_else(tmp_path, monkeypatch, stop):
    output = make(tmp_path / "demo")
    before = tree_hash(output)
    write, written = prepare_demo._write_image, []

    def write_some(path, *rest):
        if len(written) == 50:  # in the middle of the classification set
            raise stop
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(prepare_demo, "_write_image", write_some)
    with pytest.raises(stop):
        make(output, "--seed=5")
    assert written[0].exists() is False
    assert tree_hash(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_failing_swap_puts_the_old_data_back(tmp_path):
    old = tmp_path / "demo"
    old.mkdir()
    (old / "file").touch()
    with pytest.raises(FileNotFoundError):
        prepare_demo.swap(tmp_path / ".missing.partial", old)
    assert (old / "file").exists()


@pytest.mark.parametrize("content", [{"mine.txt": "x"}, {"prepare_demo.json": "not json"}])
def test_a_foreign_folder_is_refused(tmp_path, content):
    output = tmp_path / "mine"
    output.mkdir()
    for name, text in content.items():
        (output / name).write_text(text)
    before = tree_hash(output)
    with pytest.raises(InputError, match="was not made by"):
        make(output)
    assert tree_hash(output) == before


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "demo").mkdir()
    assert (make(tmp_path / "demo") / "prepare_demo.json").exists()


# ---- mistakes


@pytest.mark.parametrize(
    "option",
    [
        "--detection-train=0",
        "--detection-val=-3",
        "--classification-train=9",
        "--image-size=20",
        "--image-size=100000",
        "--seed=-1",
    ],
)
def test_nonsensical_values_name_their_option(tmp_path, option):
    with pytest.raises(InputError, match=option.split("=")[0]):
        make(tmp_path / "demo", option)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("module", "package"), [("skimage", "scikit-image"), ("sklearn", "scikit-learn")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module, package):
    find = prepare_demo.find_spec
    monkeypatch.setattr(prepare_demo, "find_spec", lambda name: None if name == module else find(name))
    with pytest.raises(InputError, match=rf"{package}.*pip install -e \.\[demo\]"):
        make(tmp_path / "demo")


def test_a_photograph_the_package_lacks_is_one_line(monkeypatch):
    monkeypatch.setitem(prepare_demo.PHOTOGRAPHS, "val", ("skimage/no_such.png",))
    with pytest.raises(InputError, match=r"skimage does not ship no_such\.png"):
        prepare_demo.load_sources()


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        make(tmp_path / "file" / "demo")
    with pytest.raises(InputError, match="not made by"):
        make(tmp_path / "file")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_demo, "_write_image", no_space)
    with pytest.raises(InputError, match="No space left"):
        make(tmp_path / "demo")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tool_server")
def test_the_command_line_ends_with_one_line(tmp_path):
    done = run_tool([SCRIPT, "--output", tmp_path / "demo", "--detection-train", "0"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --detection-train 0")
    assert "Traceback" not in done.stderr
