import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from rt_detectron.evaluation.robustness.pictures import BeforeAfter

RED = (200, 30, 30)
NAMES = ["cat", "dog"]


def output(scores, height=40, width=60):
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 5.0, 30.0, 25.0]] * len(scores)))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.arange(len(scores)) % 2
    instances.pred_masks = torch.zeros(len(scores), height, width, dtype=torch.bool)
    instances.pred_masks[:, 5:25, 10:30] = True
    return {"instances": instances}


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_original_changed_and_perturbation_side_by_side(tmp_path, image_format):
    pixels = torch.tensor(RED if image_format == "RGB" else RED[::-1], dtype=torch.uint8)
    image = pixels.view(3, 1, 1).expand(3, 20, 30)  # half of the size that the output refers to
    given = {"image": image, "image_id": "a/7", "height": 40, "width": 60}
    changed = {**given, "image": image.float().clone()}
    changed["image"][:, :, 15:] += 4
    watch = BeforeAfter(
        lambda inputs: [output([])],
        [{"image_id": "a/7"}],
        lambda dataset_dict: given,
        image_format,
        NAMES,
        str(tmp_path),
        "attacked",
        perturbation=True,
    )
    watch([{**changed, "image_id": 8}], [output([0.9])])
    assert watch.saved == []
    watch([changed], [output([0.9])])
    (picture,) = watch.saved
    assert picture["file"] == str(tmp_path / "imagea_7.jpg")
    assert "original: 0 detections; attacked: 1 detection; perturbation x 32" in picture["caption"]
    row = np.asarray(Image.open(picture["file"]))
    third = row.shape[1] // 3
    assert np.abs(row[60, third // 2].astype(int) - RED).max() < 12
    assert np.abs(row[-20, 2 * third + third // 4].astype(int) - 128).max() < 12  # no perturbation there
    assert row[-20, -20].min() > 240
