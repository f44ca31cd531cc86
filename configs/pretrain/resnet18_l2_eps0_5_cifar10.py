from .common.small import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

train.output_dir = "./output/pretrain/resnet18_l2_eps0_5_cifar10"
