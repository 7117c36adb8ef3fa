"""Chooses the reversal strength of a DANN without a single target label.

Every scale of a grid, with every seed, is trained in one vmapped, jitted program: the
scale is data, so it can be mapped like any other array. InfoMax judges each run from
its target predictions: are they certain, and are all the classes used? Among the scales
that are not clearly worse than the best one, the rule (support/choice.py) takes the
scale nearest to 1.

    python examples/choose_scale.py

It prints the grid with its chosen row, and saves every number and a picture in a new
folder under runs/. The picture shows the true target accuracy too, which the choice
does not use.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from dann_digits import make_data, make_model, make_training
from flax import nnx
from support.choice import nearest_to_one
from support.pictures import draw_choice
from support.run import RULES, Run, make_parser, parse

import jaxgrl

SCALES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)


# 1. One run, trained like those of dann_digits.py and judged without target labels.
def run_one(scale, key, data, steps):
    """Returns InfoMax and the true target accuracy of one run."""
    rate = jaxgrl.dann_learning_rate(0.01, transition_steps=steps)
    optimizer = optax.sgd(rate, momentum=0.9)
    init, train_step, evaluate = make_training(make_model, optimizer, steps)

    def step(state, index):
        return train_step(state, index, data, key, scale)

    state, _ = jax.lax.scan(step, init(key), jnp.arange(steps))
    model = nnx.merge(nnx.graphdef(make_model(nnx.Rngs(0))), state[0])
    finite = jnp.all(jnp.isfinite(model(data["test"]).label_logits))
    accuracy = evaluate(state, data)["target_accuracy"]
    return {
        "InfoMax": jaxgrl.information_maximization(model(data["target"]).label_logits),
        "target accuracy": jnp.where(finite, accuracy, jnp.nan),
    }


def print_grid(scales, grid, chosen):
    """Prints a row for each scale, and what the chosen one loses."""
    scores, truth = grid["InfoMax"], 100 * grid["target accuracy"]
    print(f"{'scale':>8}{'InfoMax':>10}{'target accuracy [%]':>23}  (not used)")
    for i, scale in enumerate(scales):
        mark = " <- chosen" if i == chosen else ""
        broken = int(np.sum(~np.isfinite(scores[i])))
        mark += f" diverged: {broken} of {len(scores[i])} runs" if broken else ""
        accuracy = f"{truth[i].mean():.1f} ± {truth[i].std(ddof=1):3.1f}"
        print(f"{scale:8g}{scores[i].mean():10.3f}{accuracy:>23}{mark}")
    means = truth.mean(axis=1)
    lost = np.nanmax(means) - means[chosen]
    print(f"best fixed scale: {scales[np.nanargmax(means)]:g}")
    print(f"the rule chooses {scales[chosen]:g}, and loses {lost:.1f} points")


def main():
    """Trains the grid in one program, chooses, saves and shows it."""
    parser = make_parser(__doc__, angle=35.0, seeds=5, steps=4000)
    parser.add_argument(
        "--scales", type=float, nargs="+", default=SCALES, help="the grid"
    )
    holds, rule = RULES["scale"]
    args = parse(
        parser,
        seeds=(lambda v: 2 <= v <= 1000, "between 2 and 1000"),
        scales=(lambda v: all(map(holds, v)), rule),
    )
    splits = [make_data(args.angle, seed) for seed in range(args.seeds)]
    data = jax.tree.map(lambda *arrays: jnp.stack(arrays), *splits)
    keys = jax.vmap(jax.random.key)(jnp.arange(args.seeds))

    def one(scale, key, data):
        return run_one(scale, key, data, args.steps)

    # Over the scales outside, over the seeds inside.
    every = jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)), in_axes=(0, None, None))
    layout = "grid[number][scale][seed]"
    with Run("choose_scale", args, layout=layout) as run:
        grid = jax.jit(every)(jnp.array(args.scales, jnp.float32), keys, data)
        grid = {name: np.asarray(values) for name, values in grid.items()}
        run.results["grid"] = {k: v.tolist() for k, v in grid.items()}
        try:
            chosen = nearest_to_one(args.scales, grid["InfoMax"])
        except ValueError as error:
            sys.exit(f"No scale can be chosen: {error}")
        run.results["chosen"] = args.scales[chosen]
    print_grid(args.scales, grid, chosen)
    if not args.no_plot:
        draw_choice(run, args.scales, grid, chosen)
    run.print_where()


if __name__ == "__main__":
    main()
