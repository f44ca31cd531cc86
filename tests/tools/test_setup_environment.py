"""tools/setup_environment.py: its decisions one by one, then whole set-ups from stand-in wheels."""

import ast
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "setup_environment.py"
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def load(path):
    spec = importlib.util.spec_from_file_location("setup_environment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_environment = load(SCRIPT)


# ---------------------------------------------------------------- single decisions


def test_an_old_python_can_read_the_script_and_is_told():
    ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 6))
    with pytest.raises(setup_environment.SetupError, match=r"Python 3\.9 is too old.*3\.10"):
        setup_environment.check_python((3, 9, 18), "posix")
    setup_environment.check_python((3, 10, 0), "posix")


def test_windows_is_told():
    with pytest.raises(setup_environment.SetupError, match="WSL"):
        setup_environment.check_python((3, 12, 0), "nt")


def test_the_script_needs_the_standard_library_only():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


def test_a_python_without_ensurepip_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(setup_environment.SetupError, match="python3-venv"):
        setup_environment.check_venv_modules()


NO_INDEX = "ERROR: Could not find a version that satisfies the requirement torch (from versions: none)\n"
NO_VERSION = "ERROR: Could not find a version that satisfies the requirement torch (from versions: 2.4.0)\n"
NOT_FOUND = "ERROR: No matching distribution found for torch\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (NO_INDEX + NOT_FOUND, "no package index reachable"),
        (NO_VERSION + NOT_FOUND, "lacks a needed version"),
        ("ERROR: Could not install packages: [Errno 28] No space left on device\n", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE\n", "another file"),
        ("ERROR: ResolutionImpossible: for help visit ...\n", "lacks a needed version"),
        ("ERROR: ReadTimeoutError: Read timed out.\n", "connection to the package index broke"),
        (
            "Collecting x\n  error: command 'g++' failed\nERROR: Failed building wheel\n",
            "step failed (Failed",
        ),
        ("", "step failed (no reason given)"),
    ],
)
def test_pip_output_becomes_one_line(output, expected):
    line = setup_environment.explain(output, "step")
    assert expected in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("source", "requirement"),
    [
        ("https://example.org/d2.git", "git+https://example.org/d2.git"),
        ("git+https://example.org/d2.git@main", "git+https://example.org/d2.git@main"),
        ("git@example.org:owner/d2.git", "git+ssh://git@example.org/owner/d2.git"),
    ],
)
def test_git_sources(source, requirement, monkeypatch):
    monkeypatch.setattr(setup_environment.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert setup_environment.source_requirement(source) == requirement


def test_source_folders(tmp_path):
    with pytest.raises(setup_environment.SetupError, match=r"holds no setup\.py"):
        setup_environment.source_requirement(str(tmp_path))
    (tmp_path / "setup.py").touch()
    (tmp_path / "pyproject.toml").touch()
    assert setup_environment.source_requirement(str(tmp_path)) == str(tmp_path.resolve())
    with pytest.raises(setup_environment.SetupError, match="neither a folder nor a git URL"):
        setup_environment.source_requirement(str(tmp_path / "absent"))


def test_an_importable_detectron2_is_located(tmp_path, monkeypatch):
    package = tmp_path / "detectron2"
    package.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (package / "__init__.py").write_text("")
    assert setup_environment.locate_detectron2(sys.executable) == str(package)
    (package / "__init__.py").write_text("import a_module_that_is_absent")
    assert setup_environment.locate_detectron2(sys.executable) is None  # there, but does not import


def test_every_pin_is_one_release_per_python():
    pins = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
    pattern = re.compile(r'[\w.-]+==[\w.]+(; python_version (>=|<) "3\.11")?')
    assert [pin for pin in pins if not pattern.fullmatch(pin)] == []
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= set(pins)
    assert not re.search(r"(?m)^(nvidia|triton|cuda|sal-detectron2)", CONSTRAINTS)


# ---------------------------------------------------------------- whole set-ups

CLONED = [
    *["setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "tools/setup_environment.py"],
    *["rt_detectron/utils/versions.py", "tools/rt-detectron"],
]


def wheel(folder, name, version, files, tag="py3-none-any"):
    """Write a wheel with `files` {path: bytes}; return its path."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
    }
    path = folder / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in {**files, **info}.items():
            archive.writestr(member, content)
        listed = "".join(f"{member},,\n" for member in [*files, *info])
        archive.writestr(f"{stem}.dist-info/RECORD", f"{listed}{stem}.dist-info/RECORD,,\n")
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A folder for --find-links: a stand-in for each pin and for Detectron2, the real setuptools."""
    folder = tmp_path_factory.mktemp("index")
    for name, version in re.findall(r"(?m)^([\w.-]+)==([\w.]+)", CONSTRAINTS):
        module = name.lower().replace("-", "_")
        wheel(folder, name, version, {f"{module}/__init__.py": b""})
    real = distribution("setuptools")
    files = {
        str(file): real.locate_file(file).read_bytes()
        for file in real.files
        if not str(file).startswith("..") and ".dist-info" not in str(file) and file.suffix != ".pyc"
    }
    entry_points = real.read_text("entry_points.txt").encode()
    for old in folder.glob("setuptools-*"):
        old.unlink()
    files[f"setuptools-{real.version}.dist-info/entry_points.txt"] = entry_points
    wheel(folder, "setuptools", real.version, files)
    detectron2 = {"detectron2/__init__.py": b"import torch\n", "tools/__init__.py": b""}
    wheel(folder, "sal-detectron2", "0.7.2", detectron2, tag="cp310-none-any")
    return folder


def clone(folder, index=None):
    """Copy what a set-up needs into `folder`; with `index`, its Detectron2 is the known one."""
    folder.mkdir(exist_ok=True)
    for name in CLONED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "configs").mkdir()
    (folder / "rt_detectron" / "__init__.py").touch()
    pins = re.sub(r"(?m)^setuptools==.*", f"setuptools=={distribution('setuptools').version}", CONSTRAINTS)
    (folder / "constraints.txt").write_text(pins)
    if index:
        known = hashlib.sha256(next(index.glob("sal_detectron2*")).read_bytes()).hexdigest()
        script = folder / "tools" / "setup_environment.py"
        script.write_text(script.read_text().replace(setup_environment.WHEEL_SHA256, known))
    return folder


def bare_environment(index=None, **more):
    """os.environ without any setting of pip, virtual environment or set-up; offline, with `index` at most."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))}
    kept.pop("DETECTRON2_SOURCE", None)
    links = {"PIP_FIND_LINKS": str(index)} if index else {}
    return {
        **kept,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_NO_COMPILE": "1",
        **links,
        **more,
    }


# The interpreter behind this environment: it sees no Detectron2 of this environment's.
BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)


def set_up(folder, *arguments, environment, python=BASE_PYTHON):
    command = [python, str(folder / "tools" / "setup_environment.py"), "--min-free-gb", "0.1", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def imported_from(folder, module):
    code = f"import {module}; print({module}.__file__)"
    python = folder / ".venv" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd=folder / ".venv", env=environment
    )
    return result.stdout.strip() or result.stderr


def test_too_small_a_disk_stops_before_anything_is_installed(tmp_path):
    result = set_up(clone(tmp_path), "--min-free-gb", "1e9", environment=bare_environment())
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert "not enough disk" in result.stderr
    assert not (tmp_path / ".venv" / "bin").exists()


def test_a_wrong_source_stops_before_anything_is_installed(tmp_path):
    environment = bare_environment(DETECTRON2_SOURCE=str(tmp_path / "absent"))
    result = set_up(clone(tmp_path), environment=environment)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert "neither a folder nor a git URL" in result.stderr
    assert not (tmp_path / ".venv" / "bin").exists()


def test_no_index_is_one_line_that_names_the_log(tmp_path):
    result = set_up(clone(tmp_path), environment=bare_environment())
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert "no package index reachable" in result.stderr
    log = Path(result.stderr.rsplit(": ", 1)[1].strip())
    assert "No matching distribution" in log.read_text()


def test_a_detectron2_of_the_calling_python_is_used_with_its_torch(tmp_path, index):
    outer = tmp_path / "outer"
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", outer], check=True)
    packages = next(outer.glob("lib/*/site-packages"))
    for name, version in [("torch", "2.6.0"), ("torchvision", "0.21.0"), ("detectron2", "0.6")]:
        with zipfile.ZipFile(wheel(tmp_path, name, version, {f"{name}/__init__.py": b""})) as archive:
            archive.extractall(packages)
    folder = tmp_path / "clone"
    folder.mkdir()
    result = set_up(clone(folder), environment=bare_environment(index), python=outer / "bin" / "python")
    assert result.returncode == 0, result.stderr
    assert imported_from(folder, "detectron2").startswith(str(packages))
    assert imported_from(folder, "torch").startswith(str(packages))
    assert imported_from(folder, "yacs").startswith(str(folder))


@pytest.mark.slow  # half a minute of pip
def test_the_life_of_an_environment(tmp_path, index):
    """Two at once, again, a wheel with another hash, cut off and completed, from source."""
    folder, environment = clone(tmp_path / "clone", index), bare_environment(index)
    script = folder / "tools" / "setup_environment.py"
    command = [BASE_PYTHON, str(script), "--min-free-gb", "0.1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outputs = sorted((process.communicate(timeout=300)[0] for process in both), key=len)
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "waiting for it" in outputs[0]
    assert "installing" not in outputs[0]
    assert "environment ready" in outputs[1]
    packages = next(folder.glob(".venv/lib/*/site-packages"))
    assert imported_from(folder, "rt_detectron") == str(folder / "rt_detectron" / "__init__.py")
    assert not (packages / "tools").exists()  # the wheel's own, too common a name

    start = time.monotonic()
    again = set_up(folder, environment=environment)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert time.monotonic() - start < 5

    known = script.read_text()
    script.write_text(SCRIPT.read_text(encoding="utf-8"))  # knows the published wheel, not the stand-in
    shutil.rmtree(packages / "detectron2")
    result = set_up(folder, environment=environment)
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert "another file" in result.stderr
    assert "ModuleNotFoundError" in imported_from(folder, "detectron2")

    # as a kill in the middle of pip leaves it: a record, but not the files it lists, and no finished stamp
    script.write_text(known)
    shutil.rmtree(packages / "yacs")
    result = set_up(folder, environment=environment)
    assert result.returncode == 0, result.stderr
    assert imported_from(folder, "yacs").startswith(str(packages))

    source = tmp_path / "source"
    (source / "detectron2").mkdir(parents=True)
    (source / "detectron2" / "__init__.py").write_text("import torch\nSOURCE = True\n")
    (source / "setup.py").write_text(
        "import torch\n"  # as the official one does: no build isolation
        "from setuptools import setup\nsetup(name='detectron2', version='0.6', packages=['detectron2'])\n"
    )
    from_source = {**environment, "DETECTRON2_SOURCE": str(source)}
    result = set_up(folder, environment=from_source)
    assert result.returncode == 0, result.stderr
    assert "SOURCE" in (packages / "detectron2" / "__init__.py").read_text()
    assert not list(packages.glob("sal_detectron2*"))
    assert set_up(folder, environment=from_source).stdout == ""
    assert set_up(folder, environment=environment).stdout == ""  # unset again: nothing to change
