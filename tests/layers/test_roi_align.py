import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from rt_detectron.layers.roi_align import RowsROIAlign, use_rows_roi_align

# Image, x0, y0, x1, y1 on a picture of 96 x 64 pixels.
ROIS = {
    "usual": [[1, 10.3, 7.1, 50.9, 40.2], [0, 3, 5, 20, 60], [1, 10, 7, 50, 40]],
    "a pixel, a line and nothing": [[0, 8.2, 8.3, 8.9, 9.1], [1, 0, 30.5, 96, 31], [0, 20, 20, 20, 20]],
    "the whole picture": [[0, 0, 0, 96, 64], [1, 0, 0, 96, 64]],
    "partly and wholly outside": [[0, -30, -20, 40, 30], [1, 80, 50, 130, 90], [0, 200, 200, 260, 230]],
}


def align(**options) -> ROIAlign:
    return ROIAlign(**{"output_size": (3, 2), "spatial_scale": 0.25, "sampling_ratio": 0, **options})


def output_and_gradient(module, rois, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, 24, generator=generator).to(memory_format=memory_format).requires_grad_(True)
    output = module(x, rois)
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return output.detach(), x.grad


@pytest.mark.parametrize("rois", ROIS.values(), ids=ROIS.keys())
@pytest.mark.parametrize(
    "options",
    [{}, {"sampling_ratio": 2}, {"aligned": False}, {"output_size": (14, 14), "spatial_scale": 0.5}],
)
def test_outputs_and_gradients_are_torchvisions(rois, options):
    rois = torch.tensor(rois)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        module = use_rows_roi_align(torch.nn.Sequential(align(**options)))[0]
        assert type(module) is RowsROIAlign
        found = output_and_gradient(module, rois, memory_format)
        for ours, reference in zip(found, output_and_gradient(align(**options), rois), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_a_pooler_over_a_pyramid_gives_the_same():
    """Boxes of a pyramid are spread over its levels; some levels have none."""
    pooler = ROIPooler(7, (0.25, 0.125), 0, "ROIAlignV2")
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 3, 128, 96, generator=generator), torch.randn(1, 3, 64, 48, generator=generator)]
    corner = torch.rand(60, 2, generator=generator) * 200
    boxes = torch.cat([corner, corner + torch.rand(60, 2, generator=generator).exp() ** 5], 1)
    for some in (boxes, boxes[:1], boxes[:0]):
        reference = pooler(maps, [Boxes(some)])
        use_rows_roi_align(pooler)
        torch.testing.assert_close(pooler(maps, [Boxes(some)]), reference, rtol=1e-5, atol=1e-5)
        for level in pooler.level_poolers:
            level.__class__ = ROIAlign


def test_what_it_is_not_made_for_takes_torchvisions_kernel():
    rois = torch.tensor(ROIS["usual"], dtype=torch.float64)
    module = use_rows_roi_align(align())
    assert torch.equal(
        module(torch.ones(2, 1, 16, 24, dtype=torch.float64), rois),
        torch.ones(3, 1, 3, 2, dtype=torch.float64),
    )
    assert module(torch.ones(2, 1, 16, 24), rois[:0].float()).shape == (0, 1, 3, 2)


def test_other_modules_stay():
    rotated = ROIPooler(7, (0.25,), 0, "ROIAlignRotated")
    types = [type(module) for module in rotated.modules()]
    assert [type(module) for module in use_rows_roi_align(rotated).modules()] == types


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_boxes_whose_corners_are_swapped(sampling_ratio):
    """As proposals from a file may be."""
    rois = torch.tensor([[0, 50, 40, 10, 7], [1, 10, 7, 50, 40.0]])
    found = RowsROIAlign((3, 2), 0.25, sampling_ratio)(torch.ones(2, 1, 16, 24), rois)
    assert torch.equal(found, ROIAlign((3, 2), 0.25, sampling_ratio)(torch.ones(2, 1, 16, 24), rois))
