"""Detectron2's COCO loaders, in the colour order that the backbones were trained on."""

from detectron2 import model_zoo

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
