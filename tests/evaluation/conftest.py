"""Random annotations and detections that hold every case in which evaluators have been known to differ."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle_masks

HEIGHT, WIDTH, KEYPOINTS = 60, 80, 17


class Draw:
    """One small dataset in COCO's format and detections on it, by its seed."""

    def __init__(self, seed: int, task: str):
        self.rng, self.task = np.random.default_rng(seed), task
        images, categories = (
            self.rng.choice(np.arange(1, 10_000), self.rng.integers(2, most), replace=False).tolist()
            for most in (12, 6)
        )
        self.annotations = [
            self.annotation(image, categories) for image in images for _ in range(self.rng.integers(0, 9))
        ]
        for number, annotation in enumerate(self.rng.permutation(self.annotations), start=1):
            annotation["id"] = number  # not 0, whose object pycocotools and lvis never match
        self.results = [self.near(one) for one in self.annotations for _ in range(self.rng.integers(0, 4))]
        for image in images:
            for _ in range(self.rng.integers(0, 6)):
                self.results.append(self.result(image, self.rng.choice(categories), self.box()))
        self.results = self.rng.permutation(self.results).tolist()
        self.dataset = {
            "images": [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in images],
            "categories": [{"id": c, "name": f"class {c}"} for c in categories],
            "annotations": self.annotations,
        }

    def box(self) -> list[float]:
        size = np.exp(self.rng.uniform(0, 4, 2))
        corner = self.rng.uniform(0, 1, 2) * ((WIDTH, HEIGHT) - size).clip(1)
        box = np.append(corner, size)
        if self.rng.random() < 0.3:
            box = box.round()  # equal overlaps
        if self.rng.random() < 0.1:
            box[self.rng.integers(2, 4) :] = 0  # degenerate
        return box.tolist()

    def annotation(self, image: int, categories: list[int]) -> dict:
        box = self.box()
        area = box[2] * box[3]
        if self.rng.random() < 0.2:
            area = float(self.rng.choice([0, area / 2, 32**2, 96**2]))  # on the limits of the ranges
        annotation = {"image_id": image, "category_id": int(self.rng.choice(categories)), "bbox": box}
        annotation |= {"area": area, "iscrowd": int(self.rng.random() < 0.15)}
        if self.rng.random() < 0.1:
            annotation["ignore"] = 1
        if self.task == "segm":
            annotation["segmentation"] = self.segmentation(box)
        if self.task == "keypoints":
            points = np.c_[self.points(box), self.rng.integers(0, 3, KEYPOINTS)]
            points *= self.rng.random() > 0.2  # or none is visible
            annotation["keypoints"] = points.ravel().tolist()
            annotation["num_keypoints"] = int((points[:, 2] > 0).sum())
        return annotation

    def points(self, box: list[float]) -> np.ndarray:
        return self.rng.uniform(0, 1, (KEYPOINTS, 2)) * box[2:] + box[:2]

    def segmentation(self, box: list[float]):
        """Polygon, compressed or uncompressed run lengths."""
        x, y, w, h = box
        form = self.rng.integers(3)
        if form == 0:
            return [[x, y, x + w, y, x + w, y + h, x, y + h], [x, y, x + w / 2, y, x, y + h / 2]]
        mask = self.mask(box) & (self.rng.random((HEIGHT, WIDTH)) < 0.8)
        if form == 1:
            return encoded(mask)
        pixels = np.append(False, mask.flatten(order="F"))
        changes = np.flatnonzero(np.diff(pixels))
        return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *changes, pixels.size - 1]).tolist()}

    def mask(self, box: list[float]) -> np.ndarray:
        x, y, w, h = (max(0, int(number)) for number in box)
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[y : y + h, x : x + w] = True
        return mask

    def near(self, annotation: dict) -> dict:
        """A detection of an annotated object, at times a perfect one."""
        box = np.array(annotation["bbox"]) + self.rng.normal(0, 3, 4) * (self.rng.random() < 0.7)
        box[2:] = np.abs(box[2:])
        result = self.result(annotation["image_id"], annotation["category_id"], box.tolist())
        if self.task == "keypoints":
            points = np.reshape(annotation["keypoints"], (-1, 3)) + self.rng.normal(0, 2, (KEYPOINTS, 3))
            result["keypoints"] = points.ravel().tolist()
        return result

    def result(self, image: int, category: int, box: list[float]) -> dict:
        score = round(self.rng.random(), int(self.rng.choice([1, 1, 8])))  # many are equal
        result = {"image_id": image, "category_id": int(category), "score": score}
        if self.task == "segm":
            return result | {"segmentation": encoded(self.mask(box))}
        if self.task == "keypoints":
            points = np.c_[self.points([0, 0, WIDTH, HEIGHT]), np.ones(KEYPOINTS)]
            return result | {"keypoints": points.ravel().tolist()}
        return result | {"bbox": box}

    def metadata(self) -> dict:
        """As Detectron2 makes it when it loads a COCO dataset."""
        ids = sorted(category["id"] for category in self.dataset["categories"])
        names = {category["id"]: category["name"] for category in self.dataset["categories"]}
        return {
            "thing_classes": [names[id_] for id_ in ids],
            "thing_dataset_id_to_contiguous_id": {id_: number for number, id_ in enumerate(ids)},
        }

    def outputs(self) -> tuple[list[dict], list[dict]]:
        """What Detectron2's process() takes: a model's inputs and the detections as its outputs, by image."""
        contiguous = self.metadata()["thing_dataset_id_to_contiguous_id"]
        inputs, outputs = [], []
        for image in self.dataset["images"]:
            found = [result for result in self.results if result["image_id"] == image["id"]]
            instances = Instances((HEIGHT, WIDTH))
            instances.scores = torch.tensor([r["score"] for r in found])
            classes = [contiguous[r["category_id"]] for r in found]
            instances.pred_classes = torch.tensor(classes, dtype=torch.long)
            boxes = [r.get("bbox", [10, 10, 40, 30]) for r in found]
            boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            instances.pred_boxes = Boxes(boxes)
            if self.task == "segm":
                masks = [rle_masks.decode(r["segmentation"]) for r in found]
                instances.pred_masks = torch.as_tensor(np.reshape(masks, (-1, HEIGHT, WIDTH))).bool()
            if self.task == "keypoints":
                points = np.array([r["keypoints"] for r in found], np.float32)
                instances.pred_keypoints = torch.as_tensor(points.reshape(-1, KEYPOINTS, 3))
            inputs.append({"image_id": image["id"]})
            outputs.append({"instances": instances})
        return inputs, outputs


def encoded(mask: np.ndarray) -> dict:
    rle = rle_masks.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@pytest.fixture(scope="session")
def draw():
    """``draw(seed, task)``: ``.dataset`` and ``.results`` in COCO's formats; task bbox, segm or keypoints."""

    def make(seed: int, task: str = "bbox") -> Draw:
        drawn = Draw(seed, task)
        drawn.dataset = json.loads(json.dumps(drawn.dataset))
        return drawn

    return make


@pytest.fixture
def register(tmp_path):
    """``register(dataset or text, **metadata)``: the name of a COCO dataset with this annotation file."""
    names = []

    def make(dataset, **metadata) -> str:
        names.append(f"rt_test_evaluation_{len(names)}")
        path = tmp_path / f"{names[-1]}.json"
        path.write_text(dataset if isinstance(dataset, str) else json.dumps(dataset))
        DatasetCatalog.register(names[-1], list)
        MetadataCatalog.get(names[-1]).set(json_file=str(path), **{"evaluator_type": "coco", **metadata})
        return names[-1]

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
