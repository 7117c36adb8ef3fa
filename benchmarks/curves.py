"""How training a DANN looks: when it works, and when it fails in five ways.

One DANN is trained on rotated digits again and again, with one thing changed. It makes
the two pictures of the documents, saves the final numbers and prints them:

    runs.png     six trainings over the steps
    choices.png  target accuracy over scale, gamma, discriminator and learning rate

    python benchmarks/curves.py               # some minutes on two cores
    python benchmarks/curves.py --pictures .  # elsewhere than in docs/
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from parts import pictures, report
from parts.digits import rotated_digits
from parts.pictures import BLUE, ORANGE
from tqdm import tqdm

import jaxgrl
from jaxgrl.nnx import DANN

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PACKAGES = (*report.PACKAGES, "scikit-learn")
BATCH = 64  # examples from each domain
EVERY = 100  # steps between two evaluations
SHADE = "#FFF1C2"
DEFAULTS = {"scale": 1.0, "gamma": 10.0, "width": 100, "rate": 0.01}

# The rows of runs.png: label of the axis, its limits, a reference line and its meaning.
ROWS = {
    "domain accuracy": ("domain\naccuracy", (0, 1.08), 0.5, "chance"),
    "domain loss": ("domain\nloss", (0, 1.3), np.log(2), "log 2"),
    "domain logits": ("std of the\ndomain logits", (0, 9.5), 0, ""),
    "label loss": ("label loss\n(source)", (1e-3, 30), np.log(10), "log 10"),
    "features": ("std of the\nfeatures", (0, 1.5), 0, ""),
    "target accuracy": ("target\naccuracy [%]", (0, 85), 0, "source only"),
}
# Its columns: what differs from the defaults, and the rows that give the failure away.
INF = np.inf  # as gamma: the scale is constant from the first step
VANISH = {"scale": 10.0, "gamma": INF, "rate": 0.1}
RUNS = {
    "works\nscale 1": ({}, ()),
    "too weak\nscale 0.03": ({"scale": 0.03}, (0, 1, 2)),
    # As if a normalisation over the discriminator's single output came last.
    "starves: constant\ndomain logits": ({"gain": 0.0}, (0, 1, 2)),
    "dies\nscale 1, rate 0.1": ({"rate": 0.1}, (0, 2, 3)),
    "too strong\nscale 30": ({"scale": 30.0}, (0, 4, 5)),
    "features vanish\nconstant scale 10\nrate 0.1": (VANISH, (3, 4, 5)),
}
TWICE = {"twice": True}  # drawn dashed over the run that works
CHOICES = {  # the panels of choices.png; a width of 0 is a linear discriminator
    "scale": ("scale, the end_value of dann_schedule", (0.03, 0.1, 0.3, 1, 3, 10, 30)),
    "gamma": ("gamma of dann_schedule", (1, 2.5, 5, 10, 20, 40, INF)),
    "width": ("hidden units of the discriminator", (0, 1, 4, 16, 64, 100, 256)),
    "rate": ("learning rate at the start, momentum 0.9", (0.003, 0.01, 0.03, 0.1, 0.3)),
}
TICKS = {INF: "constant", 0: "linear"}  # what stands at the axis for these values


# 1. What can be set. All but the width is data for the compiled training, schedules as
#    well: they are evaluated beforehand, to arrays with a value for each step.
def setting(steps, scale=1.0, gamma=10.0, rate=0.01, gain=1.0, twice=False):
    """Returns the arrays that make one training differ from the next."""
    strength = jnp.full(steps, scale, jnp.float32)
    if np.isfinite(gamma):
        strength *= jaxgrl.dann_schedule(steps, gamma=gamma)(jnp.arange(steps))
    # The mistake: the strength is in the layer, and weights the domain loss as well.
    weight = strength if twice else jnp.ones(steps)
    return {"scale": strength, "weight": weight, "rate": rate, "gain": gain}


# 2. One training, a pure function; what it returns is what one would log.
def train(width, steps, setting, key, data):
    """Returns every quantity at every evaluation, and the final features."""
    init_key, batch_key = jax.random.split(key)
    rngs = nnx.Rngs(init_key)
    features = nnx.Sequential(nnx.Linear(64, 100, rngs=rngs), nnx.relu)
    classifier = nnx.Linear(100, 10, rngs=rngs)
    hidden = [nnx.Linear(100, width, rngs=rngs), nnx.relu] if width else []
    head = nnx.Sequential(*hidden, nnx.Linear(width or 100, 1, rngs=rngs))
    graphdef, params = nnx.split(DANN(features, classifier, head))
    rate = jaxgrl.dann_learning_rate(setting["rate"], transition_steps=steps)
    optimizer = optax.sgd(rate, momentum=0.9)

    def forward(params, s, t, scale):
        x = jnp.concatenate([data["source"][s], data["target"][t]])
        domains = jnp.repeat(jnp.array([0, 1]), np.array([len(s), len(t)]))
        label_logits, domain_logits = nnx.merge(graphdef, params)(x, scale)
        domain_logits *= setting["gain"]
        label_losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            label_logits[: len(s)], data["source_labels"][s]
        )
        return {
            "domain accuracy": jaxgrl.domain_accuracy(domain_logits, domains),
            "domain loss": jaxgrl.domain_loss(domain_logits, domains),
            "domain logits": jnp.std(domain_logits),
            "label loss": label_losses.mean(),
        }

    def loss(params, step):
        keys = jax.random.split(jax.random.fold_in(batch_key, step))
        s = jax.random.randint(keys[0], (BATCH,), 0, len(data["source"]))
        t = jax.random.randint(keys[1], (BATCH,), 0, len(data["target"]))
        seen = forward(params, s, t, setting["scale"][step])
        return seen["label loss"] + setting["weight"][step] * seen["domain loss"]

    def train_step(state, step):
        params, opt_state = state
        grads = jax.grad(loss)(params, step)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def evaluate(params):
        # On all training images: a batch of 128 shows the same, but noisier.
        s, t = jnp.arange(len(data["source"])), jnp.arange(len(data["target"]))
        model = nnx.merge(graphdef, params)
        ends = [model.feature_extractor(data[name]) for name in ("source", "target")]
        logits = model.label_classifier(model.feature_extractor(data["test"]))
        right = 100 * jnp.mean(jnp.argmax(logits, axis=-1) == data["test_labels"])
        seen = forward(params, s, t, 0.0)
        seen["features"] = jnp.mean(jnp.std(jnp.concatenate(ends), axis=0))
        # Without this a diverged run would look like guessing: argmax of nan is 0.
        finite = jnp.all(jnp.isfinite(logits))
        return seen | {"target accuracy": jnp.where(finite, right, jnp.nan)}, ends

    def chunk(state, start):
        seen, _ = evaluate(state[0])
        state, _ = jax.lax.scan(train_step, state, start + jnp.arange(EVERY))
        return state, seen

    state = params, optimizer.init(params)
    state, curves = jax.lax.scan(chunk, state, jnp.arange(0, steps, EVERY))
    last, ends = evaluate(state[0])
    return jax.tree.map(jnp.append, curves, last), ends


# 3. All trainings: compiled once for each width; the seeds are mapped over inside.
def train_all(seeds, steps, record):
    """Returns {name of the run: {quantity: [seed, evaluation]}}; saves the ends."""
    splits = [rotated_digits(25.0, seed) for seed in range(seeds)]
    data = jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))

    def every_seed(width, setting):
        return jax.lax.map(lambda d: train(width, steps, setting, *d), (keys, data))

    every_seed = jax.jit(every_seed, static_argnums=0)
    runs = [change for change, _ in RUNS.values()] + [TWICE]
    wanted = [{key: v} for key, (_, values) in CHOICES.items() for v in values]
    wanted += [{"scale": 0.0, "rate": rate} for rate in CHOICES["rate"][1]]
    changes: dict[str, dict[str, Any]] = {}
    for change in runs + wanted:
        changes.setdefault(name(change), change)
    results = {}
    for own_name, change in tqdm(changes.items(), unit="setting"):
        own = {key: v for key, v in change.items() if key != "width"}
        width = change.get("width", DEFAULTS["width"])
        curves, ends = jax.device_get(every_seed(width, setting(steps, **own)))
        if change in runs:
            curves["fresh classifier"] = np.array(list(map(fresh, *ends)))
        results[own_name] = curves
        last = {k: np.transpose(v)[-1] if v.ndim > 1 else v for k, v in curves.items()}
        record.add({"setting": own_name} | {k: v.tolist() for k, v in last.items()})
    return results


def fresh(source, target):
    """Returns the accuracy of a new, linear domain classifier, on held-out features."""
    if not np.isfinite([source, target]).all():
        return np.nan
    return 0.5 + jaxgrl.proxy_a_distance(source, target, folds=5).distance / 4


def name(change):
    """Returns the name of a run: what differs from the defaults."""
    return " ".join(f"{k}={v:g}" for k, v in change.items() if DEFAULTS.get(k) != v)


# 4. What is left to look at.
def summary(values):
    """Returns mean and std over the seeds that are finite, and how many are not."""
    finite = values[np.isfinite(values)]
    std = np.std(finite, ddof=1) if len(finite) > 1 else np.nan
    return (finite.mean() if len(finite) else np.nan), std, len(values) - len(finite)


def final(results, **change):
    """Returns the target accuracy of each seed at the end."""
    return results[name(change)]["target accuracy"][:, -1]


def draw_runs(results, steps):
    """Returns a figure with a column for each run and a row for each quantity."""
    figure = Figure(figsize=(10, 10.4), layout="constrained")
    axes = figure.subplots(len(ROWS), len(RUNS), sharex=True, sharey="row")
    x = np.arange(0, steps + 1, EVERY)
    for (row, column), axis in np.ndenumerate(axes):
        quantity, (label, limits, reference, text) = list(ROWS.items())[row]
        title, (change, tells) = list(RUNS.items())[column]
        values = results[name(change)][quantity]
        if text == "source only":
            reference = summary(final(results, scale=0.0))[0]
        axis.axhline(reference, color="black", lw=1, ls=":")
        axis.plot(x, values.T, color=BLUE, lw=0.6, alpha=0.4)
        axis.plot(x, [summary(at)[0] for at in values.T], color=BLUE, lw=2)
        if column == 0:
            twice = [summary(at)[0] for at in results[name(TWICE)][quantity].T]
            axis.plot(x, twice, "--", color="black", lw=1.2)
            place = {"ha": "right", "va": "top" if row == 5 else "bottom", "size": 8}
            axis.annotate(text, (0.97 * steps, reference), **place)
            axis.set_ylabel(label)
        if row == 0:
            axis.set_title(title, size=10)
            end = summary(results[name(change)]["fresh classifier"])[0]
            axis.plot(steps, end, "D", color=ORANGE, ms=7, clip_on=False, zorder=5)
        if broken := summary(values[:, -1])[2]:
            text = f"nan: {broken} of {len(values)}"
            axis.annotate(text, (0.1, 0.8), xycoords="axes fraction")
        axis.set_facecolor(SHADE if row in tells else "white")
        axis.set_yscale("log" if quantity == "label loss" else "linear")
        axis.set(ylim=limits, xlim=(0, steps), xticks=[0, steps // 2])
        axis.grid(alpha=0.25)
    figure.supxlabel("training step", size=10)
    figure.suptitle(
        "A DANN that works and five that fail. Yellow panels show the failure.\n"
        "thin: seeds; thick: mean; dashed: the scale weights the domain loss as well\n"
        "orange diamond: accuracy of a new, linear domain classifier at the end",
        size=11,
    )
    return figure


def draw_choices(results):
    """Returns a figure of final accuracy over each choice, the others at default."""
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for axis, (key, (label, values)) in zip(axes.flat, CHOICES.items(), strict=True):
        x, i = np.arange(len(values)), values.index(DEFAULTS[key])
        rows = [summary(final(results, **{key: value})) for value in values]
        mean, std, broken = np.transpose(rows)
        # Each learning rate has its own baseline; the other choices do not concern it.
        rates = values if key == "rate" else [DEFAULTS["rate"]] * len(values)
        base = [summary(final(results, scale=0.0, rate=rate))[0] for rate in rates]
        axis.plot(x, base, "--", color=ORANGE, lw=2, label="source only (scale 0)")
        look = {"fmt": "o-", "color": BLUE, "lw": 2, "capsize": 4}
        axis.errorbar(x, mean, std, label="DANN, mean ± std over seeds", **look)
        circle = {"ms": 15, "mfc": "none", "mec": "black"}
        axis.plot(i, mean[i], "o", label="value in the other panels", **circle)
        for place in np.flatnonzero(broken):
            text = f"{broken[place]:.0f} of {len(final(results))}\ndiverged"
            foot = {"xycoords": axis.get_xaxis_transform(), "ha": "center"}
            axis.annotate(text, (place, 0.02), **foot)
        axis.set_xticks(x, [TICKS.get(value, f"{value:g}") for value in values])
        axis.set(xlabel=label, ylabel="target accuracy [%]")
        axis.tick_params(labelleft=True)
        axis.grid(alpha=0.3)
    axes[0, 1].legend(loc="center right", fontsize=9)
    figure.suptitle(
        "DANN on rotated digits, one choice varied at a time. Axes do not start at 0"
    )
    return figure


def print_tables(results, steps):
    """Prints every number that is drawn; nan seeds are counted, and left out."""
    late = steps // EVERY // 2
    print(f"runs.png at step {steps}, mean ± std over seeds; peak: of the mean domain")
    print(f"accuracy, with its mean and range over runs from step {late * EVERY} on")
    for title, (change, _) in {**RUNS, "strength applied twice": (TWICE, ())}.items():
        print(f"  {title.replace(chr(10), ', ')}")
        curves = results[name(change)]
        for quantity, values in curves.items():
            mean, std, broken = summary(values.T[-1] if values.ndim > 1 else values)
            mark = f"   nan: {broken}" if broken else ""
            print(f"{quantity:>20}{mean:9.3f} ± {std:5.3f}{mark}")
        accuracy = curves["domain accuracy"]
        means, after = accuracy.mean(axis=0), accuracy[:, late:]
        row = f"{'peak':>20}{means.max():9.3f} at step {EVERY * means.argmax()}, then"
        print(f"{row} {after.mean():.3f} ({after.min():.3f} to {after.max():.3f})")
    print("choices.png, final target accuracy [%] and its gain over source only")
    for key, (label, values) in CHOICES.items():
        print(f"  {label}")
        for value in values:
            rate = value if key == "rate" else DEFAULTS["rate"]
            base = final(results, scale=0.0, rate=rate)
            accuracy = final(results, **{key: value})
            mean, std, broken = summary(accuracy)
            row = f"{TICKS.get(value, value):>20}{mean:9.1f} ± {std:4.1f}"
            row += "{:+9.1f} ± {:4.1f}".format(*summary(accuracy - base))
            row += "   from {:.1f} ± {:.1f}".format(*summary(base))
            print(row + (f"   diverged: {broken} of {len(base)}" if broken else ""))


def main() -> int:
    """Trains everything, saves and draws it, and prints what is drawn."""
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="runs of each setting (default: 5)")
    add("--steps", type=int, default=4000, help="of each run (default: 4000)")
    text = "folder of the two pictures (default: docs)"
    add("--pictures", type=pathlib.Path, default=DOCS, help=text)
    args = parser.parse_args()
    if not 2 <= args.seeds <= 100:
        parser.error(f"--seeds must be between 2 and 100, got {args.seeds}")
    if not 1 <= args.steps <= 10**6 or args.steps % EVERY:
        rule = f"a multiple of {EVERY} up to 1000000"
        parser.error(f"--steps must be {rule}, got {args.steps}")
    if not args.pictures.is_dir():
        parser.error(f"--pictures must be a folder, got {args.pictures}")
    settings = {"seeds": args.seeds, "steps": args.steps}
    record = report.Record("curves", args.output, packages=PACKAGES, settings=settings)
    results = train_all(args.seeds, args.steps, record)
    pictures.save(draw_runs(results, args.steps), args.pictures / "runs.png")
    pictures.save(draw_choices(results), args.pictures / "choices.png")
    print_tables(results, args.steps)
    return record.close(None, [])


if __name__ == "__main__":
    report.interruptible(main)
