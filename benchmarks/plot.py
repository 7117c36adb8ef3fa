"""Draws the pictures of benchmarks/README.md from the results that are kept.

It also prints the table of the devices that programs were compiled for.

    python benchmarks/plot.py                   # from and to benchmarks/results
    python benchmarks/plot.py --results FOLDER

Of each benchmark, the newest complete file is drawn. Needs matplotlib.
"""

import argparse
import json
import pathlib
from collections import Counter
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

HERE = pathlib.Path(__file__).parent
GOOD, WORSE, ERROR = "#0072B2", "#D55E00", "#BBBBBB"  # told apart by colour-blind eyes
INK = "#333333"
EXAMPLE = ("conv + attention", "bfloat16")


def load(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
    """Returns the whole results of a benchmark that are kept, by file name."""
    found = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{name}-*.json"))]
    return [d for d in found if d["complete"] and "--quick" not in d["command"]]


def newest(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
    """Returns the newest whole results of a benchmark on the CPU, if there are."""
    found = [d for d in load(folder, name) if d["machine"]["device"] == "cpu"]
    return max(found, key=lambda d: d["date"], default=None)


def machine_line(data: dict[str, Any]) -> str:
    """Returns where and when the numbers of a picture were measured."""
    machine, versions = data["machine"], data["versions"]
    line = (
        f"{data['command']} · {machine['processor']}, {machine['cores']} cores · "
        f"Python {versions['python']}, jax {versions['jax']} · {data['date'][:10]}"
    )
    return f"{line}\n{machine_line(data['with'])}" if "with" in data else line


def save(figure: Figure, data: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a picture, on white, so that it is legible on any background."""
    figure.supxlabel(machine_line(data), fontsize=7, color=INK)
    figure.savefig(path, dpi=150, facecolor="white")
    print(path)


def print_overheads(folder: pathlib.Path) -> None:
    """Prints a row for each device that programs were compiled for, as Markdown.

    The counts are of one program, jaxgrl / by hand.
    """
    columns = ("ops", "fusions", "flops", "bytes", "temp bytes")
    header = ("device", "jax", "programs", "forward", "gradient", "collectives")
    print(f"\n| {' | '.join([*header, *columns])} |")
    print("| --- " * (len(header) + len(columns)) + "|")
    for data in load(folder, "overhead"):
        gradients = [row["counts"]["gradient"] for row in data["rows"]]
        forwards = [row["counts"]["forward"] for row in data["rows"]]
        differ = sum(f["jaxgrl"][c] != f["none"][c] for f in forwards for c in columns)
        moved = sum(
            g["jaxgrl"]["collectives"] != g["by hand"]["collectives"] for g in gradients
        )
        cells = [data["machine"]["device"], data["versions"]["jax"], len(gradients)]
        cells += ["equal" if not differ else f"{differ} counts differ"]
        cells += ["no worse" if data["holds"] else f"{len(data['failures'])} worse"]
        cells += ["the same" if not moved else f"{moved} differ"]
        example = next(
            gradient
            for row, gradient in zip(data["rows"], gradients, strict=True)
            if (row["case"]["program"], row["case"]["dtype"]) == EXAMPLE
            and row["case"]["scale"] == "per example"
        )
        for column in columns:
            pair = [example[layer][column] for layer in ("jaxgrl", "by hand")]
            cells.append("not given" if None in pair else " / ".join(map(str, pair)))
        print(f"| {' | '.join(map(str, cells))} |")


def draw_overhead(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws how many programs are equal to by hand, and the bytes of the others."""
    layers = ("jaxgrl", "five lines", "stop_gradient trick", "optax.scale_gradient")
    columns = ("ops", "fusions", "flops", "bytes", "copies", "temp bytes")
    counts = {layer: Counter() for layer in layers}
    extra: dict[str, list[float]] = {layer: [] for layer in layers}
    for row in data["rows"]:
        gradient = row["counts"]["gradient"]
        limit = gradient["by hand"]
        for layer in layers:
            ours = gradient[layer]
            if "error" in ours:
                counts[layer]["does not run"] += 1
                continue
            more = any(ours[c] > limit[c] for c in columns)
            equal = not more and ours.get("same bits", True)
            counts[layer]["equal or less" if equal else "more, or other bits"] += 1
            extra[layer].append(100 * (ours["bytes"] / limit["bytes"] - 1))
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    start = np.zeros(len(layers))
    colors = {
        "equal or less": GOOD,
        "more, or other bits": WORSE,
        "does not run": ERROR,
    }
    for kind, color in colors.items():
        width = np.array([counts[layer][kind] for layer in layers])
        bars = left.barh(layers, width, left=start, color=color, label=kind)
        left.bar_label(
            bars,
            [str(w) if w else "" for w in width],
            label_type="center",
            color="black" if color == ERROR else "white",
        )
        start = start + width
    left.invert_yaxis()
    left.set(title="Gradient programs, beside the reversal by hand", xlabel="programs")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)
    rng = np.random.default_rng(0)
    for y, layer in enumerate(layers):
        jitter = y + rng.uniform(-0.25, 0.25, len(extra[layer]))
        color = GOOD if layer == "jaxgrl" else WORSE
        right.plot(extra[layer], jitter, "o", ms=4, alpha=0.6, color=color, mew=0)
    right.axvline(0, color=INK, lw=0.8)
    right.set(
        title="Memory traffic of those that run", xlabel="bytes more than by hand [%]"
    )
    right.grid(axis="x", alpha=0.3)
    save(figure, data, path)


def draw_timing(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the ratios of step times with their intervals."""
    rows = [r for r in data["rows"] if r["section"] in ("steps", "devices")]
    figure = Figure(figsize=(9, 0.34 * len(rows) + 1.4), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(rows):
        own = "jaxgrl" in row["what"]
        axis.plot([row["low"], row["high"]], [y, y], color=GOOD if own else "0.6", lw=4)
        axis.plot(row["ratio"], y, "o", color="white", mec=INK, ms=6)
    axis.axvline(1, color=INK, lw=0.8)
    labels = [f"{r['what']}   ({r['milliseconds']:.3g} ms)" for r in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.set(
        title="Step time: median ratio and its joint 95 % interval", xlabel="ratio"
    )
    axis.set_xlim(0.97, 1.06)
    axis.grid(axis="x", alpha=0.3)
    save(figure, data, path)


def draw_correctness(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the matrix of situations and implementations, a half cell per JAX."""
    rows = data["rows"]
    situations = list(dict.fromkeys(row["situation"] for row in rows))
    layers = list(dict.fromkeys(row["implementation"] for row in rows))
    versions = [key for key in rows[0] if key.startswith("jax ")]
    code = {"right": 0, "wrong": 1, "error": 2}
    image = np.zeros((len(situations), len(layers) * len(versions)))
    for row in rows:
        y, x = situations.index(row["situation"]), layers.index(row["implementation"])
        for i, version in enumerate(versions):
            image[y, x * len(versions) + i] = code[row[version]["verdict"]]
    figure = Figure(figsize=(9, 0.2 * len(situations) + 2.2), layout="constrained")
    axis = figure.subplots()
    colors = ListedColormap([GOOD, WORSE, ERROR])
    axis.imshow(image, cmap=colors, aspect="auto", vmin=0, vmax=2, interpolation="none")
    limits = {r["situation"] for r in rows if r["group"] == "known limits"}
    labels = [f"known limit: {s}" if s in limits else s for s in situations]
    axis.set_yticks(range(len(situations)), labels, fontsize=8)
    middle = len(versions) * (np.arange(len(layers)) + 0.5) - 0.5
    axis.set_xticks(middle, layers, rotation=30, ha="left")
    axis.xaxis.tick_top()
    axis.hlines(np.arange(1, len(situations)) - 0.5, *axis.get_xlim(), "white", lw=0.5)
    edges = len(versions) * np.arange(1, len(layers)) - 0.5
    axis.vlines(edges, *axis.get_ylim(), "white", lw=4)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    names = ("right", "silently wrong", "error")
    handles = [
        Patch(color=c, label=n)
        for c, n in zip((GOOD, WORSE, ERROR), names, strict=True)
    ]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "frameon": False}
    title = (
        f"within a cell: {', '.join(versions)}" if len(versions) > 1 else versions[0]
    )
    axis.legend(handles=handles, ncols=3, title=title, **place)
    save(figure, data, path)


def draw_training(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the steps per second of every trainer, and the seconds of the sweep."""
    rows = [row for row in data["rows"] if "seconds" in row]
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind = "steps a second" if row["what"] == "training" else "sweep, seconds"
        panels.setdefault(f"{row['size']} network: {kind}", []).append(row)
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axis, (title, own) in zip(
        figure.subplots(2, 2).flat, panels.items(), strict=False
    ):
        key = "sweep s" if "sweep" in title else "steps/s"
        names = [row["trainer"] for row in own]
        values = [row[key] for row in own]
        ours = [name.startswith(("jaxgrl", "one program")) for name in names]
        bars = axis.barh(names, values, color=[GOOD if o else "0.6" for o in ours])
        axis.bar_label(
            bars, [f"{value:.4g}" for value in values], padding=3, fontsize=8
        )
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
    save(figure, data, path)


def draw_adaptation(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws target accuracy of every method with SGD, and what each rule loses."""
    looks = {
        "source only": ("0.5", "o"),
        "DANN": (GOOD, "s"),
        "DANN, chosen": (GOOD, "*"),
        "CDAN": (WORSE, "^"),
        "CDAN+E": (WORSE, "v"),
        "trained on target": (INK, "D"),
    }
    summary = [row for row in data["summary"] if "AdamW" not in row["task"]]
    tasks = list(dict.fromkeys(row["task"] for row in summary))
    figure = Figure(figsize=(13, 8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, (method, (color, marker)) in enumerate(looks.items()):
        own = [r for r in summary if r["method"].partition(" (")[0] == method]
        y = [tasks.index(row["task"]) + 0.14 * (i - 2.5) for row in own]
        left.errorbar(
            [row["mean"] for row in own],
            y,
            xerr=[row["std"] for row in own],
            fmt=marker,
            color=color,
            ms=9 if marker == "*" else 5,
            mfc="white" if marker == "v" else color,
            elinewidth=1,
            label=method,
        )
    left.hlines(np.arange(1, len(tasks)) - 0.5, 0, 100, "0.85", lw=0.8)
    left.set_yticks(
        range(len(tasks)), [t.replace(", 0 and", ",\n0 and") for t in tasks]
    )
    left.set_ylim(len(tasks) - 0.5, -0.5)
    left.set(title="Target accuracy with SGD, mean ± std over seeds", xlabel="%")
    left.set_xlim(10, 102)
    left.grid(axis="x", alpha=0.3)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)

    optimizers = {"SGD": INK, "AdamW 0.001": GOOD, "AdamW 0.003": WORSE}
    rules = ("InfoMax", "InfoMax, nearest to 1", "always 1", "always 0.3", "always 0.1")
    lost = [row for row in data["regret"] if ": " not in row["task"]]
    for i, (optimizer, color) in enumerate(optimizers.items()):
        end = optimizer if "AdamW" in optimizer else ""
        own = [
            row
            for row in lost
            if row["task"].endswith(end) and ("AdamW" in row["task"]) == bool(end)
        ]
        for y, rule in enumerate(rules):
            losses = sorted(row[rule] for row in own)
            # Equal losses one above the other, so that none hides another.
            spread = np.linspace(-0.1, 0.1, len(losses))
            at = y + 0.27 * (i - 1) + spread
            label = optimizer if not y else None
            right.plot(
                losses, at, "o", color=color, ms=5, mew=0, alpha=0.8, label=label
            )
    right.hlines(np.arange(1, len(rules)) - 0.5, 0, 30, "0.85", lw=0.8)
    names = []
    for rule in rules:
        losses = [row[rule] for row in lost]
        names.append(f"{rule}\n{np.mean(losses):.1f}, {max(losses):.1f} at worst")
    right.set_yticks(range(len(rules)), names)
    right.set_ylim(len(rules) - 0.5, -0.5)
    right.set_xlim(-0.5, 1 + max(row[rule] for row in lost for rule in rules))
    right.set(title="What each rule loses, a dot for each task", xlabel="points")
    right.grid(axis="x", alpha=0.3)
    right.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False
    )
    save(figure, data, path)


DRAW = {
    "adaptation": draw_adaptation,
    "overhead": draw_overhead,
    "timing": draw_timing,
    "correctness": draw_correctness,
    "training": draw_training,
}


def main() -> None:
    """Draws every benchmark that has results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=HERE / "results",
        help="the folder of the results, and of the pictures",
    )
    folder = parser.parse_args().results
    if not any(load(folder, name) for name in DRAW):
        parser.error(f"--results must be a folder with whole results, got {folder}")
    for name, draw in DRAW.items():
        if data := newest(folder, name):
            draw(data, folder / f"{name}.png")
    print_overheads(folder)


if __name__ == "__main__":
    main()
