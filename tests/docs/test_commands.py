"""Every command in the documents, checked by what would run it, so that none goes stale.

A tool's line goes through the tool's own parser, and its overrides through the reader of its configuration.
"""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from documents import DOCUMENTS, REPOSITORY, Block, blocks, joined

from rt_detectron.detection import load_detector_config
from rt_detectron.detection.lazy import KEYS as LAZY_KEYS
from rt_detectron.engine.lazy_config import read_lazy_config
from rt_detectron.pretrain.recipe import load_pretrain_config
from rt_detectron.study.load import load_study
from rt_detectron.transfer.recipe import load_transfer_config
from rt_detectron.utils.files import find_config

RUN = (Path("docs/your-data.md"),)  # by tests/docs/test_your_data.py
# Which reader takes a tool's overrides; the others have none.
READERS = {
    "train_net": load_detector_config,
    "evaluate_robustness": load_detector_config,
    "demo": load_detector_config,
    "pretrain": load_pretrain_config,
    "evaluate_classifier": load_pretrain_config,
    "transfer": load_transfer_config,
    "lazyconfig_train_net": lambda path, opts: read_lazy_config(path, opts, LAZY_KEYS, "configs/lazy/"),
}
COMMANDS = runpy.run_path(str(REPOSITORY / "tools" / "rt-detectron"), run_name="listed")["COMMANDS"]
NOT_INSTALLED = ("onnxruntime",)  # by make setup; tests/test_builders_in_detectors.py runs what needs it
# Variables that a document leaves to its reader.
VALUES = {"RANK": "0", "HOST": "localhost", "SLURM_NODEID": "0", "lr": "0.01", "eps": "0.5"}
# Programs of others, in lines that call nothing of ours.
SHELL = ("unzip", "test", "for", "done", "export", "cd", "git", "mv", "ray", "rm", "source", ".")
# What a fence may say. Without a word it holds commands, or config keys and their values.
LANGUAGES = ("", "bash", "python", "yaml", "text")


def blocks_in(*languages: str) -> list[Block]:
    return [block for path in DOCUMENTS for block in blocks(path) if block.language in languages]


def parameters(*languages: str) -> list:
    """The text of each block in one of the languages."""
    return [pytest.param(block.text, id=f"{block.path}:{block.line}") for block in blocks_in(*languages)]


def commands() -> Iterator:
    """(line, variables) of each command, continued lines joined. Variables hold until the document ends."""
    document, variables = None, {}
    for block in blocks_in("", "bash"):
        if block.path in RUN:
            continue
        if block.path != document:
            document, variables = block.path, dict(VALUES)
        for number, line in joined(block):
            if match := re.fullmatch(r'(?s)(\w+)="(.*)"', line):
                variables[match[1]] = match[2]
            elif line and not line.startswith("#"):
                yield pytest.param(line, dict(variables), id=f"{document}:{number} {line[:40]}")


class _Parsed(BaseException):
    """A tool has got as far as its arguments."""


@pytest.fixture
def parsed(monkeypatch):
    """``parsed(script, arguments)``: what the script's own parser makes of them."""

    def parse(script: Path, arguments: list[str]) -> argparse.Namespace:
        original, found = argparse.ArgumentParser.parse_args, []

        def stop(self, *args, **kwargs):
            found.append(original(self, *args, **kwargs))
            raise _Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(script.parent)  # as Python does for a script
        with pytest.raises(_Parsed):
            runpy.run_path(str(script), run_name="__main__")
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", original)
        return found[0]

    return parse


@pytest.mark.parametrize(("line", "variables"), list(commands()))
def test_a_command_is_one_that_its_program_takes(line, variables, parsed, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    for name, value in variables.items():
        line = re.sub(rf"\\?\$\{{?{name}\b\}}?", value, line)
    words = shlex.split(line, comments=True)
    while words and re.match(r"\w+=", words[0]):  # environment variables in front of a command
        words = words[1:]
    if words[:1] == ["do"]:
        words = words[1:]
    if words[:1] == ["srun"]:
        words = shlex.split(words[words.index("-c") + 1])
        while words[0] == "exec" or re.match(r"\w+=", words[0]):
            words = words[1:]
    if words[:1] == ["torchrun"]:
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    if words[:1] == ["python"] and words[1:2] != ["-c"]:
        words = words[1:]
    if not words or words[0] in SHELL or re.match(r"\w+=\$\(", line):
        return
    if words[:2] == ["python", "-c"]:
        check_imports(words[2])
        return
    if re.match(r"[A-Z]+\.[A-Z]", line):
        load_detector_config("configs/Base-RCNN-FPN.yaml", words)
        return
    if words[0] == "make":
        targets = re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text())
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "pip":
        assert words[1] in ("install", "wheel", "cache", "show", "download")
        extras = re.findall(r"(?m)^(\w+) = \[", (REPOSITORY / "pyproject.toml").read_text())
        asked = [extra for word in words for extra in re.findall(r"\[(.*)\]$", word)]
        assert {part for extra in asked for part in extra.split(",")} <= set(extras)
        assert not any(word.startswith("rt_detectron[") for word in words), "no index has it"
    else:
        args = check_script(words, parsed)
        if getattr(args, "study", None) not in (None, "STUDY"):
            check_study(find_config(args.study), tmp_path, monkeypatch)


def check_script(words: list[str], parsed) -> argparse.Namespace | None:
    """What the script's parser makes of the command, None for those that need none."""
    script, arguments = words[0], [word for word in words[1:] if word != "..."]
    if script == "rt-detectron":
        if arguments[:1] in ([], ["--help"]):
            return None
        script, arguments = f"tools/{COMMANDS[arguments[0]][0]}.py", arguments[1:]
    path = REPOSITORY / script
    assert script.split("/")[0] in ("tools", "benchmarks", "datasets"), (
        f"tests/docs/test_commands.py does not know how to check {script}"
    )
    assert path.is_file(), f"there is no {script}"
    if path.stem == "setup_environment":
        return None
    args = parsed(path, arguments)
    configs = getattr(args, "config_file", None)
    for config in [configs] if isinstance(configs, str) else configs or []:
        if config.startswith("output/") or not config:  # a file that a training leaves
            continue
        opts = list(getattr(args, "opts", []))
        if path.stem in READERS:
            READERS[path.stem](config, opts)
        else:
            assert Path(find_config(config)).is_file(), config
    return args


def check_imports(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name not in NOT_INSTALLED:
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


def check_study(file: str | Path, folder: Path, monkeypatch) -> None:
    """The study can be loaded once its arms' weights are there, as what trains them leaves them."""
    monkeypatch.chdir(folder)
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    for arm in yaml.safe_load(Path(file).read_text(encoding="utf-8"))["arms"].values():
        if "://" not in arm["weights"]:
            path = folder / arm["weights"].replace("{seed}", "1")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    load_study(file)


@pytest.mark.parametrize("text", parameters("python"))
def test_python_imports_what_is_there(text):
    check_imports(text)


@pytest.mark.parametrize("text", parameters("yaml"))
def test_yaml_is_a_study(text, tmp_path, monkeypatch):
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    check_study(tmp_path / "study.yaml", tmp_path, monkeypatch)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_block_is_of_a_kind_that_is_checked(document):
    unknown = [block for block in blocks(document) if block.language not in LANGUAGES]
    assert not unknown, f"{document}:{unknown[0].line}: not one of {LANGUAGES}"
