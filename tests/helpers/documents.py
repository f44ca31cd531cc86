"""The documents, their fenced blocks, and the commands in these."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(REPOSITORY)
    for path in [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/**/*.md"),
        REPOSITORY / "datasets/README.md",
    ]
)


class Block(NamedTuple):
    """A fenced block of a document."""

    path: Path
    line: int
    language: str
    text: str


def blocks(path: Path) -> Iterator[Block]:
    lines = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()
    start = language = None
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"\s*```(.*)$", line)
        if fence and start is None:
            start, language = number, fence[1].strip()
        elif fence:
            yield Block(path, start, language, "\n".join(lines[start : number - 1]))
            start = None
    assert start is None, f"{path}:{start}: the block has no end"


def joined(block: Block) -> Iterator[tuple[int, str]]:
    """Each command and the number of its first line; a backslash or an open quote continues it."""
    command, start = "", 0
    for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
        start = start if command else number
        command += line.strip() if not command or command.count('"') % 2 == 0 else line
        if command.endswith("\\"):
            command = command.removesuffix("\\").rstrip() + " "
        elif command.count('"') % 2:
            command += "\n"
        else:
            yield start, command
            command = ""
