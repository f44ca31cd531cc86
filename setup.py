"""What pyproject.toml cannot say: the wheel carries configs and tools inside the package."""

from setuptools import find_packages, setup

CARRIED = {"rt_detectron.configs": "configs", "rt_detectron.tools": "tools"}

setup(
    packages=[*find_packages(include=["rt_detectron", "rt_detectron.*"]), *CARRIED],
    package_dir=CARRIED,
    # A script and no entry point, which would import the package, torch and Detectron2 before --help.
    scripts=["tools/rt-detectron"],
    package_data={
        "rt_detectron": ["py.typed"],
        "rt_detectron.checkpoint": ["zoo.json"],
        "rt_detectron.configs": ["**/*.py", "**/*.yaml"],
        "rt_detectron.study": ["report.css", "report.html.j2"],
    },
)
