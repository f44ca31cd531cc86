"""An evaluation as JSON, as Markdown and as a picture."""

import json
import os

from rt_detectron.utils.files import replaced_atomically
from rt_detectron.visualization.plots import accuracy_plot


def write_report(results: dict, folder: str) -> list[str]:
    """Write ``evaluation.json``, ``evaluation.md`` and ``eps_curve.png`` to ``folder``; gives their paths.

    Args:
        results: of :meth:`RobustnessEvaluator.evaluate`, with "classifier" (what was evaluated, a line),
            "threat_model" ({"norm", "eps"}), "classes" ({class: name}) and "versions".
    """
    contents = {"evaluation.json": json.dumps(results, indent=1).encode()}
    if "curve" in results:
        norm, eps = results["threat_model"]["norm"], results["threat_model"]["eps"]
        curve = results["curve"]
        label = f"{norm} eps" + (" (1/255)" if norm == "linf" else "")
        contents["eps_curve.png"] = accuracy_plot(curve["eps"], curve["value"], eps, label)
    contents["evaluation.md"] = markdown(results).encode()
    paths = []
    for name, content in contents.items():
        paths.append(os.path.join(folder, name))
        with replaced_atomically(paths[-1]) as temporary, open(temporary, "wb") as file:
            file.write(content)
    return paths


def markdown(results: dict) -> str:
    """The same, to be read."""
    accuracy, threat_model = results["accuracy"], results["threat_model"]
    unit = "/255" if threat_model["norm"] == "linf" else ""
    lines = [
        f"# {results['classifier']}",
        "",
        f"Under {threat_model['norm']} eps {threat_model['eps']:g}{unit}.",
        "",
        "| attack | accuracy % | 95 % interval | images |",
        "|---|---:|---:|---:|",
    ]
    for name, row in accuracy.items():
        lines.append(
            f"| {name} | {row['value']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['images']} |"
        )
    lines += ["", "## Can the numbers be trusted?", ""]
    if results["findings"]:
        lines += ["Gradients may be masked, and the numbers too good:", ""]
        lines += [f"- {finding}" for finding in results["findings"]]
    elif "curve" in results:
        attack, last, eps = (results["curve"][key] for key in ("attack", "value", "eps"))
        lines.append(
            f"No sign of masked gradients: accuracy under {attack} falls to {last[-1]:.1f} % at eps "
            f"{eps[-1]:.4g}, within which every image can be turned grey, and never rises on the way"
            + (", and AutoAttack finds little that PGD does not." if "autoattack" in accuracy else ".")
        )
    else:
        lines.append("Not looked into: there is no curve over eps.")
    if "curve" in results:
        curve = results["curve"]
        lines += ["", "![accuracy over eps](eps_curve.png)", "", "| eps | accuracy % |", "|---:|---:|"]
        lines += [
            f"| {eps:.4g} | {value:.2f} |" for eps, value in zip(curve["eps"], curve["value"], strict=True)
        ]
    lines += ["", "## Classes", "", f"| class | images | {' | '.join(accuracy)} |"]
    lines.append(f"|---|---:|{'---:|' * len(accuracy)}")
    for label, row in results["per_class"].items():
        values = " | ".join(f"{row[name]:.1f}" for name in accuracy)
        lines.append(f"| {results['classes'].get(label, label)} | {row['images']} | {values} |")
    lines += ["", "| package | version |", "|---|---|"]
    lines += [f"| {name} | {version} |" for name, version in results["versions"].items()]
    return "\n".join(lines) + "\n"
