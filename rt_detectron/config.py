"""Every configuration key that rt_detectron adds to Detectron2's."""

from detectron2.config import CfgNode as CN


def add_robust_config(cfg: CN) -> None:
    """Add rt_detectron's keys to ``cfg``. A key that is there already, a project's own, keeps its value.

    Raises:
        ValueError: where a project has a value in place of a group of our keys, or the reverse.
    """
    _complete(cfg, _keys())


def _complete(cfg: CN, keys: CN, parent: str = "") -> None:
    """Put into ``cfg`` what it lacks of ``keys``."""
    for key, value in keys.items():
        if key not in cfg:
            setattr(cfg, key, value)
        elif isinstance(cfg[key], CN) != isinstance(value, CN):
            raise ValueError(
                f"{parent}{key} of this project stands where rt_detectron needs its own: rename the project's"
            )
        elif isinstance(value, CN):
            _complete(cfg[key], value, f"{parent}{key}.")


def _keys() -> CN:
    cfg = CN({group: {} for group in ("MODEL", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST")})
    cfg.MODEL.ROBUST = CN()
    # The network's name in rt_detectron.checkpoint.architectures, such as "resnet50", "densenet" or
    # "timm/convnext_tiny". "": a ResNet given by MODEL.RESNETS (DEPTH, NUM_GROUPS, ...), as in Detectron2.
    cfg.MODEL.ROBUST.ARCH = ""
    # timm's networks: "LN" puts a fresh layer norm between each stage and the pyramid, as published detectors
    # on Swin and ConvNeXt have it. "": none.
    cfg.MODEL.ROBUST.OUT_NORM = ""
    # Plain vision transformers (ViT, DeiT, DINOv2, CLIP): the side of the windows, in patches, in which all
    # but four blocks attend, such as ViTDet's 14. 0: all attend to the whole image, as in the classifier.
    cfg.MODEL.ROBUST.WINDOW = 0

    # What a training does with an image that cannot be read: "stop", or "skip" to train without it.
    cfg.INPUT.ON_CORRUPT = "stop"

    # With MODEL.BACKBONE.FREEZE_AT 5, on CPUs: gigabytes of disk in which the backbone's features are kept,
    # so that each picture goes through it once. 0: none.
    cfg.DATALOADER.FEATURE_CACHE_GB = 0.0

    # Training: multiplies the learning rate of the pretrained network, but not of an FPN's own layers.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # "SGD", or "ADAMW" as ViTs, Swin and ConvNeXt are trained with; BASE_LR is then about 1e-4.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # For ViT, Swin and ConvNeXt: the learning rate of a pretrained layer is multiplied by this once for each
    # block from there to the end of the backbone, such as 0.7 for a ViT-B. 1: none.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Decay of the moving average of the weights, which is evaluated and saved, such as 0.999. 0: none.
    cfg.SOLVER.EMA = 0.0
    # Number of periodic checkpoints to keep; older ones are deleted. 0: all.
    cfg.SOLVER.MAX_TO_KEEP = 0
    # Adversarial fine-tuning.
    cfg.SOLVER.ADVERSARIAL = CN()
    # "Free": train on each batch this many times in a row, while its images move along the gradient of the
    # detector's loss. 0: none.
    cfg.SOLVER.ADVERSARIAL.REPLAYS = 0
    # PGD: attack each batch by so many steps on the detector in eval mode, then train on it. 0: none.
    cfg.SOLVER.ADVERSARIAL.STEPS = 0
    # "l2" or "linf".
    cfg.SOLVER.ADVERSARIAL.NORM = "l2"
    # For an image in [0, 1] after resizing; for linf in units of 1/255.
    cfg.SOLVER.ADVERSARIAL.EPS = 0.5
    # PGD: the size of a step, in the units of EPS. 0: 2.5 * EPS / STEPS. Replays take steps of EPS.
    cfg.SOLVER.ADVERSARIAL.STEP_SIZE = 0.0
    # Where PGD begins: at a "random" point of the ball, or at the "image".
    cfg.SOLVER.ADVERSARIAL.START = "random"
    # What the attack raises: "all" training losses, or those of the box head, "A_box" (both), "A_cls" or
    # "A_reg". PGD takes others of TEST.ATTACK.LOSSES, too, such as "MTD".
    cfg.SOLVER.ADVERSARIAL.LOSS = "all"
    # What the box head's loss of a proposal counts at most, for the attack and for the weights. 0: no limit.
    cfg.SOLVER.ADVERSARIAL.CLIP = 0.0
    # Replays: a batch begins with the perturbation of the one before instead of clean.
    cfg.SOLVER.ADVERSARIAL.CARRY_OVER = False
    # The share of the training, at its beginning, that is on clean images, and the share after that in which
    # the attack grows from 0 to EPS.
    cfg.SOLVER.ADVERSARIAL.CLEAN = 0.0
    cfg.SOLVER.ADVERSARIAL.WARMUP = 0.0
    # Replays: SOLVER.MAX_ITER, STEPS, WARMUP_ITERS and CHECKPOINT_PERIOD and TEST.EVAL_PERIOD count batches,
    # of REPLAYS iterations each.
    cfg.SOLVER.ADVERSARIAL.COUNT_BATCHES = False
    # With each evaluation of the training, so many images of each test set, evenly spread, are also attacked
    # by 10 steps of PGD on A_cls within EPS: "bbox_attacked/AP", which TEST.BEST_METRIC may name. 0: none.
    cfg.SOLVER.ADVERSARIAL.EVAL_IMAGES = 0
    # With TEST.EVAL_PERIOD, save the weights with the best value of this metric as model_best.pth. "": none.
    cfg.TEST.BEST_METRIC = "bbox/AP"
    # COCO's AP counts so many detections of a category in an image, those of the highest scores. 0: 100, as
    # COCO does, or TEST.DETECTIONS_PER_IMAGE if that is more.
    cfg.TEST.COCO_MAX_DETS = 0

    # tools/evaluate_robustness.py: AP under attack. PGD on the detector's input.
    cfg.TEST.ATTACK = CN()
    # "ours": the keys below count. "oddefense" (Li et al., TIFS 2025), "ares" (ARES 2.0) and, of semantic
    # segmentation, "sea" (Croce et al., ECCV 2024) set them as published; several, such as
    # "ours,oddefense,ares", are all measured. See docs/evaluate-robustness.md.
    cfg.TEST.ATTACK.PROTOCOL = "ours"
    # L2 eps, for images in [0, 1] after resizing, such as (0.5, 1.0). Empty: no L2 attack.
    cfg.TEST.ATTACK.L2_EPS = ()
    # Linf eps, in units of 1/255, such as (1, 2, 4). Empty: no Linf attack.
    cfg.TEST.ATTACK.LINF_EPS = ()
    cfg.TEST.ATTACK.STEPS = 10
    # The size of a step, in the units of eps. 0: 2.5 * eps / STEPS.
    cfg.TEST.ATTACK.STEP_SIZE = 0.0
    # APGD, which finds its step sizes itself and keeps the best iterate, instead of PGD.
    cfg.TEST.ATTACK.ADAPTIVE = False
    # With ADAPTIVE: begin in a ball of 2 eps, go on in one of 1.5 eps, and end in that of eps.
    cfg.TEST.ATTACK.REDUCE_RADIUS = False
    # Where PGD begins: at the "image", or at a "random" point of the ball.
    cfg.TEST.ATTACK.START = "image"
    # Keep the iterate with the largest objective instead of the last one.
    cfg.TEST.ATTACK.BEST = False
    # With more than one, each restart begins at a random point, and each image keeps the strongest.
    cfg.TEST.ATTACK.RESTARTS = 1
    # What the attacks raise. Training losses: "classification", "localization", "mask", "all" of them, or
    # "no_regression". The box head's alone: "A_cls", "A_reg", "A_box" (both), "A_cwa" (both, rare classes
    # count more), "MTD", "DAG". "vanishing" aims to leave no detection. Each one is evaluated; with several,
    # "worst" takes for each image the one that does most harm.
    cfg.TEST.ATTACK.LOSSES = ("all",)
    # Aim for a wrong class instead of away from the true one: "classification" and "A_cls".
    cfg.TEST.ATTACK.TARGETED = False
    # What the loss of a proposal counts at most, for the box head's objectives. 0: no limit.
    cfg.TEST.ATTACK.CLIP = 0.0
    # Whether the padding that the detector adds to an image may be changed, too.
    cfg.TEST.ATTACK.PADDING = False
    # So many images of one size are attacked and evaluated at once. It changes no number but by rounding.
    cfg.TEST.ATTACK.IMS_PER_BATCH = 1
    # Attack in mixed precision, on GPUs. The detector is evaluated in full precision.
    cfg.TEST.ATTACK.AMP = False
    # The number of images to attack, evenly spread over the test set. 0: all.
    cfg.TEST.ATTACK.MAX_IMAGES = 0
    # Also evaluate on random noise of the same size, for comparison.
    cfg.TEST.ATTACK.NOISE = True

    # Checks against gradient masking: so many images are also attacked with a huge eps and by random search.
    # 0: only the checks that cost nothing.
    cfg.TEST.ATTACK.CHECK_IMAGES = 10
    # The number of queries of the random search.
    cfg.TEST.ATTACK.QUERIES = 100
    # Weights of another detector of the same config, whose attacks are then tried on this one. "": none.
    cfg.TEST.ATTACK.SURROGATE = ""

    # tools/evaluate_robustness.py: AP under common corruptions.
    cfg.TEST.CORRUPTION = CN()
    # Such as ("fog", "gaussian_noise"). ("common",): the benchmark's 15. ("all",): these and 4 more.
    cfg.TEST.CORRUPTION.NAMES = ()
    # From 1, hardly visible, to 5.
    cfg.TEST.CORRUPTION.SEVERITIES = (1, 2, 3, 4, 5)
    # The number of images to corrupt, evenly spread over the test set. 0: all.
    cfg.TEST.CORRUPTION.MAX_IMAGES = 0

    # tools/evaluate_robustness.py: box AP on other test sets with the same classes, by name. "coco_o": the
    # six domains of COCO-O, such as coco_o_sketch.
    cfg.TEST.NATURAL = ()

    # For each attack and corruption, save pictures of this many images before and after the change.
    cfg.TEST.PICTURES = 0
    return cfg
