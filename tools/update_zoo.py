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
from rt_detectron.utils.files import file_sha256, write_text

ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".tar")
DOCUMENT = Path(__file__).parents[1] / "docs" / "MODEL_ZOO.md"
INTRODUCTION = """\
# Model zoo

<!-- Written by tools/update_zoo.py from rt_detectron/checkpoint/zoo.json: change that, not this. -->

The ImageNet classifiers published with
[Do Adversarially Robust ImageNet Models Transfer Better?](https://arxiv.org/abs/2007.08489)
(Salman et al. 2020), {count} files, by name, as Detectron2 backbones. [Newer networks](#newer-networks)
follow below.

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
    print(entry.name, entry.eps, entry.top1)  # clean accuracy; .robust is that under AutoAttack, if published
for entry in rt_detectron.zoo.list(source="robustbench"):
    print(entry.name, entry.arch, entry.robust, entry.url)
path = rt_detectron.zoo.backbone("resnet50_linf_eps4.0")  # of the converted .pkl
path = rt_detectron.zoo.checkpoint("resnet50_linf_eps4.0")  # of the published classifier's own file
```

Top-1 is the accuracy on clean ImageNet, in percent, as published. The last column says whether the file's
SHA-256 is recorded.
"""


OTHERS = """\

## Newer networks

{count} networks of {sources} other sources, by name as those above: `robust://NAME.pkl`. They need
`pip install "timm>=1.0.31"` unless they are ResNets.

- **The file**: where the last column says "Hub", it is downloaded from there, and checked against the
  SHA-256 that the Hub announces. All others you bring: `robust://NAME.pkl` looks for the file that the
  column names in the folder `RT_DETECTRON_ZOO`. RobustBench's are also found in `imagenet/Linf` below it,
  and where RobustBench's `load_model` puts them: in `models/imagenet/Linf` of the current folder, or in
  torch's hub cache.
- **Hashes**: nobody has published hashes of most of these files. Without a recorded SHA-256 a file that you
  bring is used as it is, and the log says so. It must be that network, and it must not contradict the
  input below. It is read without running any code in it. Where no licence is named below, none is known.
- **input**: "wrap": ImageNet's mean and std belong in front of the network. "raw": it takes images in [0, 1]
  as they are: `MODEL.PIXEL_MEAN [0, 0, 0] MODEL.PIXEL_STD [255, 255, 255]`. "clip": CLIP's mean and std:
  `MODEL.PIXEL_MEAN [122.7709, 116.746, 104.0937] MODEL.PIXEL_STD [68.5005, 66.6322, 70.3232]`.
- **Accuracies** are in percent, clean and under AutoAttack for Linf of that eps, as each source gives them:
  compare them within a source only.
- **Transformers without stages** (ViT, DeiT, XCiT, CLIP) need ViTDet's pyramid,
  `build_robust_timm_sfp_backbone`; all others take an FPN: `build_robust_timm_fpn_backbone`, for the
  ResNets `build_robust_resnet_fpn_backbone`, for the RaResNets `build_robust_torchvision_fpn_backbone`.
"""

HEAD = """\
| name | network | input | eps | clean | AutoAttack | SHA-256 | file |
|---|---|---|--:|--:|--:|---|---|
"""


def document(table: dict) -> str:
    """The text of docs/MODEL_ZOO.md for the content of zoo.json."""
    first, *others = table["sources"]
    hub, revision, entries = first["hub"], first["revision"], first["checkpoints"]
    recorded = sum(entry["sha256"] is not None for entry in entries)
    parts = [INTRODUCTION.format(hub=hub, short=revision[:7], count=len(entries), recorded=recorded)]
    for family, members in itertools.groupby(entries, lambda entry: re.split("[^a-z_]", entry["arch"])[0]):
        parts += [f"\n## {family}\n\n| name | eps | top-1 | file | SHA-256 |\n|---|--:|--:|---|---|\n"]
        for entry in members:
            eps = f"{entry['eps']:g}" + ("/255" if entry["norm"] == "linf" else "")
            link = f"[{entry['file']}](https://huggingface.co/{hub}/blob/{revision}/{entry['file']})"
            parts.append(
                f"| `{entry['name']}` | {eps} | {_percent(entry['top1'])} | {link} | {_hash_state(entry)} |\n"
            )
    count = sum(len(source["checkpoints"]) for source in others)
    parts.append(OTHERS.format(count=count, sources=len(others)))
    for source in others:
        licence = f" Licence: {source['licence']}." if source["licence"] else ""
        page = f"[{source['page'].removeprefix('https://')}]({source['page']})"
        parts += [f"\n### {source['title']}\n\n{page}. {source['about']}{licence}\n\n", HEAD]
        parts += map(_row, source["checkpoints"])
    return "".join(parts)


def _row(entry: dict) -> str:
    """A newer network's row: what it is, how good, and where its file comes from."""
    where = "Hub" if entry.get("hub") and entry.get("revision") else f"`{entry['file']}`"
    cells = (
        f"`{entry['name']}`",
        f"`{entry['arch']}`",
        entry["pixels"],
        f"{entry['eps']:g}/255",
        _percent(entry["top1"]),
        _percent(entry["robust"]),
        _hash_state(entry),
        f"[{where}]({entry['link']})" if entry["link"] else where,
    )
    return f"| {' | '.join(cells)} |\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _hash_state(entry: dict) -> str:
    return "recorded" if entry["sha256"] else ""


def dumped(table: dict) -> str:
    """The text of zoo.json: a checkpoint a line, so that changes can be read."""
    sources = []
    for source in table["sources"]:
        fields = [
            f'"checkpoints": [\n{_lines(value)}\n      ]' if key == "checkpoints" else _field(key, value)
            for key, value in source.items()
        ]
        sources.append("    {\n      " + ",\n      ".join(fields) + "\n    }")
    return '{\n  "sources": [\n' + ",\n".join(sources) + "\n  ]\n}\n"


def _lines(entries: list[dict]) -> str:
    return ",\n".join(f"        {json.dumps(entry)}" for entry in entries)


def _field(key: str, value: object) -> str:
    return f"{json.dumps(key)}: {json.dumps(value)}"


def record(table: dict, mirror: str, overwrite: bool) -> None:
    """Put size and SHA-256 of the checkpoints in the folder ``mirror`` into ``table``."""
    if not os.path.isdir(mirror):
        raise InputError(f"{mirror} is no folder: give one with the published files in it")
    entries = [entry for source in table["sources"] for entry in source["checkpoints"]]
    for path in sorted(path for path in Path(mirror).rglob("*") if path.suffix in ENDINGS):
        # A file's name alone says which it is, unless the table wants it in a folder of its own.
        entry = next((entry for entry in entries if path.match(entry["file"])), None)
        if entry is None:
            print(f"unknown   {path}")
            continue
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
    parser.add_argument("--mirror", metavar="FOLDER", help="where published files lie, at any depth")
    parser.add_argument("--overwrite", action="store_true", help="change hashes that are already recorded")
    args = parser.parse_args(argv)
    with one_line_errors():
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        if args.mirror is not None:
            record(table, args.mirror, args.overwrite)
        for path, text in ((TABLE, dumped(table)), (DOCUMENT, document(table))):
            write_text(path, text)


if __name__ == "__main__":
    main()
