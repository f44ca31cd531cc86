"""Models of segmentation and keypoints."""

import pytest
from small_segmentors import keypoint_rcnn, keypoint_set, panoptic_fpn, segmentation_sets, semantic_segmentor


@pytest.fixture(scope="session")
def segmentation(learned, tmp_path_factory):
    with segmentation_sets(learned[0].DATASETS.TEST[0], tmp_path_factory.mktemp("segmentation")):
        yield


@pytest.fixture(scope="session")
def segmentor(learned, segmentation):
    return semantic_segmentor(learned)


@pytest.fixture(scope="session")
def panoptic(learned, segmentation):
    return panoptic_fpn(learned)


@pytest.fixture(scope="session")
def keypoints(learned, tmp_path_factory):
    with keypoint_set(learned[0].DATASETS.TEST[0], tmp_path_factory.mktemp("keypoints")):
        yield keypoint_rcnn(learned)
