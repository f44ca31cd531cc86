"""Packaging of rt_detectron. Imports neither torch nor detectron2, so metadata builds on a bare Python."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# What `import detectron2` needs beside torch. Listed here because Detectron2's Python-only
# installation (see tools/setup_environment.py) comes without its dependencies.
DETECTRON2_NEEDS = [
    "cloudpickle",
    "hydra-core>=1.3",
    "iopath>=0.1.9",
    "matplotlib",
    "omegaconf<2.4",
    "setuptools<81",  # detectron2.model_zoo imports pkg_resources, gone from setuptools 82 on
    "tabulate",
    "tensorboard",
    "termcolor",
    "tqdm",
    "yacs",
]

EXTRAS = {
    "demo": ["scikit-image>=0.22", "scikit-learn>=1.3"],
    "webdataset": ["webdataset>=1.0"],
    "autoattack": ["pyautoattack>=0.2"],
    "corruptions": ["imagecorruptions>=1.1.2", "scikit-image>=0.22"],
    "study": ["ray>=2.40"],
    "lvis": ["lvis"],
    "transfer": ["scikit-learn>=1.3"],
    "safetensors": ["safetensors>=0.4"],
    "timm": ["timm>=1.0.31"],
    "test": ["dill", "pytest>=8"],
    "lint": ["ruff"],
}

setup(
    name="rt_detectron",
    version="0.1.0",
    description="Adversarially robust backbones for Detectron2, and their fair comparison with standard ones",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["rt_detectron", "rt_detectron.*"]),
    package_data={
        "rt_detectron.checkpoint": ["zoo.json"],
        "rt_detectron.study": ["report.css", "report.html.j2"],
    },
    install_requires=[
        "faster-coco-eval>=1.7",
        "filelock",
        "fvcore>=0.1.5",
        "huggingface_hub>=0.30",
        "jinja2",
        "numpy",
        "opencv-python",
        "pandas>=2.2",
        "pillow",
        "pycocotools>=2.0.7",
        "pyyaml",
        "scipy",
        "torch>=2.6",  # from here on torch.load runs no code of the file unless told to
        "torchvision>=0.21",
        *DETECTRON2_NEEDS,
    ],
    extras_require={**EXTRAS, "all": sorted({need for needs in EXTRAS.values() for need in needs})},
)
