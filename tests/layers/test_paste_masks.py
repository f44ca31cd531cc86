import pytest
import torch
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ROIMasks

from rt_detectron.layers.paste_masks import PastingRCNN, ProductROIMasks, use_product_paste

HEIGHT, WIDTH = 60, 83


@pytest.fixture
def masks():
    return torch.rand(40, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def boxes():
    """Some reach the border, some are smaller than a pixel, some have whole numbers as corners."""
    random = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    corner, size = random[:, :2] * torch.tensor([WIDTH, HEIGHT]), random[:, 2:] ** 3 * 80
    boxes = torch.cat([corner, corner + size], 1)
    boxes[:10] = boxes[:10].round()
    boxes = Boxes(boxes)
    boxes.clip((HEIGHT, WIDTH))
    boxes.tensor[:, 2:] = torch.maximum(boxes.tensor[:, 2:], boxes.tensor[:, :2] + 0.1)
    return boxes


def test_pastes_as_detectron2_does(masks, boxes):
    pasted = ProductROIMasks(masks).to_bitmasks(boxes, HEIGHT, WIDTH).tensor
    expected = paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH))
    assert pasted.shape == expected.shape
    assert pasted.dtype == expected.dtype
    assert expected.sum() > 3000
    different = (pasted != expected).nonzero()
    # Only where the interpolated value is the threshold, up to rounding.
    soft = torch.stack(
        [paste_masks_in_image(masks, boxes, (HEIGHT, WIDTH), threshold=0.5 + d) for d in (-1e-5, 1e-5)]
    )
    assert all(soft[0][tuple(place)] and not soft[1][tuple(place)] for place in different)
    assert len(different) < 20


def test_some_of_them_stay_what_they_are(masks):
    some = ProductROIMasks(masks)[torch.arange(40) % 2 == 0]
    assert type(some) is ProductROIMasks
    assert torch.equal(some.tensor, masks[::2])


def test_a_model_gives_the_same_masks(make_cfg):
    cfg = make_cfg("resnet18", "fpn")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(2)) * 255
    inputs = [{"image": image, "height": HEIGHT, "width": WIDTH}]
    with torch.no_grad():
        expected = model(inputs)[0]["instances"]
        assert type(use_product_paste(model)) is PastingRCNN
        found = model(inputs)[0]["instances"]
        raw = model.inference(inputs, do_postprocess=False)[0].pred_masks
    assert isinstance(raw, torch.Tensor)
    assert not isinstance(found.pred_masks, ROIMasks)
    assert len(found) == 5
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3


def test_a_box_outside_the_image_is_empty(masks):
    outside = torch.tensor(
        [[-30, 5, -20, 9], [90, 5, 99, 9], [5, -30, 9, -20], [5, 70, 9, 80], [-9, -9, -2, -2.0]]
    )
    pasted = ProductROIMasks(masks[:5]).to_bitmasks(Boxes(outside), HEIGHT, WIDTH).tensor
    assert torch.equal(pasted, torch.zeros(5, HEIGHT, WIDTH, dtype=torch.bool))
