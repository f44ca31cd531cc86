"""How strong an attack is in the course of a training."""

from dataclasses import dataclass

import torch

from rt_detectron.utils.errors import InputError


@dataclass(frozen=True)
class EpsSchedule:
    """How strong the attack is in the course of a training.

    Attributes:
        clean: share of the training, at its beginning, that is on clean images. These steps cost no attack,
            and a network that has already learned something becomes robust in less time than a random one.
        warmup: share of the training after that in which the attack grows linearly to its full strength.
        grows: what grows in the warm-up. "eps": attack all images at a growing eps. "images": attack a
            growing fraction of the batch at full eps, which is proportionally cheaper.
        random: scale the eps of each batch by a uniform random number in [0, 1], in each process by its own.
    """

    clean: float = 0.0
    warmup: float = 0.0
    grows: str = "eps"
    random: bool = False

    def __post_init__(self):
        for name in ("clean", "warmup"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise InputError(f"eps schedule: {name} is {value!r}; it is a share of training, 0 to 1")
        if self.clean + self.warmup > 1:
            raise InputError(
                f"eps schedule: clean {self.clean} and warmup {self.warmup} are more than the training: the "
                "attack would never have its full strength"
            )
        if self.grows not in ("eps", "images"):
            raise InputError(f"eps schedule: grows is {self.grows!r}; it must be 'eps' or 'images'")

    @property
    def changes_eps(self) -> bool:
        """Whether eps is ever less than the attack's own."""
        return self.random or (self.grows == "eps" and (self.clean > 0 or self.warmup > 0))

    def __call__(self, progress: float) -> float:
        """The factor of eps, in [0, 1], after the share ``progress`` of the training."""
        scale = self._strength(progress) if self.grows == "eps" else 1.0
        return scale * torch.rand(()).item() if self.random else scale

    def attacked(self, images: int, progress: float) -> int:
        """How many of the ``images`` of a batch are attacked."""
        return round(images * self._strength(progress)) if self.grows == "images" else images

    def _strength(self, progress: float) -> float:
        if progress < self.clean:
            return 0.0
        return min((progress - self.clean) / self.warmup, 1.0) if self.warmup else 1.0


FULL_STRENGTH = EpsSchedule()  # throughout the training
