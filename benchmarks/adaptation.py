"""Evidence that DANN adapts, and that its scale can be chosen without target labels.

    python benchmarks/adaptation.py --data PATH/MNIST_vs_USPS.mat   # all tasks
    python benchmarks/adaptation.py                                 # without that file
    python benchmarks/adaptation.py --resume runs/adaptation-....json
    python benchmarks/adaptation.py --tasks AdamW --with results/adaptation-....json

Ten tasks, six methods, 5 to 20 seeds, by what a run takes. A seed is a split of the
data, an initialisation and an order of minibatches, the same for every method:
differences are paired.

    source only        scale 0
    DANN               scale 1
    DANN, chosen       the scale that the default rule chooses, among 0, 0.03, 0.1, 0.3,
                       1 and 3
    CDAN, CDAN+E       scale 1
    trained on target  the ceiling: scale 0, with the target's labels

They train with the paper's SGD. The nine that adapt to a target are run again with
AdamW at 0.003 and 0.001, where only DANN over the scales is run, and judged by InfoMax
and source accuracy: no CDAN, no reverse validation, no ceiling.

Three rules choose a scale, over all 27 rows:

    InfoMax                the best mean of InfoMax over the seeds
    InfoMax, nearest to 1  among the scales that are not clearly worse than that, by one
                           standard error of the difference paired by seed, the one
                           nearest to 1; support/choice.py has the definition
    always 1               the paper's

The claims: DANN or CDAN is above source only, with a 95 % interval clear of zero, on at
least five of the ten tasks; and the scale that the default rule chooses loses at most
2 points of target accuracy against the best fixed scale in the mean over the 27 rows,
and 5 at worst. The default is the rule that loses least at worst.

What it loses should be less, 0.5 in the mean and 3 at worst. That is no claim: with
AdamW no rule reached it. The last line says how far off it is.

InfoMax is the criterion because it lost least on the first seven tasks with SGD, with
seeds 0 to 4. The seeds here start at 10.

Target labels train the ceiling and score; nothing else reads them. An interrupted run
keeps its finished cells, and --resume does not run them again. --with reads the rows of
a finished file for the tables, and does not run their cells; both files together are
the result, each with its command, machine and versions.
"""

import dataclasses
import functools
import math
import os
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from parts import criteria, report, results, tasks
from parts.intervals import mean_interval
from support.choice import nearest_to_one
from support.images import read_digits
from tqdm import tqdm

import jaxgrl

FIRST_SEED = 10
SCALES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)
METHODS = (
    "source only",
    "DANN",
    "DANN, chosen",
    "CDAN",
    "CDAN+E",
    "trained on target",
)
CRITERIA = ("InfoMax", "centroid agreement", "reverse validation", "source accuracy")
# Each rule that chooses: its criterion, and how it reads the scores.
RULES = {name: (name, criteria.best) for name in CRITERIA} | {
    "InfoMax, nearest to 1": ("InfoMax", nearest_to_one)
}
DEFAULT = "InfoMax, nearest to 1"
CLAIM = {"mean": 2.0, "worst": 5.0}  # what the default may lose, in points
TARGET = {"mean": 0.5, "worst": 3.0}  # what it should lose at most
SOURCE = ("command", "date", "machine", "versions")
PACKAGES = (*report.PACKAGES, "scikit-learn", "scipy", "h5py")


def train(
    task: tasks.Task,
    method: str,
    key: Any,
    scale: Any,
    labelled: list[Any],
    unlabelled: list[Any],
) -> Any:
    """Trains a network; returns a function from inputs to features and label logits.

    Args:
      task: The task.
      method: "CDAN", "CDAN+E" or anything else, which is DANN.
      key: A PRNG key for the initialisation and the minibatches.
      scale: What the strength of the reversal rises to.
      labelled: A pair of inputs and labels for each domain that has them.
      unlabelled: The inputs of each domain that has none.
    """
    condition = jaxgrl.multilinear_map if "CDAN" in method else None
    inputs = [x for x, _ in labelled] + unlabelled
    count = len(inputs)
    init_key, key = jax.random.split(key)
    model = task.network(nnx.Rngs(init_key), count, condition)
    graphdef, params = nnx.split(model)
    optimizer = task.optimizer(task.steps)
    schedule = jaxgrl.dann_schedule(task.steps, end_value=scale)
    domains = jnp.repeat(jnp.arange(count), task.batch)

    def loss(params: Any, key: Any, step: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, step), count + 1)
        rows = [
            jax.random.randint(k, (task.batch,), 0, len(x))
            for k, x in zip(keys[1:], inputs, strict=True)
        ]
        x = jnp.concatenate([x[r] for x, r in zip(inputs, rows, strict=True)])
        y = jnp.concatenate([y[r] for (_, y), r in zip(labelled, rows, strict=False)])
        model = nnx.merge(graphdef, params)
        label_logits, domain_logits = model(task.prepare(keys[0], x), schedule(step))
        weights = None
        if method == "CDAN+E":
            weights = jaxgrl.entropy_weights(label_logits, domains)
        log_p = jax.nn.log_softmax(label_logits[: len(y)])
        label_loss = -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1))
        return label_loss + jaxgrl.domain_loss(domain_logits, domains, weights=weights)

    def step(state: Any, index: Any) -> Any:
        params, opt_state = state
        grads = jax.grad(loss)(params, key, index)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, opt_state), None

    state = params, optimizer.init(params)
    (params, _), _ = jax.lax.scan(step, state, jnp.arange(task.steps))
    model = nnx.merge(graphdef, params)

    def predict(x: Any) -> Any:
        features = model.feature_extractor(task.prepare(None, x))
        return features, model.label_classifier(features)

    return predict


def accuracy(logits: Any, labels: Any) -> Any:
    """Returns the share of right predictions; nan if a logit is not finite."""
    right = jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))
    return jnp.where(jnp.all(jnp.isfinite(logits)), right, jnp.nan)


def run(task: tasks.Task, method: str, key: Any, scale: Any, data: Any) -> Any:
    """Trains once; returns the target accuracy and, for DANN, the criteria."""
    labelled, unlabelled = data["labelled"], data["unlabelled"]
    targets = [] if task.generalisation else [x for x, _ in unlabelled]
    if method == "trained on target":
        predict = train(task, method, key, 0.0, unlabelled, [x for x, _ in unlabelled])
        return {
            "target accuracy": accuracy(predict(data["test"][0])[1], data["test"][1])
        }
    predict = train(task, method, key, scale, labelled, targets)
    test_x, test_y = data["test"]
    found = {"target accuracy": accuracy(predict(test_x)[1], test_y)}
    if method != "DANN" or task.generalisation:
        return found
    source_x, source_y = (jnp.concatenate(part) for part in zip(*labelled, strict=True))
    source_features, _ = predict(source_x)
    target_features, target_logits = predict(jnp.concatenate(targets))
    valid_x, valid_y = data["valid"]
    found |= {
        "InfoMax": jaxgrl.information_maximization(target_logits),
        "source accuracy": accuracy(predict(valid_x)[1], valid_y),
    }
    if task.scales_only:
        return found

    def fit(pseudo_labels: Any) -> Any:
        sizes = np.cumsum([len(x) for x in targets])[:-1]
        pairs = list(zip(targets, jnp.split(pseudo_labels, sizes), strict=True))
        sources = [x for x, _ in labelled]
        reverse = train(task, method, jax.random.fold_in(key, 1), scale, pairs, sources)
        return lambda x: reverse(x)[1]

    return found | {
        "centroid agreement": criteria.centroid_agreement(
            source_features, source_y, target_features, target_logits
        ),
        "reverse validation": criteria.reverse_validation(
            fit, target_logits, valid_x, valid_y
        ),
    }


def run_cell(task: tasks.Task, method: str) -> list[report.Row]:
    """Runs every seed (and for DANN every scale) of a cell; returns a row for each."""
    scales = SCALES if method == "DANN" else (1.0,)
    splits = [data_of(task, method, FIRST_SEED + i) for i in range(task.seeds)]
    data = jax.tree.map(lambda *arrays: np.stack(arrays), *splits)
    jobs = [(i, scale) for scale in scales for i in range(task.seeds)]
    count = max(n for n in range(1, jax.device_count() + 1) if len(jobs) % n == 0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("runs",))
    share, whole = jax.sharding.PartitionSpec("runs"), jax.sharding.PartitionSpec()

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(share, whole),
        out_specs=share,
        check_vma=False,
    )
    def program(jobs: Any, data: Any) -> Any:
        def job(pair: Any) -> Any:
            i, scale = pair
            own = jax.tree.map(lambda a: a[i], data)
            return run(task, method, jax.random.key(FIRST_SEED + i), scale, own)

        return jax.lax.map(job, jobs)

    ids, ends = (np.array(column) for column in zip(*jobs, strict=True))
    start = time.perf_counter()
    found = program((ids.astype(np.int32), ends.astype(np.float32)), data)
    found = {k: np.asarray(v) for k, v in jax.block_until_ready(found).items()}
    seconds = (time.perf_counter() - start) / len(jobs)
    jax.clear_caches()
    return [
        {"task": task.name, "method": method, "scale": scale, "seed": FIRST_SEED + job}
        | {name: float(values[i]) for name, values in found.items()}
        | {"seconds": seconds}
        for i, (job, scale) in enumerate(jobs)
    ]


def data_of(task: tasks.Task, method: str, seed: int) -> tasks.Data:
    """Returns the data, for the ceiling with no target image in training and test."""
    data = task.make_data(seed)
    same = data["test"][0] is data["unlabelled"][0][0]
    if method == "trained on target" and same:
        first, second = tasks.split(
            seed, len(data["test"][1]), len(data["test"][1]) // 2
        )
        whole = data["test"]
        data |= {"unlabelled": [tasks.pick(whole, first)]}
        data |= {"test": tasks.pick(whole, second)}
    return data


def per_seed(rows: list[report.Row], task: str, method: str, scale: float) -> Any:
    """Returns the target accuracies in percent, in the order of the seeds."""
    chosen = [
        r for r in rows if (r["task"], r["method"], r["scale"]) == (task, method, scale)
    ]
    chosen.sort(key=lambda r: r["seed"])
    return 100 * np.array([r["target accuracy"] for r in chosen])


def scores(rows: list[report.Row], task: str, criterion: str) -> Any:
    """Returns a criterion, [scales, seeds]; None where it was not measured."""
    own = [r for r in rows if r["task"] == task and r["method"] == "DANN"]
    if any(criterion not in r for r in own):
        return None
    own.sort(key=lambda r: (r["scale"], r["seed"]))
    return np.reshape([r[criterion] for r in own], (len(SCALES), -1))


def choose(rows: list[report.Row], task: str, rule: str) -> float | None:
    """Returns the scale that a rule chooses; None where it cannot be applied."""
    criterion, pick = RULES[rule]
    found = scores(rows, task, criterion)
    return None if found is None else SCALES[pick(SCALES, found)]


def summary(rows: list[report.Row], task: tasks.Task) -> list[report.Row]:
    """Returns a row for each method: mean, deviation, paired gain with its interval."""
    cells = {"source only": ("DANN", 0.0), "DANN": ("DANN", 1.0)}
    chosen = math.nan
    if not task.generalisation:
        chosen = choose(rows, task.name, DEFAULT)
        assert chosen is not None  # InfoMax is measured on every task
        cells["DANN, chosen"] = "DANN", chosen
    baseline = per_seed(rows, task.name, "DANN", 0.0)
    table = []
    for method in METHODS:
        if method == "DANN, chosen" and task.generalisation:
            continue
        if task.scales_only and method not in cells:
            continue
        values = per_seed(rows, task.name, *cells.get(method, (method, 1.0)))
        row: report.Row = {"task": task.name, "method": method}
        if method == "DANN, chosen":
            row["method"] += f" ({chosen:g})"
        row |= {"mean": values.mean(), "std": values.std(ddof=1)}
        if method != "source only":
            gain = values - baseline
            low, high = mean_interval(gain)
            row |= {"gain": gain.mean(), "low": low, "high": high}
        table.append(row)
    return table


def regrets(rows: list[report.Row], chosen: list[tasks.Task]) -> list[report.Row]:
    """Returns what each rule loses against the best fixed scale: a row for each task.

    The mean and the worst over the tasks with SGD, with AdamW, and over all follow, for
    the rules that were measured on all of them.
    """
    table = []
    for task in chosen:
        means = {s: per_seed(rows, task.name, "DANN", s).mean() for s in SCALES}
        top = max(mean for mean in means.values() if np.isfinite(mean))
        lost = {  # everything, if a run diverged
            scale: float(top - mean) if np.isfinite(mean) else math.inf
            for scale, mean in means.items()
        }
        row: report.Row = {"task": task.name}
        for rule in RULES:
            scale = choose(rows, task.name, rule)
            if scale is not None:
                row |= {rule: lost[scale], f"scale by {rule}": scale}
        table.append(row | {f"always {s:g}": lost[s] for s in SCALES})
    groups = {
        "SGD": [not task.scales_only for task in chosen],
        "AdamW": [task.scales_only for task in chosen],
        "all": [True] * len(chosen),
    }
    for group, members in groups.items():
        own = [row for row, member in zip(table, members, strict=False) if member]
        for label, reduce in (("mean", np.mean), ("worst", np.max)) if own else ():
            row = {"task": f"{group}: {label}"}
            for rule in (*RULES, *(f"always {s:g}" for s in SCALES)):
                if all(rule in r for r in own):
                    row[rule] = float(reduce([r[rule] for r in own]))
            table.append(row)
    return table


def parse_args() -> Any:
    """Returns the options, checked."""
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=pathlib.Path, help="MNIST_vs_USPS.mat, for two of the tasks")
    add("--seeds", type=int, help="of every task, 2 or more (default: 5, 10 or 20)")
    add(
        "--tasks",
        nargs="+",
        default=[""],
        metavar="PART",
        help="only tasks whose name contains one of these",
    )
    add("--resume", type=pathlib.Path, help="a file of results to go on with")
    add(
        "--with",
        type=pathlib.Path,
        dest="other",
        help="a file of finished results whose rows the tables show too",
    )
    args = parser.parse_args()
    if args.seeds is not None and args.seeds < 2:
        parser.error(f"--seeds must be 2 or more, got {args.seeds}")
    for option, path in zip(
        ("data", "resume", "with"), (args.data, args.resume, args.other), strict=True
    ):
        if path is not None and not path.is_file():
            parser.error(f"--{option} must be a file, got {path}")
    args.joined = []
    if args.other:
        try:
            other = results.read(args.other)
            args.joined, args.source = other["rows"], {k: other[k] for k in SOURCE}
        except (ValueError, KeyError, TypeError) as error:
            parser.error(
                f"--with must be a file of results, got {args.other}: {error!r}"
            )
    # A wrong file is refused before the first training.
    sets = read_digits(args.data, parser.error) if args.data else {}
    every = tasks.make_tasks(sets)
    joined = {row["task"] for row in args.joined}
    args.also = [task for task in every if task.name in joined]
    args.chosen = [
        task
        for task in every
        if any(part in task.name for part in args.tasks)
        and task.name not in joined
        and (args.data or not task.from_file)
    ]
    if args.seeds:
        args.chosen = [
            dataclasses.replace(task, seeds=args.seeds) for task in args.chosen
        ]
    if not args.chosen:
        parser.error(
            f"--tasks must be part of a task's name, got {', '.join(args.tasks)!r}"
        )
    return args


def main() -> int:
    """Runs what is missing, keeps each cell, prints the tables; returns the status."""
    args = parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # a device a core
    settings = {"seeds": args.seeds}
    record = report.Record(
        "adaptation",
        args.output,
        packages=PACKAGES,
        settings=settings,
        resume=args.resume,
    )
    if args.joined:
        record.data["with"] = {"file": args.other.name} | args.source
    cells = [
        (task, method)
        for task in args.chosen
        for method in ("DANN", "CDAN", "CDAN+E", "trained on target")
        if method == "DANN" or not task.scales_only
    ]
    done = {(row["task"], row["method"]) for row in record.rows}
    with tqdm(cells, unit="cell", disable=None) as bar:
        for task, method in bar:
            if (task.name, method) not in done:
                bar.set_description(f"{task.name}, {method}")
                record.rows.extend(results.rounded(run_cell(task, method)))
                record.save()

    shown, rows = [*args.also, *args.chosen], [*args.joined, *record.rows]
    tables = [row for task in shown for row in summary(rows, task)]
    report.print_table(tables, ("task", "method", "mean", "std", "gain", "low", "high"))
    for task in shown:
        notes = [task.remark, f"reported: {task.reported}" if task.reported else ""]
        if any(notes):
            print(f"{task.name}: {'; '.join(filter(None, notes))}")
    print()
    lost = regrets(rows, [task for task in shown if not task.generalisation])
    always = [f"always {scale:g}" for scale in SCALES]
    report.print_table(lost, ("task", *RULES, *always))
    record.data |= {"summary": tables, "regret": lost}

    paper = {task.name for task in shown if not task.scales_only}
    adapted = paper & {
        row["task"]
        for row in tables
        if row["method"].startswith(("DANN", "CDAN")) and row["low"] > 0
    }
    failures = []
    if len(adapted) < min(5, len(paper)):
        failures.append(f"adaptation is clear on {len(adapted)} of {len(paper)} tasks")
    claim = f"adaptation on {len(adapted)} of {len(paper)} tasks"
    if lost:
        mean, worst = (row[DEFAULT] for row in lost[-2:])
        loss = f"{DEFAULT} loses {mean:.1f} points in the mean, {worst:.1f} at worst"
        met = mean <= TARGET["mean"] and worst <= TARGET["worst"]
        claim += f"; {loss}"
        print(
            f"\n{loss}: the target of {TARGET['mean']} and {TARGET['worst']} is "
            f"{'met' if met else 'missed'}"
        )
        if mean > CLAIM["mean"] or worst > CLAIM["worst"]:
            failures.append(loss)
    return record.close(claim, failures)


if __name__ == "__main__":
    report.interruptible(main)
