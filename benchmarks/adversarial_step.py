"""Images/s of an adversarial training step (PGD-3, L2): ours, with and without its parts, and other packages.

    python benchmarks/adversarial_step.py [--arch resnet18 --size 64 --batch 64 --rounds 7]
    python benchmarks/adversarial_step.py --device cuda --amp bf16 --size 224 --batch 256     # on a GPU

All start from the same weights and train on the same batch with the same SGD. They take turns. Printed are
median and range over the rounds, and the loss of the last step, which is equal up to rounding for those that
compute the same. On a CPU all keep freed memory, as our tools do. --memory prints peak memory instead, each
in its own process. Packages that are not installed are named and left out.

pip install --no-deps -r benchmarks/requirements.txt
"""

import argparse
import importlib
import math
import multiprocessing
import resource
import sys
import types
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from unittest import mock

import torch
import torch.nn.functional as F
from plain import AMP, MEAN, STD, Normalised, device_name, plain_pgd, ratios, seconds, spread
from torch import Tensor, nn
from tqdm import tqdm

from rt_detectron.attacks import PGD, ThreatModel
from rt_detectron.checkpoint.architectures import build_classifier
from rt_detectron.layers import small_maps
from rt_detectron.layers.folding import FoldedNetwork
from rt_detectron.layers.small_maps import use_small_maps
from rt_detectron.modeling.classifier import Classifier
from rt_detectron.utils.memory import keep_freed_memory
from rt_detectron.utils.ranges import images_are_checked

EPS, STEPS = 3.0, 3
STEP_SIZE = 2 * EPS / STEPS
Step = Callable[[], Tensor]  # gives the loss
scaler = torch.amp.GradScaler("cpu", enabled=False)  # of losses in fp16


def network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(arch)


def training_step(
    model: nn.Module, images, labels, attack: Callable, fused: bool = False, zero_first: bool = False
) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, fused=fused)

    def step() -> Tensor:
        if zero_first:  # the attack can have the gradients' memory
            optimizer.zero_grad(set_to_none=True)
        adversarial = attack()
        model.train()
        loss = F.cross_entropy(model(adversarial), labels)
        optimizer.zero_grad(set_to_none=True)
        update(loss, optimizer)
        return loss.detach()

    return step


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast(loss.device.type, enabled=False):
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def clean(arch, images, labels) -> Step:
    model = Normalised(network(arch)).to(images.device)
    return training_step(model, images, labels, lambda: images)


def plain(half: bool = False) -> Callable[..., Step]:
    def build(arch, images, labels) -> Step:
        model = Normalised(network(arch)).to(images.device)

        def attack():
            with attack_in_bf16(images, half):
                return plain_pgd(model, images, labels, EPS, STEPS)

        return training_step(model, images, labels, attack)

    return build


def all_in_bf16(build: Callable[..., Step]) -> Callable[..., Step]:
    """Mixed precision, as by train.amp: autocast in the attack and in the training pass."""

    def mixed(arch, images, labels) -> Step:
        step = build(arch, images, labels)

        def run() -> Tensor:
            with torch.autocast(images.device.type, torch.bfloat16):
                return step()

        return run

    return mixed


def attack_in_bf16(images: Tensor, half: bool) -> AbstractContextManager:
    return torch.autocast(images.device.type, torch.bfloat16) if half else nullcontext()


def ours(
    folded: bool = True, channels_last: bool = True, fused: bool = False, half: bool = False
) -> Callable[..., Step]:
    def build(arch, images, labels) -> Step:
        torch.manual_seed(0)  # the weights of the others, by the same numbers
        model = Classifier(arch, 1000).to(images.device)
        use_small_maps(model, images.device)
        if not channels_last:
            model = Normalised(model.network.to(memory_format=torch.contiguous_format)).to(images.device)
        target = FoldedNetwork(model) if folded else model
        pgd = PGD(ThreatModel("l2", EPS), STEPS, relative_step_size=2.0)

        def attack():
            with attack_in_bf16(images, half), images_are_checked():
                adversarial = pgd(target, images, labels)
            if folded:
                target.forget()
            return adversarial

        return training_step(model, images, labels, attack, fused, zero_first=True)

    return build


def ours_without_small_maps(arch, images, labels) -> Step:
    return mock.patch.object(small_maps, "MAX_SIDE", {})(ours()(arch, images, labels))


def robustness(use_best: bool) -> Callable[..., Step]:
    def build(arch, images, labels) -> Step:
        # It moves everything to a GPU, and wants a module that torchvision dropped.
        if images.device.type == "cpu":
            torch.Tensor.cuda = lambda self, *_, **__: self
        utils = types.ModuleType("torchvision.models.utils")
        utils.load_state_dict_from_url = None
        sys.modules["torchvision.models.utils"] = utils
        from robustness import imagenet_models
        from robustness.attacker import AttackerModel

        own = getattr(imagenet_models, arch)()  # its forward takes more arguments than torchvision's
        own.load_state_dict(network(arch).state_dict())
        model = AttackerModel(own, types.SimpleNamespace(mean=MEAN, std=STD)).train()
        model.to(images.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        options = {"constraint": "2", "eps": EPS, "step_size": STEP_SIZE, "iterations": STEPS}
        options |= {"do_tqdm": False, "use_best": use_best, "random_start": False, "custom_loss": None}

        def step() -> Tensor:
            output, _ = model(images, target=labels, make_adv=True, **options)
            loss = F.cross_entropy(output, labels)
            optimizer.zero_grad()
            update(loss, optimizer)
            return loss.detach()

        return step

    return build


def torchattacks(arch, images, labels) -> Step:
    peer = importlib.import_module("torchattacks")
    model = Normalised(network(arch)).to(images.device).train()
    attack = peer.PGDL2(model, eps=EPS, alpha=STEP_SIZE, steps=STEPS, random_start=False)
    return training_step(model, images, labels, lambda: attack(images, labels))


def foolbox(arch, images, labels) -> Step:
    peer = importlib.import_module("foolbox")
    model = Normalised(network(arch)).to(images.device)
    attack = peer.attacks.L2ProjectedGradientDescentAttack(
        abs_stepsize=STEP_SIZE, steps=STEPS, random_start=False
    )

    def make():
        wrapped = peer.PyTorchModel(model.eval(), bounds=(0, 1), device=images.device)
        return attack.run(wrapped, images, labels, epsilon=EPS)

    return training_step(model, images, labels, make)


def art(arch, images, labels) -> Step:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = Normalised(network(arch)).to(images.device)
    kind = "cpu" if images.device.type == "cpu" else "gpu"
    estimator = PyTorchClassifier(
        model, F.cross_entropy, tuple(images.shape[1:]), 1000, clip_values=(0, 1), device_type=kind
    )
    attack = ProjectedGradientDescentPyTorch(
        estimator, norm=2, eps=EPS, eps_step=STEP_SIZE, max_iter=STEPS, batch_size=len(images), verbose=False
    )
    array, target = images.cpu().numpy(), labels.cpu().numpy()

    def make():
        return torch.from_numpy(attack.generate(array, target)).to(images.device)

    return training_step(model, images, labels, make)


SIDES: dict[str, Callable[..., Step]] = {
    "ours": ours(),
    "ours, attack in bf16": ours(half=True),
    "ours, all in bf16": all_in_bf16(ours()),
    "ours, optimiser fused": ours(fused=True),
    "ours, small maps convolved directly": ours_without_small_maps,
    "ours, not folded": ours(folded=False),
    "ours, not folded, not channels_last": ours(folded=False, channels_last=False),
    "plain loop": plain(),
    "plain loop, attack in bf16": plain(half=True),
    "plain loop, all in bf16": all_in_bf16(plain()),
    "robustness (use_best=False)": robustness(False),
    "robustness (its default)": robustness(True),
    "torchattacks": torchattacks,
    "foolbox": foolbox,
    "ART": art,
    "clean step (no attack)": clean,
}


def measure(args: argparse.Namespace) -> None:
    images, labels = batch(args)
    steps = {}
    for name in args.sides or SIDES:
        try:
            steps[name] = SIDES[name](args.arch, images, labels)
        except ImportError as error:
            print(f"left out: {name} ({error})")
    times, losses = {name: [] for name in steps}, {}
    for i in tqdm(range(args.rounds + 1), desc="rounds", disable=None):
        for name, step in steps.items():
            with torch.autocast(args.device, AMP[args.amp], enabled=args.amp is not None):
                took, losses[name] = seconds(step, images.device)
            if i:  # the first warms up
                times[name].append(took)
    reference = times.get("robustness (use_best=False)", times.get("plain loop", [math.nan] * args.rounds))
    how = f"{device_name(images.device)}, {args.amp or 'float32'}"
    print(f"{args.arch}, {args.size} px, batch {args.batch}, {how}")
    print(f"{'':<36} {'images/s':>26} {'x robustness':>20} {'loss':>8}")
    speed = {name: spread([args.batch / each for each in taken]) for name, taken in times.items()}
    gain = {name: spread(ratios(reference, taken)) for name, taken in times.items()}
    for name in times:
        print(f"{name:<36} {speed[name]:>26} {gain[name]:>20} {losses[name]:>8.4f}")
    if "ours" in times:
        print(
            "\n| network | pixels | batch | on | ours, images/s | x robustness |\n|---|--:|--:|---|--:|--:|"
        )
        print(f"| {args.arch} | {args.size} | {args.batch} | {how} | {speed['ours']} | {gain['ours']} |")


def batch(args: argparse.Namespace):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(args.batch, 3, args.size, args.size, generator=generator)
    labels = torch.randint(0, 1000, (args.batch,), generator=generator)
    return images.to(args.device), labels.to(args.device)


def peak(args: argparse.Namespace, name: str) -> None:
    step = SIDES[name](args.arch, *batch(args))
    for _ in range(3):
        step()
    print(f"{name:<38} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:>9.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18", choices=("resnet18", "resnet50"))
    parser.add_argument("--size", type=int, default=64, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE", help=", ".join(SIDES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", choices=("bf16", "fp16"), help="mixed precision; float32 without")
    parser.add_argument("--memory", action="store_true", help="peak memory of ours and of the plain loop")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")
    if args.device == "cpu":
        keep_freed_memory()
    global scaler
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    if not args.memory:
        measure(args)
        return
    for name in ("ours", "plain loop"):
        process = multiprocessing.get_context("spawn").Process(target=peak, args=(args, name))
        process.start()
        process.join()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
