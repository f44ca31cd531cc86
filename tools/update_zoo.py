#!/usr/bin/env python
"""For maintainers: record the published checkpoints' sizes and hashes, and rewrite docs/MODEL_ZOO.md.

python tools/update_zoo.py --mirror FOLDER
"""

import argparse
import itertools
import json
import os
import re
from pathlib import Path

import _environment  # noqa: F401  (first, since it checks this Python)

from rt_detectron.checkpoint.convert import read_network
from rt_detectron.checkpoint.zoo import TABLE
from rt_detectron.utils.errors import InputError, one_line_errors
from rt_detectron.utils.files import file_sha256, replaced_atomically

DOCUMENT = Path(__file__).parents[1] / "docs" / "MODEL_ZOO.md"
INTRODUCTION = """\
# Model zoo

<!-- Written by tools/update_zoo.py from rt_detectron/checkpoint/zoo.json: change that, not this. -->

The ImageNet classifiers published with
[Do Adversarially Robust ImageNet Models Transfer Better?](https://arxiv.org/abs/2007.08489)
(Salman et al. 2020), {count} files, by name, as Detectron2 backbones:

```
MODEL.WEIGHTS "robust://resnet50_l2_eps3.pkl"
```

After `import rt_detectron` this works wherever Detectron2 takes a path. The first use downloads the
checkpoint from [{hub}](https://huggingface.co/{hub}) at revision `{short}`, verifies it, reads it without
running any code in it, and converts it into the cache folder. Later uses take it from there, offline too.

- **eps** is the size of the attacks in training: for L2 of images in [0, 1], for Linf in 1/255. eps 0 is
  standard training by the same recipe: the fair baseline.
- **`robust://NAME-bgr.pkl`** has Detectron2's default preprocessing (BGR, std 1) built into its first
  convolution, for configs that keep it. The others want RGB and the lines that
  `tools/convert_checkpoint.py` prints.
- **A mirror**: files in the folder that `RT_DETECTRON_ZOO` names come first. `NAME.ckpt`, as published,
  is converted into the cache; `NAME.pkl`, which may be a backbone of your own under any name, is taken
  as it is, if our reader finds nothing but arrays in it and its metadata agrees with the name. Nothing
  is written to the folder. Without network access, put downloaded files there.
- **What is verified**: the SHA-256 of the {recorded} of {count} checkpoints that have it recorded,
  wherever they come from. Any other download is checked against the SHA-256 that the Hub announces. For
  any other file of a mirror, only damage that breaks reading is noticed; files of torch before 1.6 have
  no checksums, so that is little.
- **The cache** is the folder `zoo` in `RT_DETECTRON_CACHE`, else in `~/.cache/rt_detectron`. It is its
  owner's alone: a folder that others own or may write to is refused, and there is no fallback. It may be
  deleted at any time. Downloads are kept by huggingface_hub, in `HF_HOME`.
  `PathManager.get_local_path("robust://NAME.pkl", force=True)` downloads and converts anew.

From Python:

```python
import rt_detectron

for entry in rt_detectron.zoo.list(norm="linf", arch="resnet50"):
    print(entry.name, entry.eps, entry.top1)
path = rt_detectron.zoo.backbone("resnet50_linf_eps4.0")  # of the converted .pkl
path = rt_detectron.zoo.checkpoint("resnet50_linf_eps4.0")  # of the published classifier's own file
```

Top-1 is the accuracy on clean ImageNet, in percent, as published. The last column says whether the file's
SHA-256 is recorded.
"""


ROBUSTBENCH = """\

## RobustBench

{count} networks of the ImageNet leaderboard of [RobustBench](https://github.com/RobustBench/robustbench),
trained for Linf 4/255, whose files you bring: `robust://NAME.pkl` looks for `NAME.pt` in the folder
`RT_DETECTRON_ZOO`, in `imagenet/Linf` below it, and in `models/imagenet/Linf` of the current folder, where
RobustBench's `load_model` puts it. Nobody has published hashes of these files, so they are used as they
are, and the log says so. They are read without running any code in them. Each has a licence of its own.

"wrap": ImageNet's mean and std belong in front of the network. "raw": it takes images in [0, 1] as they
are, so set `MODEL.PIXEL_MEAN [0, 0, 0] MODEL.PIXEL_STD [255, 255, 255]`. The two accuracies are
RobustBench's, in percent.

| name | network | input | clean | AutoAttack | Google Drive |
|---|---|---|--:|--:|---|
"""


def document(table: dict) -> str:
    """The text of docs/MODEL_ZOO.md for the content of zoo.json."""
    hub, revision, entries = table["hub"], table["revision"], table["checkpoints"]
    recorded = sum(entry["sha256"] is not None for entry in entries)
    parts = [INTRODUCTION.format(hub=hub, short=revision[:7], count=len(entries), recorded=recorded)]
    for family, members in itertools.groupby(entries, lambda entry: re.split("[^a-z_]", entry["arch"])[0]):
        parts += [f"\n## {family}\n\n| name | eps | top-1 | file | SHA-256 |\n|---|--:|--:|---|---|\n"]
        for entry in members:
            eps = f"{entry['eps']:g}" + ("/255" if entry["norm"] == "linf" else "")
            top1 = "" if entry["top1"] is None else f"{entry['top1']:.2f}"
            link = f"[{entry['file']}](https://huggingface.co/{hub}/blob/{revision}/{entry['file']})"
            is_recorded = "recorded" if entry["sha256"] else ""
            parts.append(f"| `{entry['name']}` | {eps} | {top1} | {link} | {is_recorded} |\n")
    parts.append(ROBUSTBENCH.format(count=len(table["robustbench"])))
    for entry in table["robustbench"]:
        drive = f"[link](https://drive.google.com/uc?id={entry['drive']})" if entry["drive"] else ""
        parts.append(
            f"| `{entry['name']}` | `{entry['arch']}` | {entry['pixels']} | {entry['top1']:.2f} | "
            f"{entry['robust']:.2f} | {drive} |\n"
        )
    return "".join(parts)


def dumped(table: dict) -> str:
    """The text of zoo.json: a checkpoint a line, so that changes can be read."""
    parts = []
    for key, value in table.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in value) + "\n  ]"
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def record(table: dict, mirror: str, overwrite: bool) -> None:
    """Put size and SHA-256 of the checkpoints in the folder ``mirror`` into ``table``."""
    if not os.path.isdir(mirror):
        raise InputError(f"{mirror} is no folder: give one with the published files in it")
    entries = {entry["file"]: entry for key in ("checkpoints", "robustbench") for entry in table[key]}
    for path in sorted(path for path in Path(mirror).rglob("*") if path.suffix in (".ckpt", ".pt")):
        if path.name not in entries:
            print(f"unknown   {path}")
            continue
        entry = entries[path.name]
        read_network(path, entry["arch"])  # it is whole
        sha256 = file_sha256(path)
        if entry["sha256"] not in (None, sha256) and not overwrite:
            raise InputError(
                f"{path} has SHA-256 {sha256}, but {entry['sha256']} is recorded: if it was published anew, "
                "give --overwrite"
            )
        entry.update(size=path.stat().st_size, sha256=sha256)
        print(f"recorded  {path}: {entry['size']} bytes, SHA-256 {sha256}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mirror", metavar="FOLDER", help="where published files (.ckpt, .pt) lie, at any depth"
    )
    parser.add_argument("--overwrite", action="store_true", help="change hashes that are already recorded")
    args = parser.parse_args(argv)
    with one_line_errors():
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        if args.mirror is not None:
            record(table, args.mirror, args.overwrite)
        for path, text in ((TABLE, dumped(table)), (DOCUMENT, document(table))):
            with replaced_atomically(path) as temporary:
                Path(temporary).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
