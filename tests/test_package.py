"""What holds for the package as a whole: how it imports, and which room may know of which."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "rt_detectron"
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
# Each room stands on a floor, and knows only the rooms below it that are listed with it.
FLOORS = (
    {"utils": set(), "config": set()},
    {
        "checkpoint": {"utils"},
        "attacks": {"utils"},
        "layers": {"utils"},
        "data": {"utils"},
        "visualization": {"utils"},
    },
    {
        "engine": {"checkpoint", "utils"},
        "modeling": {"checkpoint", "config", "layers", "utils"},
        "evaluation": {"attacks", "config", "data", "layers", "utils", "visualization"},
        "study": {"utils", "visualization"},
    },
    {
        "__init__": {"checkpoint", "modeling", "utils"},
        "pretrain": {
            "attacks", "checkpoint", "data", "engine", "layers", "modeling", "utils", "visualization",
        },
        "detection": {
            "attacks", "checkpoint", "config", "data", "engine", "evaluation", "layers", "modeling", "utils",
        },
    },
    {
        "transfer": {"checkpoint", "data", "engine", "layers", "modeling", "pretrain", "utils"},
        "model_zoo": {"checkpoint", "detection", "utils"},
    },
)  # fmt: skip
ROOMS = {room: known for floor in FLOORS for room, known in floor.items()}
# Rooms that read files only: comparing results must not wait for, or need, what made them.
WITHOUT_TORCH = ("study", "visualization", "utils.arrays", "utils.errors", "utils.files", "utils.numbers")


def python(code: str, *arguments: str, blocked=()) -> subprocess.CompletedProcess:
    """Run ``code`` in a process of its own where importing ``blocked`` fails."""
    block = f"import sys; sys.modules.update(dict.fromkeys({list(blocked)!r}))\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + code, *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_importing_registers_everything_without_the_optional_packages():
    blocked = [
        "timm",
        "huggingface_hub",
        "imagecorruptions",
        "ray",
        "webdataset",
        "safetensors",
        "cv2",
        "skimage",
        "sklearn",
    ]
    code = """
import types
# torchvision imports its own datasets, so an empty module stands in for them.
sys.modules["torchvision.datasets"] = types.ModuleType("torchvision.datasets")
import rt_detectron
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.file_io import PathManager

assert {name for name, _ in BACKBONE_REGISTRY if "robust" in name} == {
    f"build_{name}_backbone"
    for family in ("resnet", "torchvision", "timm")
    for name in (f"robust_{family}", f"robust_{family}_fpn", f"retinanet_robust_{family}_fpn")
} | {"build_robust_timm_sfp_backbone", "build_retinanet_robust_timm_sfp_backbone"}
try:
    PathManager.get_local_path("robust://resnet50_l2_eps3.pkl")
except rt_detectron.utils.errors.InputError as error:
    assert "RT_DETECTRON_ZOO is not set" in str(error)
else:
    raise SystemExit("robust:// is not handled")
loaded = [name for name in sys.modules if name.startswith("rt_detectron.")]
for room in ("engine", "pretrain", "transfer", "study", "data", "attacks", "visualization"):
    assert f"rt_detectron.{room}" not in loaded, room
# The rest of what a detector's training needs does without them, too.
import rt_detectron.checkpoint.convert, rt_detectron.detection, rt_detectron.attacks
print(rt_detectron.__version__)
"""
    environment = {key: os.environ.pop(key) for key in ("RT_DETECTRON_ZOO",) if key in os.environ}
    try:
        finished = python(code, blocked=blocked)
    finally:
        os.environ.update(environment)
    assert finished.returncode == 0, finished.stderr
    # The version is written twice, since setup.py must not import the package.
    assert finished.stdout.strip() == setup("--version")


def setup(*arguments: str) -> str:
    code = "import runpy; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    finished = python(code, *arguments, blocked=["torch", "torchvision", "detectron2", "numpy", "fvcore"])
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip().splitlines()[-1]


def test_setup_reads_without_torch_and_detectron2():
    assert setup("--name") == "rt_detectron"


def test_every_module_imports_and_the_reading_rooms_need_no_torch():
    light = [
        name
        for name in MODULES
        if any(f"{name}.".startswith(f"rt_detectron.{room}.") for room in WITHOUT_TORCH)
    ]
    # The package's own __init__ needs Detectron2, so the light rooms are imported below a bare stand-in.
    code = f"""
import importlib, types
stand_in = types.ModuleType("rt_detectron")
stand_in.__path__ = [{str(PACKAGE)!r}]
stand_in.__version__ = "0"
sys.modules["rt_detectron"] = stand_in
for name in {light}:
    importlib.import_module(name)
    assert not {{"torch", "detectron2"}} & sys.modules.keys(), name
for name in [name for name in sys.modules if name.split(".")[0] == "rt_detectron"]:
    del sys.modules[name]
for name in {MODULES}:
    importlib.import_module(name)
"""
    finished = python(code)
    assert finished.returncode == 0, finished.stderr


def test_the_rooms_are_those_of_the_plan():
    rooms = {(*module.split("."), "__init__")[1] for module in MODULES}
    assert rooms == set(ROOMS)
    assert len(FLOORS) + 1 == 6  # with tools and benchmarks on top


def test_every_arrow_of_the_plan_points_down():
    below: set[str] = set()
    for floor in FLOORS:
        for room, known in floor.items():
            assert known <= below, f"{room} knows {known - below}, on its own floor or above"
        below |= floor.keys()


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_only_what_the_plan_allows(module):
    room = (*module.split("."), "__init__")[1]
    forbidden = imported_rooms(module) - ROOMS[room] - {room}
    assert not forbidden, f"{module} imports {', '.join(sorted(forbidden))}"


def test_modules_import_each_other_without_a_circle():
    left = {module: imported_modules(module) - {module} for module in MODULES}
    while left:
        free = [module for module, imported in left.items() if not imported & left.keys()]
        assert free, f"a circle among {', '.join(left)}"
        for module in free:
            del left[module]


def test_error_lines_name_the_packages_of_an_extra():
    """What a line about a missing package has pip install is one extra of pyproject.toml, or a part of it."""
    lists = re.findall(r"(?ms)^[\w-]+ = \[(.*?)\]", (REPOSITORY / "pyproject.toml").read_text())
    extras = [set(re.findall(r'"([^"]+)"', packages)) for packages in lists]
    named = [
        set(ast.literal_eval(call.args[1]).split())
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "optional_import"
    ]
    assert len(named) > 5
    assert not [packages for packages in named if not any(packages <= extra for extra in extras)]


@pytest.mark.parametrize("tool", sorted((REPOSITORY / "tools").glob("*.py")), ids=lambda path: path.name)
def test_no_tool_imports_another(tool):
    tools = {path.stem for path in tool.parent.glob("[a-z]*.py")}  # _environment is none
    assert not {name.split(".")[0] for name in imported_names(tool, "tools")} & (tools | {"tools"})


def imported_rooms(module: str) -> set[str]:
    """The first part below rt_detectron of everything that the module imports."""
    return {(*name.split("."), "__init__")[1] for name in _ours(module)}


def imported_modules(module: str) -> set[str]:
    """The modules of the package that the module imports."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in _ours(module)}


def _ours(module: str) -> set[str]:
    path = REPOSITORY.joinpath(*module.split("."))
    is_package = path.is_dir()
    path = path / "__init__.py" if is_package else path.with_suffix(".py")
    names = imported_names(path, module if is_package else module.rpartition(".")[0])
    return {name for name in names if name.split(".")[0] == "rt_detectron"}


def imported_names(path: Path, package: str) -> set[str]:
    """Dotted names of all imports in a file, also those within functions; relative ones made absolute."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from rt_detectron.checkpoint import zoo` names a module, `... import Checkpointer` not
            inside = {f"{module}.{alias.name}" for alias in node.names}
            names |= (inside & set(MODULES)) or {module}
    return names


def test_the_reader_of_imports_sees_every_form(tmp_path):
    (tmp_path / "x.py").write_text(
        "import rt_detectron\nimport rt_detectron.study.grid\nfrom rt_detectron import modeling\n"
        "from . import pgd\nfrom ..engine import Trainer\ndef f():\n    from rt_detectron.data import x\n"
    )
    assert imported_names(tmp_path / "x.py", "rt_detectron.attacks") == {
        "rt_detectron",
        "rt_detectron.study.grid",
        "rt_detectron.modeling",
        "rt_detectron.attacks.pgd",
        "rt_detectron.engine",
        "rt_detectron.data",
    }
