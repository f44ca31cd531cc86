from .common.transfer import dataloader, dataset, lr_multiplier, optimizer, train, transfer

# Only the last linear layer trains, on features that are computed once and cached.
transfer.method = "fixed_feature"

features = dict(
    batch_size=256,  # images
    flip=True,  # also of the mirror images, one of the two at random in training
    amp="fp16",  # mixed precision on GPUs: "fp16" or null; CPUs compute in float32
)
head = dict(
    solver="sgd",  # or "logistic_regression": the exact solution, by scikit-learn
    C=[1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0],  # logistic_regression: inverse L2 penalties to choose from
)

train.log_period = 10  # epochs: they are a head's iterations
train.checkpoint_epochs = 50
train.output_dir = "./output/transfer/fixed_feature"
