from .common.demo import dataloader, evaluator, lr_multiplier, model, optimizer, threat_model, train

train.output_dir = "./output/demo/robust"
