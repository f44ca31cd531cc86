"""Every configuration key that rt_detectron adds to Detectron2's."""

from detectron2.config import CfgNode as CN


def add_robust_config(cfg: CN) -> None:
    """Add rt_detectron's keys to ``cfg``."""
    cfg.MODEL.ROBUST = CN()
    # The network, by its name in rt_detectron.checkpoint.architectures, e.g. "resnet50", "densenet" or
    # "timm/convnext_tiny". "" reads a ResNet off MODEL.RESNETS (DEPTH, NUM_GROUPS, ...), as Detectron2 does.
    cfg.MODEL.ROBUST.ARCH = ""
