"""The report on an evaluated classifier, and signs of gradient masking in its numbers."""

import json
import os
from collections.abc import Sequence

from rt_detectron.utils.files import replaced_atomically
from rt_detectron.visualization.plots import accuracy_plot

WORST_CASE = "worst case"  # an image counts as correct if it is under all attacks
# Beyond these, gradients may be masked:
MAX_LEFT = 1.0  # percent that are correct when every image can be turned grey
MAX_RISE = 2.0  # percentage points that accuracy may rise with eps
MAX_MISSED = 5.0  # percentage points by which other attacks may beat those by gradient


def findings(accuracy: dict, gradient_based: Sequence[str], curve: dict | None) -> list[str]:
    """Signs of gradient masking, which makes accuracies too high (Athalye et al. 2018, section 3.1).

    Args:
        accuracy, gradient_based, curve: as :meth:`~.evaluation.RobustnessEvaluator.evaluate` gives them.
    """
    found = []
    if curve:
        last, eps = curve["value"][-1], curve["eps"][-1]
        if last > MAX_LEFT:
            found.append(
                f"accuracy under {curve['attack']} is {last:.1f} % at eps {eps:.4g}, which can turn every "
                "image grey: the attack is misled"
            )
        for i in range(1, len(curve["eps"])):
            if curve["value"][i] > min(curve["value"][:i]) + MAX_RISE:
                found.append(
                    f"accuracy under {curve['attack']} is higher at eps {curve['eps'][i]:.4g} than at a "
                    "smaller one"
                )
                break
    for name in _others(accuracy, gradient_based):
        missed = min(accuracy[other]["value"] for other in gradient_based) - accuracy[name]["value"]
        if missed > MAX_MISSED:
            found.append(
                f"accuracy under {name} is {missed:.1f} points lower than under the attacks by gradient"
            )
    return found


def _others(accuracy: dict, gradient_based: Sequence[str]) -> list[str]:
    """The attacks that those by gradient can be compared with."""
    if not gradient_based:
        return []
    return [name for name in accuracy if name not in ("clean", WORST_CASE, *gradient_based)]


def write_report(results: dict, folder: str) -> list[str]:
    """Write ``evaluation.json``, ``evaluation.md`` and ``eps_curve.png`` to ``folder``; gives their paths.

    Args:
        results: of :meth:`~.evaluation.RobustnessEvaluator.evaluate`, plus "classifier" (one line),
            "threat_model" ({"norm", "eps"}), "classes" ({class: name}), "caveats" (a sentence each) and
            "versions".
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
    """The report in Markdown."""
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
    lines += [line for caveat in results.get("caveats", ()) for line in ("", f"{caveat}.")]
    lines += ["", "## Gradient masking", ""]
    if results["findings"]:
        lines += ["Gradients may be masked, and the accuracies too high:", ""]
        lines += [f"- {finding}" for finding in results["findings"]]
    elif "curve" in results:
        attack, last, eps = (results["curve"][key] for key in ("attack", "value", "eps"))
        lines.append(
            f"No sign of it: accuracy under {attack} falls to {last[-1]:.1f} % at eps {eps[-1]:.4g}, which "
            "can turn every image grey, and never rises with eps."
        )
        if others := _others(accuracy, results["gradient_based"]):
            names = ", ".join(others)
            lines.append(f"It is hardly lower under {names} than under the attacks by gradient.")
    else:
        lines.append("Not checked: there is no curve over eps.")
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
