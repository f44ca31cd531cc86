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

    # AP under attack, of tools/evaluate_robustness.py: PGD on the detector's input.
    cfg.TEST.ATTACK = CN()
    # L2 radii, for images in [0, 1] after resizing, e.g. (0.5, 1.0). None: no such attack.
    cfg.TEST.ATTACK.L2_EPS = ()
    # Linf radii, in units of 1/255, e.g. (1, 2, 4).
    cfg.TEST.ATTACK.LINF_EPS = ()
    cfg.TEST.ATTACK.STEPS = 10
    # Of several restarts, each from a random point of the ball, each image keeps the strongest.
    cfg.TEST.ATTACK.RESTARTS = 1
    # What the attacks raise: "classification", "localization", "mask", "all" of the training losses, or
    # "vanishing", which makes all detections go. Each gives numbers of its own.
    cfg.TEST.ATTACK.LOSSES = ("all",)
    # So many images, evenly spread over the test set; 0 is all of them.
    cfg.TEST.ATTACK.MAX_IMAGES = 0
    # Also AP under random noise of the same norm, which an attack must beat to mean anything.
    cfg.TEST.ATTACK.NOISE = True

    # AP under common corruptions, of the same tool.
    cfg.TEST.CORRUPTION = CN()
    # E.g. ("fog", "gaussian_noise"); ("common",) is the 15 of the benchmark, ("all",) 4 more.
    cfg.TEST.CORRUPTION.NAMES = ()
    # From 1, hardly visible, to 5.
    cfg.TEST.CORRUPTION.SEVERITIES = (1, 2, 3, 4, 5)
    # As TEST.ATTACK.MAX_IMAGES.
    cfg.TEST.CORRUPTION.MAX_IMAGES = 0

    # Before/after pictures of so many images, evenly spread, for each of the settings above.
    cfg.TEST.PICTURES = 0
