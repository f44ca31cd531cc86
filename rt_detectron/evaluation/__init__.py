"""Evaluators of detectors, and their robustness."""

from rt_detectron.evaluation.coco import COCOEvaluator, evaluate_detections
from rt_detectron.evaluation.lvis import LVISEvaluator

__all__ = ["COCOEvaluator", "LVISEvaluator", "evaluate_detections"]
