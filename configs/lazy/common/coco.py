"""Detectron2's COCO loaders, in the colour order that the backbones were trained on, and our evaluator."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from rt_detectron.evaluation import COCOEvaluator

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.evaluator = L(COCOEvaluator)(
    dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}/inference"
)
