"""Keys of `train`, shared by every recipe."""

train = dict(
    output_dir="./output/pretrain",
    init_checkpoint="",  # weights to start from, or to evaluate with --eval-only
    seed=0,
    device="cuda",  # falls back to the CPU where there is no GPU
    cudnn_benchmark=False,  # let cuDNN try which convolution is fastest: pays where images have few sizes
    compile=None,  # or torch.compile's backend "inductor": for GPUs; the first steps then take minutes
    amp=None,  # mixed precision: "bf16", or "fp16" (on GPUs)
    attack_amp=None,  # of the attack alone, which needs less precision: "bf16" or "fp16"; None: as amp
    accumulate=1,  # split a process's images into so many parts, for memory; the optimiser sees their sum
    sync_bn=False,  # batch norm over all processes instead of each one's images
    ema=0.0,  # decay of the averaged weights that are evaluated and exported, e.g. 0.9998; 0 is none
    epochs=90,
    eval_epochs=5,  # evaluate every so many epochs, and at the end
    checkpoint_epochs=1,  # write a checkpoint to resume from every so many epochs
    log_period=20,  # iterations
)
