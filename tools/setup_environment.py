#!/usr/bin/env python3
"""Make .venv: the pinned torch pair, rt_detectron (editable) and Detectron2. Behind `make setup`.

One file of standard library, as it runs before anything is installed, and with no syntax newer than
Python 3.6: an older Python must get as far as the line that says it is too old. Run it again at will:
a finished set-up costs a fraction of a second, an interrupted one is completed. See docs/install.md.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
LOG = VENV / "setup.log"
LOCK = VENV / "setup.lock"
SCRATCH = VENV / "tmp"
CONSTRAINTS = ROOT / "constraints.txt"

OLDEST_PYTHON = (3, 10)
EXTRAS = "autoattack,corruptions,demo,lvis,safetensors,study,timm,webdataset,test,lint"
FRESH_GB, COMPLETE_GB = 9.0, 1.0  # torch with its CUDA libraries: 5.5 GB installed, the rest while unpacking

# The official code as a wheel tagged for Python 3.10. Its Python part runs on newer ones too.
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
WHEEL_FLAGS = [
    *["--no-deps", "--require-hashes", "--only-binary=:all:"],
    *["--python-version", "3.10", "--implementation", "cp", "--abi", "none", "--platform", "any"],
]

# A host's own builds of these are kept when its Detectron2 is used: it was built against them.
HOST_BUILDS = ("torch", "torchvision", "numpy")


class SetupError(Exception):
    """What is wrong and the way out, in one line."""


# ---------------------------------------------------------------- checks before anything is written


def check_python(version, platform):
    """Raise SetupError unless `version` (a tuple) and `platform` (os.name) can carry the environment."""
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise SetupError(
            f"Python {version[0]}.{version[1]} is too old, rt_detectron needs 3.10 or newer: "
            "run `make PYTHON=python3.11 ...` (or another newer one)"
        )
    if platform != "posix":
        raise SetupError("Detectron2 runs on Linux and macOS only: on Windows use WSL")


def check_venv_modules():
    """Raise SetupError when Python was packaged without venv or ensurepip, as Debian does."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        raise SetupError(
            f"this Python cannot make virtual environments (no module {error.name}): "
            "on Debian or Ubuntu run `apt install python3-venv`, then try again"
        ) from None


def check_disk(needed_gb):
    """Raise SetupError when less than `needed_gb` (1e9 bytes) is free where .venv lies."""
    free_gb = shutil.disk_usage(str(ROOT)).free / 1e9
    if free_gb < needed_gb:
        raise SetupError(
            f"not enough disk: {ROOT} has {free_gb:.1f} GB free, the set-up needs about {needed_gb:g} GB; "
            "free some, clone to a larger disk, or take a smaller torch build (docs/install.md)"
        )


# ---------------------------------------------------------------- questions to an interpreter


def ask(python, code):
    """Run `code` in `python` away from the clone's folder; return the JSON it prints, None if it fails."""
    result = subprocess.run(
        [str(python), "-W", "ignore", "-c", code],
        cwd=os.path.dirname(str(python)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        return json.loads(result.stdout.decode().strip().splitlines()[-1]) if result.returncode == 0 else None
    except (ValueError, IndexError):
        return None


def locate_detectron2(python):
    """Folder of the Detectron2 that `python` can import (really imports, so it needs its torch), or None."""
    return ask(python, "import json, os, detectron2; print(json.dumps(os.path.dirname(detectron2.__file__)))")


def has_modules(python):
    """Whether `python` finds all that the set-up installs: the quick check, which imports nothing heavy."""
    names = ["detectron2", "torch", "torchvision", "rt_detectron", "pytest", "ruff", "mypy"]
    code = f"import json, importlib.util as u; print(json.dumps(all(u.find_spec(n) for n in {names})))"
    return ask(python, code) is True


def distributions(python, names):
    """{name: (version, whether it lies in .venv)} of those of the distributions that `python` sees."""
    code = (
        "import json, os, importlib.metadata as m\n"
        "found = {}\n"
        f"for name in {list(names)}:\n"
        "    try: d = m.distribution(name)\n"
        "    except m.PackageNotFoundError: continue\n"
        "    found[name] = d.version, os.path.realpath(str(d.locate_file('')))\n"
        "print(json.dumps(found))"
    )
    ours = os.path.join(os.path.realpath(str(VENV)), "")
    return {name: (v, where.startswith(ours)) for name, (v, where) in (ask(python, code) or {}).items()}


# ---------------------------------------------------------------- the stamp of a finished set-up


def fingerprint():
    """SHA-256 over everything that decides what gets installed, and over where."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", CONSTRAINTS, Path(__file__).resolve()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp():
    """What the last set-up noted, {} before the first.

    fingerprint: see there, None until finished; source: the DETECTRON2_SOURCE last asked for; built: the
    one that Detectron2 was built from here, "" if none.
    """
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_stamp(**entries):
    partial = STAMP.with_suffix(".partial")
    partial.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    os.replace(str(partial), str(STAMP))


def is_finished(stamp, source):
    """Whether the last set-up holds; an unset DETECTRON2_SOURCE asks for no change."""
    if stamp.get("fingerprint") != fingerprint() or (source and stamp.get("source") != source):
        return False
    return os.access(str(PYTHON), os.X_OK) and has_modules(PYTHON)


# ---------------------------------------------------------------- running pip


# What pip prints -> what to tell the user. The first that matches counts.
REASONS = [
    (
        r"No space left on device|Errno 28",
        "the disk is full: free about 9 GB (pip's cache and $TMPDIR take space too), then run again",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        f"the package index serves another file as {WHEEL} than the known one; it was not installed",
    ),
    (
        r"from versions: none",
        "no package index reachable: check network and proxy, or name a mirror in PIP_INDEX_URL",
    ),
    (
        r"NewConnectionError|Max retries|[Tt]imed out|ConnectionReset|name resolution|SSLError|ProxyError",
        "the connection to the package index broke: check network and proxy, then run again",
    ),
    (
        r"No matching distribution found|ResolutionImpossible",
        "the package index lacks a needed version for this Python and platform, or a kept torch is too old: "
        "see docs/install.md",
    ),
]


def explain(output, step):
    """One line from pip's output: what is wrong, and the way out where it is known."""
    for pattern, reason in REASONS:
        if re.search(pattern, output):
            return reason
    errors = re.findall(r"^\s*(?:ERROR|error|fatal): (.+)", output, flags=re.MULTILINE)
    return f"{step} failed ({errors[-1].strip() if errors else 'no reason given'})"


class Steps:
    """Runs the commands of one set-up: output to LOG, one line with the elapsed time on the screen."""

    def __init__(self, lock):
        self.lock = lock  # handed to children: the lock lives until the last one of them is gone
        self.environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0"}
        if "TMPDIR" not in os.environ:  # /tmp is often a small tmpfs, torch's wheels are not small
            shutil.rmtree(str(SCRATCH), ignore_errors=True)
            SCRATCH.mkdir()
            self.environment["TMPDIR"] = str(SCRATCH)

    def run(self, step, command):
        """Run `command`; SetupError with the reason and the log's name when it fails."""
        print(f"  {step} ...", end="", flush=True)
        start, offset = time.time(), LOG.stat().st_size if LOG.exists() else 0
        with LOG.open("ab") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            log.flush()
            code = subprocess.call(
                [str(part) for part in command],
                cwd=str(ROOT),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self.lock,),
            )
        print(f" {time.time() - start:.0f} s", flush=True)
        if code:
            output = LOG.read_bytes()[offset:].decode(errors="replace")
            raise SetupError(f"{explain(output, step)}; all output: {LOG}")

    def pip(self, step, *arguments):
        self.run(step, [PYTHON, "-m", "pip", "install", "--no-input", "--progress-bar=off", *arguments])


# ---------------------------------------------------------------- the steps


def make_venv(steps, outer):
    """Create .venv, on top of the calling Python's packages if `outer`, a Detectron2 of its own, is given."""
    for leftover in VENV.iterdir():  # of a creation that was cut off, or of a Python that is gone
        if leftover.name not in (LOG.name, LOCK.name, SCRATCH.name):
            shutil.rmtree(
                str(leftover)
            ) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    in_venv = sys.prefix != sys.base_prefix
    options = ["--system-site-packages"] if outer and not in_venv else []
    steps.run("creating .venv", [sys.executable, "-m", "venv", *options, VENV])
    if outer and in_venv:
        # --system-site-packages would lead past the active virtual environment to its base Python
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
        (site_packages() / "calling_environment.pth").write_text("".join(lines), encoding="utf-8")


def site_packages():
    return Path(ask(PYTHON, "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"))


def remove_half_installed():
    """Remove the records of packages whose installation was cut off, so that pip installs them again."""
    for record_folder in site_packages().glob("*.dist-info"):
        record = record_folder / "RECORD"
        lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
        paths = [line.rsplit(",", 2)[0].strip('"') for line in lines]
        # .pyc files come and go with the interpreter
        if not lines or not all((record_folder.parent / p).exists() for p in paths if not p.endswith(".pyc")):
            shutil.rmtree(str(record_folder))


def pin(name):
    """The line of constraints.txt for a package that has the same pin on every Python."""
    return re.search(rf"(?m)^{name}==\S+$", CONSTRAINTS.read_text(encoding="utf-8")).group()


def constraint_options():
    """pip's -c options: constraints.txt, or only the host's own builds where its torch is used."""
    visible = distributions(PYTHON, HOST_BUILDS)
    host = {name: version for name, (version, ours) in visible.items() if not ours}
    if "torch" not in host:
        return ["-c", CONSTRAINTS]
    kept = VENV / "host-constraints.txt"
    kept.write_text("".join(f"{name}=={version}\n" for name, version in host.items()), encoding="utf-8")
    return ["-c", kept]


def install_packages(steps):
    """Everything but Detectron2."""
    limits = constraint_options()
    # setuptools first: the few packages that come as source are built with it, not with the newest one.
    # Without -c, under which pip calls an unreachable index a conflict of versions.
    steps.pip("installing setuptools", "--retries=1", "pip>=23.1", pin("setuptools"))
    steps.pip("installing torch, torchvision (minutes)", *limits, "torch", "torchvision")
    package = f"{ROOT}[{EXTRAS}]"
    steps.pip("installing rt_detectron and what it needs", "--no-build-isolation", *limits, "-e", package)


def install_wheel(steps):
    """Detectron2's Python part from the wheel with the known SHA-256, into .venv in one rename."""
    staging = VENV / "detectron2-staging"
    shutil.rmtree(str(staging), ignore_errors=True)
    staging.mkdir()
    requirement = staging / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    target = staging / "target"
    steps.pip("installing Detectron2 (wheel)", *WHEEL_FLAGS, "--target", target, "-r", requirement)
    info = next(target.glob("*.dist-info"))
    record = info / "RECORD"  # without the wheel's top-level `tools`, a name too common for site-packages
    kept = [line for line in record.read_text(encoding="utf-8").splitlines() if not line.startswith("tools/")]
    record.write_text("\n".join(kept) + "\n", encoding="utf-8")
    for folder in (info, target / "detectron2"):  # the package last: importable only when complete
        destination = site_packages() / folder.name
        shutil.rmtree(str(destination), ignore_errors=True)
        os.replace(str(folder), str(destination))
    shutil.rmtree(str(staging))


def source_requirement(source):
    """pip's argument for DETECTRON2_SOURCE: a folder that holds Detectron2's setup.py, or a git URL."""
    named = f"DETECTRON2_SOURCE={source}"
    folder = Path(source).expanduser()
    if folder.exists():
        if not any((folder / name).exists() for name in ("setup.py", "pyproject.toml")):
            raise SetupError(f"{named} holds no setup.py: name the top folder of Detectron2's clone")
        return str(folder.resolve())
    scp_form = re.match(r"(\w+@[\w.-]+):(.+)", source)  # git@host:owner/name.git
    url = "ssh://{}/{}".format(*scp_form.groups()) if scp_form else source
    if "://" not in url:
        raise SetupError(f"{named} is neither a folder nor a git URL")
    if not shutil.which("git"):
        raise SetupError(
            f"{named} is a git URL, but git is not installed: install it, or name a local folder"
        )
    return url if url.startswith("git+") else "git+" + url


def install_source(steps, source):
    """Build Detectron2 against the torch in .venv. Its dependencies are in pyproject.toml already."""
    others = ["detectron2", "sal-detectron2"]
    steps.run("removing any other Detectron2", [PYTHON, "-m", "pip", "uninstall", "-y", *others])
    step = "building Detectron2 from source, which needs a C++ compiler and takes minutes"
    steps.pip(step, "--no-deps", "--no-build-isolation", source_requirement(source))


def install_detectron2(steps, source, built):
    """See to an importable Detectron2; return the source built here, "" if none; `built`: the last one."""
    found = locate_detectron2(PYTHON)
    # the wheel in .venv and an earlier build are ours to replace, any other Detectron2 is the user's
    ours = bool(built) or distributions(PYTHON, ["sal-detectron2"]).get("sal-detectron2", ("", False))[1]
    if found and not (ours and source and source != built):
        ignored = ", DETECTRON2_SOURCE is left aside" if source and not ours else ""
        print(f"  using the Detectron2 at {found}{ignored}")
        return built
    if source:
        install_source(steps, source)
    else:
        install_wheel(steps)
    if not locate_detectron2(PYTHON):
        raise SetupError(f"Detectron2 is installed but does not import: see {PYTHON} -c 'import detectron2'")
    return source


def set_up(minimum_gb, source, lock):
    """Bring .venv from any state to the finished one; False if it was there already."""
    stamp = read_stamp()
    if is_finished(stamp, source):
        return False
    check_venv_modules()
    if source:
        source_requirement(source)
    usable = os.access(str(PYTHON), os.X_OK) and ask(PYTHON, "import json, pip; print(json.dumps(True))")
    outer = None if usable else locate_detectron2(sys.executable)
    has_torch = outer or (usable and distributions(PYTHON, ["torch"]))
    check_disk(minimum_gb if minimum_gb is not None else COMPLETE_GB if has_torch else FRESH_GB)

    packages_hold = usable and stamp.get("fingerprint") == fingerprint() and has_modules(PYTHON)
    print(f"setting up {VENV} (details: {LOG})", flush=True)
    steps = Steps(lock)
    if usable:
        remove_half_installed()
    else:
        make_venv(steps, outer)
        stamp = {}
    write_stamp(**{**stamp, "fingerprint": None})
    if not packages_hold:
        install_packages(steps)
    built = install_detectron2(steps, source, stamp.get("built", ""))
    shutil.rmtree(str(SCRATCH), ignore_errors=True)
    write_stamp(fingerprint=fingerprint(), source=source or stamp.get("source", ""), built=built)
    return True


def locked():
    """File descriptor of a lock on .venv; waits, saying so, while another set-up holds it."""
    import fcntl

    VENV.mkdir(exist_ok=True)
    lock = os.open(str(LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another set-up works on {VENV}: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--min-free-gb", type=float, help="free disk to ask for (fresh: 9, to complete: 1)")
    start = time.time()
    try:
        check_python(sys.version_info, os.name)
        arguments = parser.parse_args()
        if set_up(arguments.min_free_gb, os.environ.get("DETECTRON2_SOURCE", ""), locked()):
            print(f"environment ready in {time.time() - start:.0f} s: {VENV}", flush=True)
            print("use it in this shell: . .venv/bin/activate", flush=True)
    except SetupError as error:
        sys.exit(f"set-up stopped: {error}")
    except OSError as error:
        sys.exit(f"set-up stopped: cannot write the environment ({error}); see docs/install.md")
    except KeyboardInterrupt:
        print("\nset-up interrupted: run it again to complete it", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
