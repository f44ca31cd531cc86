from .fixed_feature import dataloader, dataset, features, head, lr_multiplier, optimizer, train, transfer

# Images of 32 pixels as they are, for networks that were pretrained on such.
dataset.resize = dataset.image_size = 32
train.output_dir = "./output/transfer/small_fixed_feature"
