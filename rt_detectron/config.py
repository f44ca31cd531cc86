"""Every configuration key that rt_detectron adds to Detectron2's."""

from detectron2.config import CfgNode as CN


def add_robust_config(cfg: CN) -> None:
    """Add rt_detectron's keys to ``cfg``."""
    cfg.MODEL.ROBUST = CN()
    # The network, by its name in rt_detectron.checkpoint.architectures, e.g. "resnet50", "densenet" or
    # "timm/convnext_tiny". "" reads a ResNet off MODEL.RESNETS (DEPTH, NUM_GROUPS, ...), as Detectron2 does.
    cfg.MODEL.ROBUST.ARCH = ""

    # Training. The learning rate of the pretrained network (not of an FPN's own layers), times this.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Decay of the averaged weights that are evaluated and saved, e.g. 0.999; 0 is none.
    cfg.SOLVER.EMA = 0.0
    # Adversarial fine-tuning by free replays: each batch is trained on so many times in a row, its images
    # moving against the detector. 0 is none.
    cfg.SOLVER.ADVERSARIAL = CN()
    cfg.SOLVER.ADVERSARIAL.REPLAYS = 0
    # "l2" or "linf".
    cfg.SOLVER.ADVERSARIAL.NORM = "l2"
    # Of one image in [0, 1] after resizing; for linf in units of 1/255.
    cfg.SOLVER.ADVERSARIAL.EPS = 0.5
    # With TEST.EVAL_PERIOD, keep the weights with the best of this metric as model_best.pth; "" keeps none.
    cfg.TEST.BEST_METRIC = "bbox/AP"
