"""Draws the pictures of the benchmarks from the saved results.

It also prints the tables of the devices that programs were compiled for, and of the
trainings on every machine.

    python benchmarks/plot.py                   # from and to benchmarks/results
    python benchmarks/plot.py --results FOLDER

For each benchmark it draws the newest complete file. Needs matplotlib.
"""

import argparse
import itertools
import pathlib
import textwrap
from collections import Counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from parts import counts, pictures
from parts.counts import FORWARD
from parts.pictures import BLUE as GOOD
from parts.pictures import GREY, INK, PURPLE
from parts.pictures import ORANGE as WORSE
from parts.report import print_markdown
from parts.results import newest, saved, whole

RESULTS = pathlib.Path(__file__).parent / "results"
LAYERS = ("jaxgrl", "five lines", "stop_gradient trick", "optax.scale_gradient")
SHARES = ("jaxgrl + NNX", "PyTorch eager")
EXAMPLE = ("conv + attention", "bfloat16", "per example")


def machine_line(data: dict[str, Any]) -> str:
    """Returns where and when the numbers of a picture were measured."""
    machine, versions = data["machine"], data["versions"]
    line = (
        f"{data['command']} · {machine['processor']}, {machine['cores']} cores · "
        f"Python {versions['python']}, jax {versions['jax']} · {data['date'][:10]}"
    )
    line = textwrap.fill(line, 180, break_on_hyphens=False)
    return f"{line}\n{machine_line(data['with'])}" if "with" in data else line


def save(figure: Figure, data: dict[str, Any], path: pathlib.Path) -> None:
    """Writes a picture with a line that says where its numbers come from."""
    figure.supxlabel(machine_line(data), fontsize=7, color=INK)
    pictures.save(figure, path)


def print_overheads(folder: pathlib.Path) -> None:
    """Prints a row for each device that programs were compiled for, as Markdown.

    The counts are of one program, jaxgrl / by hand.
    """
    columns = {
        "ops": "operations",
        "fusions": "fusions",
        "temp bytes": "temporary bytes",
    }
    header = ("device", "programs", "forward", "gradient", "collectives")
    rows = []
    for data in whole(folder, "overhead"):
        programs = [counts.from_row(row) for row in data["rows"]]
        forwards = [parts["forward"] for _, parts in programs]
        gradients = [parts["gradient"] for _, parts in programs]
        differ = sum(f["jaxgrl"][c] != f["none"][c] for f in forwards for c in FORWARD)
        moved = sum(
            g["jaxgrl"]["collectives"] != g["by hand"]["collectives"] for g in gradients
        )
        cells = [device_name(data), len(gradients)]
        cells += ["equal" if not differ else f"{differ} counts differ"]
        cells += ["no worse" if data["holds"] else f"{len(data['failures'])} worse"]
        cells += ["the same" if not moved else f"{moved} differ"]
        example = next(
            parts["gradient"]
            for case, parts in programs
            if (case["program"], case["dtype"], case["scale"]) == EXAMPLE
        )
        for column in columns:
            cells.append(f"{example['jaxgrl'][column]} / {example['by hand'][column]}")
        rows.append(cells)
    print_markdown([*header, *columns.values()], rows)


def print_trainings(folder: pathlib.Path) -> None:
    """Prints the trainings and the sweeps of every machine, as Markdown.

    The first row has its speed or its seconds, the others their ratio to it.
    """
    found = saved(folder, "training")
    for what, size in itertools.product(
        ("training", "sweep"), ("small", "middle", "large")
    ):
        columns: dict[str, dict[str, str]] = {}
        for data in found:
            rows = [row for row in data["rows"] if "ratio" in row]
            rows = [row for row in rows if (row["what"], row["size"]) == (what, size)]
            if rows:
                columns[machine_name(data)] = training_cells(rows)
        if not columns:
            continue
        names = dict.fromkeys(name for own in columns.values() for name in own)
        print_markdown(
            [f"{what}, {size}", *columns],
            [[n, *(own.get(n, "") for own in columns.values())] for n in names],
        )


def training_cells(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Returns what a column of the table says, by trainer, and two shares."""
    first = rows[0]
    speed = f"{first['steps/s']:,.0f} steps/s" if "steps/s" in first else ""
    cells = {first["trainer"]: speed or f"{first['sweep s']:.2g} s"}
    cells |= {r["trainer"]: f"{r['ratio']:.2f} {r['interval']}" for r in rows[1:]}
    for row in rows:
        if row["trainer"] in SHARES and "share" in row:
            text = f"share of plain products, {row['trainer']}"
            cells[text] = f"{row['share']:.2f} {row['its interval']}"
    return cells


def machine_name(data: dict[str, Any]) -> str:
    """Returns the GPU, or the processor, as the documents name it."""
    machine = data["machine"]
    if machine["device"] != "cpu":
        return device_name(data)
    return machine["processor"].replace("(R)", "").replace(" Processor", "")


def device_name(data: dict[str, Any]) -> str:
    """Returns the device of some results as the documents name it."""
    name = data["machine"]["device"].removesuffix(" compiled")
    name = name.replace("tpu tpu", "TPU ").replace("tpu", "TPU")
    name = name.removeprefix("NVIDIA ")
    return name if name.startswith("TPU") else name.upper()


def kind_of(ours: counts.Counts, limit: counts.Counts) -> str:
    """Returns how a gradient program compares with the reversal by hand."""
    if "error" in ours:
        return "does not run"
    if ours["same bits"] is False:
        return "other bits"
    more = any(ours[c] > limit[c] for c in FORWARD)
    return (
        "same bits, more work or memory" if more else "same bits, no more of anything"
    )


def draw_overhead(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws how many programs are equal to by hand, and the bytes of the others."""
    colors = {
        "same bits, no more of anything": GOOD,
        "same bits, more work or memory": WORSE,
        "other bits": PURPLE,
        "does not run": GREY,
    }
    found = {layer: Counter() for layer in LAYERS}
    extra: dict[str, list[tuple[float, str]]] = {layer: [] for layer in LAYERS}
    for row in data["rows"]:
        gradient = counts.from_row(row)[1]["gradient"]
        limit = gradient["by hand"]
        for layer in LAYERS:
            kind = kind_of(gradient[layer], limit)
            found[layer][kind] += 1
            if kind != "does not run":
                more = 100 * (gradient[layer]["bytes"] / limit["bytes"] - 1)
                extra[layer].append((more, colors[kind]))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    start = np.zeros(len(LAYERS))
    for kind, color in colors.items():
        width = np.array([found[layer][kind] for layer in LAYERS])
        bars = left.barh(LAYERS, width, left=start, color=color)
        # A number that is wider than its bar is left to the table.
        texts = [str(w) if w > 1 else "" for w in width]
        ink = "black" if color == GREY else "white"
        left.bar_label(bars, texts, label_type="center", color=ink)
        start = start + width
    left.invert_yaxis()
    left.margins(x=0)
    left.set_title("Gradient programs against the reversal by hand", fontsize=10)
    left.set_xlabel("programs")
    rng = np.random.default_rng(0)
    for y, layer in enumerate(LAYERS):
        for more, color in extra[layer]:
            at = y + rng.uniform(-0.25, 0.25)
            right.plot(more, at, "o", ms=4, alpha=0.6, color=color, mew=0)
    right.axvline(0, color=INK, lw=0.8)
    right.set_title("Memory traffic of the programs that run", fontsize=10)
    right.set_xlabel("more than by hand [%]")
    right.grid(axis="x", alpha=0.3)
    handles = [Patch(color=color, label=kind) for kind, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    save(figure, data, path)


def draw_training(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the time of a step of every trainer, and the seconds of the sweep."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if "seconds" in row:
            kind = {"training": "one training step", "sweep": "sweep, 40 trainings"}
            title = f"{row['size'].capitalize()} network: {kind[row['what']]}"
            panels.setdefault(title, []).append(row)
    figure = Figure(figsize=(11, 3.4 * -(-len(panels) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    for (title, rows), axis in zip(panels.items(), axes, strict=False):
        sweep = rows[0]["what"] == "sweep"
        names = [row["trainer"] for row in rows]
        values = [row["sweep s"] if sweep else 1e6 / row["steps/s"] for row in rows]
        ours = [name.startswith(("jaxgrl", "one program")) for name in names]
        bars = axis.barh(names, values, color=[GOOD if o else "0.6" for o in ours])
        shown = [f"{v:.1f}" if sweep else f"{v:,.0f}" for v in values]
        axis.bar_label(bars, shown, padding=3, fontsize=8)
        # How much of it the products alone take, in the same process.
        if not sweep:
            products = [row.get("products us", 0.0) for row in rows]
            axis.barh(names, products, height=0.3, color="black", alpha=0.45)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("seconds" if sweep else "microseconds", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in axes:
        axis.set_visible(False)
    handles = [
        Patch(color=GOOD, label="jaxgrl"),
        Patch(color="0.6", label="others"),
    ]
    if any("products us" in row for row in data["rows"]):
        label = "plain products of the same matrices, alone"
        handles.append(Patch(color="black", alpha=0.45, label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
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
        default=RESULTS,
        help="folder of the results and of the pictures",
    )
    folder = parser.parse_args().results
    found = {name: newest(folder, name) for name in DRAW}
    if not any(found.values()):
        parser.error(f"--results must be a folder with whole results, got {folder}")
    for name, data in found.items():
        if data:
            DRAW[name](data, folder / f"{name}.png")
    print_overheads(folder)
    print_trainings(folder)


if __name__ == "__main__":
    main()
