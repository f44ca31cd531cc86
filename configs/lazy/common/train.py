"""Keys of `train`: Detectron2's common/train.py, and ours."""

from detectron2 import model_zoo

train = model_zoo.get_config("common/train.py").train
train.update(
    seed=-1,  # -1 draws one
    ema=0.0,  # decay of the averaged weights that are evaluated and saved, e.g. 0.999; 0 is none
    best_metric="bbox/AP",  # with eval_period, its best weights are kept as model_best.pth; "" keeps none
    on_corrupt="stop",  # what to do with an image that cannot be read; "skip" trains without it
    # Adversarial training: what SOLVER.ADVERSARIAL.* of rt_detectron/config.py are. Each batch is trained on
    # `replays` times, its images moving against the detector, or attacked by `steps` of PGD; 0 is none.
    # eps is of one image in [0, 1] after resizing, for linf in units of 1/255.
    adversarial=dict(
        replays=0,
        steps=0,
        norm="l2",
        eps=0.5,
        step_size=0.0,
        start="random",
        loss="all",
        clip=0.0,
        carry_over=False,
        clean=0.0,
        warmup=0.0,
        count_batches=False,
        eval_images=0,
    ),
)
