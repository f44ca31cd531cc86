"""Keys of `train`, shared by every recipe."""

train = dict(
    output_dir="./output/pretrain",
    init_checkpoint="",  # weights to evaluate with --eval-only
    seed=0,
    device="cuda",  # falls back to the CPU where there is no GPU
    amp=False,  # mixed precision, on GPUs
    epochs=90,
    eval_epochs=5,  # evaluate every so many epochs, and at the end
    checkpoint_epochs=1,  # write a checkpoint to resume from every so many epochs
    log_period=20,  # iterations
)
