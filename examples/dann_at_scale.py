"""Domain-adversarial training (DANN) of a CNN, from a laptop to a cluster.

The same file runs on one device, on all devices of a host and on many hosts. Without
arguments the source is scikit-learn's digits with labels, the target is other digits,
rotated and without labels.

    python examples/dann_at_scale.py                          # digits, this host
    python examples/dann_at_scale.py --data PATH              # your images
    python examples/dann_at_scale.py --resume RUN             # after a kill
    python examples/dann_at_scale.py --output RUN --num-processes 2 --process-id 0 \
        --coordinator HOST:PORT                               # and again with 1

PATH is a folder with source/CLASS/*.png and target/*.png, or a NumPy archive (.npz) of
source, source_labels and target that fits in memory. RUN gets the configuration, the
checkpoints and metrics.jsonl, an object for each step. All hosts must share both.

The global batch determines the result, whatever the number of devices. A run that was
killed and resumed is bit-identical to one that was not. On a GPU this needs
XLA_FLAGS=--xla_gpu_deterministic_ops=true. SIGTERM saves a checkpoint and exits with
status 75, and `--output RUN --resume RUN` starts or resumes, for a scheduler.
"""

import functools
import json
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support.domains import read_domains
from support.scale import Folder, Metrics, connect, read_options, run_to_end, sha256
from tqdm import tqdm

import jaxgrl
from jaxgrl.nnx import DANN


# 1. The model. Without BatchNorm, which would couple the devices in every layer.
def convolve(conv, x):
    """Returns the features of one block, [batch, n / 2, n / 2, channels]."""
    return nnx.relu(conv(x))


class Block(nnx.Module):
    """A convolution with stride 2 and relu; with remat it is recomputed backward."""

    def __init__(self, inputs, outputs, dtype, remat, rngs):
        he, rest = nnx.initializers.he_normal(), {"dtype": dtype, "rngs": rngs}
        self.conv = nnx.Conv(inputs, outputs, (3, 3), (2, 2), kernel_init=he, **rest)
        # The module is an argument: what a closure hides from jax.checkpoint gets no
        # gradient.
        self.apply = nnx.remat(convolve) if remat else convolve

    def __call__(self, x):
        """Maps [batch, n, n, inputs] to [batch, n / 2, n / 2, outputs]."""
        return self.apply(self.conv, x)


def make_model(channels, classes, dtype, remat, rngs):
    """Returns a DANN for images of any size."""
    linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
    sizes = (channels, 32), (32, 64), (64, 128)
    blocks = [Block(*size, dtype, remat, rngs) for size in sizes]
    dropout = nnx.Dropout(0.1, rngs=rngs)
    return DANN(
        feature_extractor=nnx.Sequential(*blocks, lambda x: x.mean(axis=(1, 2))),
        label_classifier=nnx.Sequential(
            linear(128, 128), nnx.relu, dropout, linear(128, classes)
        ),
        domain_discriminator=nnx.Sequential(linear(128, 128), nnx.relu, linear(128, 1)),
    )


# 2. The loss. Images are [n, 2, ...]: source and target of a pair are on one device,
#    so that neither the reshape nor the selection of the source moves them.
def loss_fn(model, batch, scale):
    """Returns the loss and its parts for a batch of pairs."""
    images = batch["images"]
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    n = len(images)
    domains = jnp.array([[0, 1]])  # of every pair: source 0, target 1
    label_logits, domain_logits = model(images.reshape(2 * n, *images.shape[2:]), scale)
    source_logits = label_logits.reshape(n, 2, -1)[:, 0]
    wide = jnp.promote_types(source_logits.dtype, jnp.float32)
    domain_logits = domain_logits.reshape(n, 2)
    label_loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        source_logits.astype(wide), batch["labels"]
    ).mean()
    domain_loss = jaxgrl.domain_loss(domain_logits, domains)
    metrics = {
        "loss": label_loss + domain_loss,
        "label_loss": label_loss,
        "domain_loss": domain_loss,
        "domain_accuracy": jaxgrl.domain_accuracy(domain_logits, domains),
    }
    return metrics["loss"], metrics


# 3. The training step, a pure function of the whole state and a batch, and where its
#    arrays are: the state on every device, a pair of the batch on one of them.
def make_training(args, shape, classes, devices):
    """Returns the abstract state, a function that creates it, a step, a sharding."""
    schedule = jaxgrl.dann_schedule(args.steps, end_value=args.scale)
    rate = jaxgrl.dann_learning_rate(0.01, transition_steps=args.steps)
    mesh = Mesh(np.array(devices), ("data",))
    replicated, by_pair = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def create():
        rngs = nnx.Rngs(args.seed)
        model = make_model(shape[-1], classes, args.dtype, args.remat, rngs)
        return model, nnx.Optimizer(model, optax.sgd(rate, momentum=0.9), wrt=nnx.Param)

    graphdef, abstract = nnx.split(nnx.eval_shape(create))
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated), abstract
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated)
    def train_step(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        scale = schedule(optimizer.step[...])  # no counter of our own: it is restored
        grads, metrics = nnx.grad(loss_fn, has_aux=True)(model, batch, scale)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), metrics

    init = jax.jit(lambda: nnx.state(create()), out_shardings=replicated)
    return abstract, init, train_step, by_pair


# 4. The input. The order is one of pairs, for all processes; each reads its rows of
#    every global batch. Source and target start anew, shuffled, when they are through.
def make_input(domains, batch_size, seed, process, processes):
    """Returns an iterator over this process's part of the batches, 16 ahead."""

    def endless(examples, seed):
        return grain.MapDataset.range(len(examples)).shuffle(seed=seed).repeat()

    def load(indices):
        images, labels = domains.source[indices[0]]
        pairs = np.stack([images, domains.target[indices[1]]], axis=1)
        return {"images": pairs, "labels": labels}

    seeds = np.random.SeedSequence(seed).generate_state(2).tolist()
    pairs = grain.experimental.ZipMapDataset(
        [endless(domains.source, seeds[0]), endless(domains.target, seeds[1])]
    )
    # Batched, then sliced: process p has the rows that follow those of p - 1.
    batches = pairs.batch(batch_size // processes)[process::processes].map(load)
    return iter(batches.to_iter_dataset(grain.ReadOptions(prefetch_buffer_size=16)))


# 5. The checkpoints: numbered, written beside the training and in one move. The digest
#    finds a flipped byte, which no format of arrays does.
def save(manager, step, state, batches, configuration):
    """Starts to save everything that the next step depends on."""
    facts = {"configuration": configuration, "input": batches.get_state()}
    digest = sha256(state, json.dumps(facts, sort_keys=True))
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            facts=ocp.args.JsonSave(facts | {"sha256": digest}),
        ),
    )


def restore(manager, step, like, batches, folder, refuse):
    """Returns the state of a step, and moves the input to its position."""
    parts = {"state": ocp.args.StandardRestore(like), "facts": ocp.args.JsonRestore()}
    try:
        found = manager.restore(step, args=ocp.args.Composite(**parts))
        state, facts = found.state, found.facts
        digest = facts.pop("sha256")
        if digest != sha256(state, json.dumps(facts, sort_keys=True)):
            raise ValueError("other content than was saved")
    except Exception as error:
        path, got = folder.checkpoints / str(step), str(error)[:200]
        sys.exit(
            f"{path} must be a whole checkpoint, got {type(error).__name__}: {got}\n"
            "If the model is another now, that is why. If the checkpoint is damaged, "
            "move it elsewhere to go on from the one before."
        )
    folder.compare(facts["configuration"], refuse)
    batches.set_state(facts["input"])
    return state


def main():
    """Trains, or goes on training, and prints the digest of the final state."""
    args = read_options(__doc__)
    domains = read_domains(args.data, args.refuse)
    connect(args)
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    if args.batch_size % len(devices):
        rule = f"a multiple of the {len(devices)} devices"
        args.refuse(f"--batch-size must be {rule}, got {args.batch_size}")
    abstract, init, train_step, by_pair = make_training(
        args, domains.shape, domains.classes, devices
    )
    process, processes = jax.process_index(), jax.process_count()
    batches = make_input(domains, args.batch_size, args.seed, process, processes)
    put = functools.partial(jax.make_array_from_process_local_data, by_pair)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(3),
        cleanup_tmp_directories=True,
    )
    with (
        Folder(args, domains.fingerprint) as folder,
        ocp.CheckpointManager(folder.checkpoints, options=options) as manager,
    ):
        step = manager.latest_step() or 0
        folder.agree("newest checkpoint", step)
        if process == 0:
            counts = f"devices: {len(devices)}, processes: {processes}"
            print(f"Training from step {step + 1}, {counts}", file=sys.stderr)
        if step:
            state = restore(manager, step, abstract, batches, folder, args.refuse)
        else:
            state = init()
        todo = range(step + 1, args.steps + 1)
        bar = tqdm(todo, initial=step, total=args.steps, disable=process > 0 or None)
        with Metrics(folder, step) as metrics:
            for step in bar:
                state, found = train_step(state, jax.tree.map(put, next(batches)))
                metrics.add(step, found)
                stop = folder.must_stop(step)
                if stop or step % args.checkpoint_every == 0 or step == args.steps:
                    metrics.sync()  # first: a checkpoint must not be ahead of them
                    save(manager, step, state, batches, folder.configuration)
                if stop:
                    break
        manager.wait_until_finished()
    if step < args.steps:
        folder.exit_saved(step)
    if process == 0:
        print(f"Saved in {folder.path}")
        print(f"sha256 of the final state: {sha256(state)}")


if __name__ == "__main__":
    run_to_end(main)
