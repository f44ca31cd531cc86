from .common.demo import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

model.attack = None
train.output_dir = "./output/demo/standard"
