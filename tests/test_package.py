"""What holds for the package as a whole: how it imports, and which room may know of which."""

import ast
import os
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
# Each room may import itself, these, and the rooms listed below; arrows only point downward.
EVERYONES = ("errors", "files", "versions")
ROOMS = {
    "errors": set(),
    "files": set(),
    "versions": set(),
    "launch": set(),
    "config": set(),
    "lazy_config": set(),
    "checkpoint": set(),
    "hooks": {"checkpoint"},
    "data": set(),
    "visualization": set(),
    "modeling": {"checkpoint", "config"},
    "attacks": {"modeling"},
    "pretrain": {"attacks", "checkpoint", "hooks", "lazy_config", "modeling", "visualization"},
    "evaluation": {"attacks", "data", "visualization"},
    "study": {"visualization"},
    "transfer": {"attacks", "checkpoint", "hooks", "lazy_config", "modeling", "pretrain"},
    "engine": {"evaluation", "attacks", "checkpoint", "config", "data", "hooks", "lazy_config", "modeling"},
    "__init__": {"modeling", "checkpoint"},
}
# Rooms that read files only: comparing results must not wait for, or need, what made them.
WITHOUT_TORCH = ("study", "visualization", "errors", "files")


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

for name in ("robust_resnet", "robust_resnet_fpn", "retinanet_robust_resnet_fpn"):
    assert f"build_{name}_backbone" in BACKBONE_REGISTRY, name
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
import rt_detectron.checkpoint.convert, rt_detectron.engine, rt_detectron.attacks
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
    light = [name for name in MODULES if name.split(".")[1:2] and name.split(".")[1] in WITHOUT_TORCH]
    # The package's own __init__ needs Detectron2, so the light rooms are imported below a bare stand-in.
    code = f"""
import importlib, types
stand_in = types.ModuleType("rt_detectron")
stand_in.__path__ = [{str(PACKAGE)!r}]
stand_in.__version__ = "0"
sys.modules["rt_detectron"] = stand_in
hidden = dict.fromkeys(["torch", "detectron2"])
sys.modules.update(hidden)
for name in {light}:
    importlib.import_module(name)
for name in [name for name in sys.modules if name.split(".")[0] == "rt_detectron" or name in hidden]:
    del sys.modules[name]
for name in {MODULES}:
    importlib.import_module(name)
"""
    finished = python(code)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_only_downward(module):
    room = (*module.split("."), "__init__")[1]
    forbidden = imported_rooms(module) - ROOMS[room] - {room, *EVERYONES}
    if module == "rt_detectron.utils.versions":
        forbidden -= {"__init__"}  # for __version__
    assert not forbidden, f"{module} imports {', '.join(sorted(forbidden))}"


def test_the_table_has_no_circle():
    left = {room: allowed - {room} for room, allowed in ROOMS.items()}
    while left:
        free = [room for room, allowed in left.items() if not allowed & left.keys()]
        assert free, f"a circle among {', '.join(left)}"
        for room in free:
            del left[room]


@pytest.mark.parametrize("tool", sorted((REPOSITORY / "tools").glob("*.py")), ids=lambda path: path.name)
def test_no_tool_imports_another(tool):
    tools = {path.stem for path in tool.parent.glob("*.py")}
    assert not {name.split(".")[0] for name in imported_names(tool, "tools")} & (tools | {"tools"})


def imported_rooms(module: str) -> set[str]:
    """The first part below rt_detectron of everything that the module imports."""
    path = REPOSITORY.joinpath(*module.split("."))
    is_package = path.is_dir()
    path = path / "__init__.py" if is_package else path.with_suffix(".py")
    names = imported_names(path, module if is_package else module.rpartition(".")[0])
    return {(*name.split("."), "__init__")[1] for name in names if name.split(".")[0] == "rt_detectron"}


def imported_names(path: Path, package: str) -> set[str]:
    """Dotted names of all imports in a file, also those within functions; relative ones made absolute."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from rt_detectron import modeling` names a room, `from rt_detectron.utils import x` does not
            names.update(f"{module}.{a.name}" for a in node.names if module == "rt_detectron")
            if module != "rt_detectron":
                names.add(module)
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
        "rt_detectron.attacks",
        "rt_detectron.engine",
        "rt_detectron.data",
    }
