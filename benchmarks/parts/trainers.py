"""The same DANN, trained by everything that a user could pick.

Each trainer is a function that takes a task and returns a ``Trainer``. All start from
the same parameters, see the same minibatches in the same order (``skada`` alone draws
its own) and return their parameters in one layout, ``[layer]["kernel" or "bias"]`` with
kernels ``[in, out]``, so that one NumPy function scores them all.

The minibatches are indices that are drawn beforehand: random numbers cost nobody
anything, and the data lie on the device. The clock runs from initial to final
parameters.

Each process also times the matrix products of a step alone, of the same shapes and by
the same library. That is how fast a step could be, whatever wraps the products.
"""

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from parts.digits import SOURCE, rotated_digits

Params = dict[str, dict[str, Any]]
Job = tuple[int, float]  # seed, and the scale that the reversal rises to
BATCH = 64  # examples from each domain
CHUNK = 100  # steps in one compiled call
LEARNING_RATE, MOMENTUM = 0.01, 0.9
KINDS = ("kernel", "bias")
TRIAL = 150  # steps in a trial of PyTorch's settings
SGD = ("foreach", "fused")  # its implementations in PyTorch


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: a DANN 64-hidden-10 with a discriminator hidden-hidden-1."""

    hidden: int
    steps: int
    device: str

    def layers(self) -> dict[str, tuple[int, int]]:
        """Returns the inputs and outputs of each layer."""
        h = self.hidden
        discriminator = {"hidden": (h, h), "discriminator": (h, 1)}
        return {"features": (64, h), "classifier": (h, 10), **discriminator}

    def initial(self, seed: int) -> Params:
        """Returns the parameters of a seed: LeCun's normal kernels, biases of zero."""
        rng = np.random.default_rng((seed, 0))
        return {
            name: {
                "kernel": rng.normal(0, i**-0.5, (i, o)).astype(np.float32),
                "bias": np.zeros(o, np.float32),
            }
            for name, (i, o) in self.layers().items()
        }

    def batches(self, seed: int) -> np.ndarray:
        """Returns the indices [steps, 2 * BATCH] into the inputs: source, target."""
        rng = np.random.default_rng((seed, 1))
        indices = rng.integers(0, SOURCE, (self.steps, 2 * BATCH), np.int32)
        indices[:, BATCH:] += SOURCE
        return indices


@dataclasses.dataclass
class Trainer:
    """A way to train, ready to run.

    Attributes:
      run: Trains every job and returns the seconds of training, the seconds of
        compiling that came with them, and the final parameters of each.
      parameters: The number of parameters, as the framework counts them.
      compiling: The seconds that compiling took before the first job.
      settings: What was chosen, in words.
      tuning: The seconds of the trials that chose it.
      plain: Returns the seconds that the products of a step take alone.
    """

    run: Callable[[Sequence[Job]], tuple[float, float, list[Params]]]
    parameters: int
    compiling: float = 0.0
    settings: str = ""
    tuning: float = 0.0
    plain: Callable[[], float] | None = None


def one_by_one(
    prepare: Callable[[int, float], Any],
    train: Callable[[Any], Any],
    finish: Callable[[Any], Params],
) -> Callable[[Sequence[Job]], tuple[float, float, list[Params]]]:
    """Returns Trainer.run; only ``train`` is timed, and has to wait for its result."""

    def run(jobs):
        seconds, finals = 0.0, []
        for job in jobs:
            state = prepare(*job)
            start = time.perf_counter()
            state = train(state)
            seconds += time.perf_counter() - start
            finals.append(finish(state))
        return seconds, 0.0, finals

    return run


def clock(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


@functools.cache
def digits() -> dict[str, Any]:
    """Returns the inputs, source first, the source's labels, and the test."""
    split = rotated_digits(25.0, 0)
    inputs = np.concatenate([split["source"], split["target"]])
    test = {name: split[name] for name in ("test", "test_labels")}
    return {"inputs": inputs, "labels": split["source_labels"], **test}


def accuracy(params: Params) -> float:
    """Returns the accuracy on rotated digits that no training has seen, in percent."""
    data, first, last = digits(), params["features"], params["classifier"]
    features = np.maximum(data["test"] @ first["kernel"] + first["bias"], 0)
    logits = features @ last["kernel"] + last["bias"]
    return 100 * float(np.mean(logits.argmax(1) == data["test_labels"]))


def flat(params: Params) -> np.ndarray:
    """Returns all parameters as one vector."""
    return np.concatenate([params[n][k].ravel() for n in sorted(params) for k in KINDS])


def products(features: Any, kernels: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Returns the next features, and the gradients, of a step that only multiplies.

    It has the products of a training step and nothing between them, of NumPy's arrays,
    of JAX's and of PyTorch's. Each takes what the last returned, so that no compiler
    can move one out of a loop.
    """
    hidden = features @ kernels["hidden"]
    domain = hidden @ kernels["discriminator"]
    grads = [features.T @ hidden, hidden.T @ domain]
    grads += [domain @ kernels["discriminator"].T]
    ct = hidden @ kernels["hidden"].T
    inputs = ct[:, : len(kernels["features"])]
    features = inputs @ kernels["features"]
    source = features[:BATCH]
    labels = source @ kernels["classifier"]
    grads += [inputs.T @ ct, source.T @ labels, labels @ kernels["classifier"].T]
    return features, grads


def operands(task: Task) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns features and kernels for ``products`` that neither grow nor vanish."""
    kernels = {name: layer["kernel"] for name, layer in task.initial(0).items()}
    kernels["hidden"] = np.linalg.qr(kernels["hidden"])[0]
    rng = np.random.default_rng(0)
    return rng.normal(size=(2 * BATCH, task.hidden)).astype(np.float32), kernels


# JAX. A loss is a function of (params, x, labels, scale), and the rest is the same.
def nnx_model(task: Task) -> Any:
    """Returns the model in Flax NNX."""
    import jax
    from flax import nnx

    from jaxgrl.nnx import GradientReversal

    class DANN(nnx.Module):
        def __init__(self, rngs):
            for name, (inputs, outputs) in task.layers().items():
                setattr(self, name, nnx.Linear(inputs, outputs, rngs=rngs))
            self.reversal = GradientReversal()

        def __call__(self: Any, x, scale):
            features = jax.nn.relu(self.features(x))
            hidden = jax.nn.relu(self.hidden(self.reversal(features, scale)))
            return self.classifier(features[:BATCH]), self.discriminator(hidden)

    return DANN(nnx.Rngs(0))


def dann_loss(outputs: Any, labels: Any) -> Any:
    """Returns the loss from the logits of both heads."""
    import jax.numpy as jnp
    import optax

    import jaxgrl

    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    domains = jnp.arange(2 * BATCH) >= BATCH
    label_logits, domain_logits = outputs
    domain_loss = jaxgrl.domain_loss(domain_logits, domains)
    return cross_entropy(label_logits, labels).mean() + domain_loss


def nnx_loss(task: Task) -> Callable[..., Any]:
    """Returns the loss of the model in Flax NNX."""
    from flax import nnx

    graphdef = nnx.graphdef(nnx_model(task))

    def loss(params, x, labels, scale):
        return dann_loss(nnx.merge(graphdef, params)(x, scale), labels)

    return loss


def linen_loss(task: Task) -> Callable[..., Any]:
    """Returns the loss of the model in Flax Linen."""
    from flax import linen as nn

    from jaxgrl.linen import GradientReversal

    class DANN(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            layers = {n: nn.Dense(o, name=n) for n, (_, o) in task.layers().items()}
            features = nn.relu(layers["features"](x))
            reversed_features = GradientReversal()(features, scale)
            hidden = nn.relu(layers["hidden"](reversed_features))
            label_logits = layers["classifier"](features[:BATCH])
            return label_logits, layers["discriminator"](hidden)

    def loss(params, x, labels, scale):
        return dann_loss(DANN().apply({"params": params}, x, scale), labels)

    return loss


def hand_loss(task: Task) -> Callable[..., Any]:
    """Returns the loss of the model in JAX alone, the reversal by five lines."""
    del task
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def reverse(x, scale):
        del scale
        return x

    reverse.defvjp(lambda x, scale: (x, scale), lambda scale, g: (-scale * g, None))

    def loss(params, x, labels, scale):
        def dense(name, x):
            return x @ params[name]["kernel"] + params[name]["bias"]

        features = jax.nn.relu(dense("features", x))
        hidden = jax.nn.relu(dense("hidden", reverse(features, scale)))
        log_probabilities = jax.nn.log_softmax(dense("classifier", features[:BATCH]))
        label_loss = -log_probabilities[jnp.arange(BATCH), labels].mean()
        z = dense("discriminator", hidden)[:, 0] * jnp.repeat(jnp.array([1, -1]), BATCH)
        return label_loss + jax.nn.softplus(z).mean()

    return loss


def jax_products(task: Task) -> Callable[[], float]:
    """Returns Trainer.plain."""
    import jax

    @jax.jit
    def chunk(features, kernels):
        # The gradients are carried along, or XLA would not compute them.
        def step(state, _):
            return products(state[0], kernels), None

        start = (
            features,
            jax.tree.map(jax.numpy.zeros_like, products(features, kernels)[1]),
        )
        return jax.lax.scan(step, start, length=CHUNK)[0]

    arguments = jax.device_put(operands(task))
    jax.block_until_ready(chunk(*arguments))  # compiles
    return lambda: clock(lambda: jax.block_until_ready(chunk(*arguments))) / CHUNK


def make_scan(task: Task, loss: Callable[..., Any]) -> tuple[Any, Any]:
    """Returns init(params), and steps(state, peak, start, batches): one lax.scan."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxgrl

    rates = jaxgrl.dann_learning_rate(LEARNING_RATE, transition_steps=task.steps)
    optimizer = optax.sgd(rates, momentum=MOMENTUM)
    inputs, labels = jnp.array(digits()["inputs"]), jnp.array(digits()["labels"])

    def init(params):
        return params, optimizer.init(params)

    def steps(state, peak, start, batches):
        schedule = jaxgrl.dann_schedule(task.steps, end_value=peak)

        def step(state, now):
            (params, opt_state), (index, batch) = state, now
            arguments = inputs[batch], labels[batch[:BATCH]], schedule(index)
            grads = jax.grad(loss)(params, *arguments)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        indices = start + jnp.arange(len(batches))
        return jax.lax.scan(step, state, (indices, batches))[0]

    return init, steps


def scanned(
    make_loss: Callable[[Task], Any], task: Task, static: float | None = None
) -> Trainer:
    """Trains chunk by chunk; a static scale is a constant of the program."""
    import jax

    init, steps = make_scan(task, make_loss(task))

    def chunk(state, peak, start, batches):
        return steps(state, peak if static is None else static, start, batches)

    def prepare(seed, peak):
        chunks = np.split(task.batches(seed), task.steps // CHUNK)
        state = jax.tree.map(jax.numpy.array, init(task.initial(seed)))
        return jax.block_until_ready((state, peak, jax.device_put(chunks)))

    state, peak, chunks = prepare(0, 1.0)
    start = time.perf_counter()
    jitted = jax.jit(chunk, donate_argnums=0)
    program = jitted.lower(state, peak, 0, chunks[0]).compile()
    compiling = time.perf_counter() - start

    def train(given):
        state, peak, chunks = given
        for i, batches in enumerate(chunks):
            state = program(state, peak, i * CHUNK, batches)
        return jax.block_until_ready(state)

    run = one_by_one(prepare, train, lambda s: jax.tree.map(np.asarray, s[0]))
    parameters = sum(x.size for x in jax.tree.leaves(state[0]))
    return Trainer(run, parameters, compiling, plain=jax_products(task))


def recompiled(task: Task) -> Trainer:
    """Trains one after another and compiles for every scale, which is static."""

    def run(jobs):
        seconds, compiling, finals = 0.0, 0.0, []
        for peak in dict.fromkeys(peak for _, peak in jobs):
            trainer = scanned(nnx_loss, task, peak)
            more, _, final = trainer.run([job for job in jobs if job[1] == peak])
            seconds, compiling = seconds + more, compiling + trainer.compiling
            finals += final
        return seconds, compiling, finals

    return Trainer(run, 0)


def one_program(spread: bool, jobs: Sequence[Job], task: Task) -> Trainer:
    """Trains all jobs in one compiled program: vmap, or one by one on each device."""
    import jax

    if spread and task.device == "cpu":
        jax.config.update("jax_num_cpu_devices", os.cpu_count())  # a device a core
    init, steps = make_scan(task, nnx_loss(task))
    count = max(n for n in range(1, jax.device_count() + 1) if len(jobs) % n == 0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("runs",))
    runs = jax.sharding.PartitionSpec("runs")

    def train(job):
        params, peak, batches = job
        return steps(init(params), peak, 0, batches)[0]

    def train_in_turn(stack):
        return jax.lax.map(train, stack)

    program = jax.vmap(train)
    if spread:
        program = jax.shard_map(train_in_turn, mesh=mesh, in_specs=runs, out_specs=runs)

    def stacked(jobs):
        seeds, peaks = zip(*jobs, strict=True)
        initial = jax.tree.map(lambda *a: np.stack(a), *map(task.initial, seeds))
        batches = np.stack([task.batches(seed) for seed in seeds])
        arguments = initial, np.array(peaks, np.float32), batches
        where = jax.sharding.NamedSharding(mesh, runs) if spread else jax.devices()[0]
        return jax.block_until_ready(jax.device_put(arguments, where))

    arguments = stacked(jobs)
    start = time.perf_counter()
    compiled = jax.jit(program).lower(arguments).compile()
    compiling = time.perf_counter() - start

    def run(jobs):
        arguments = stacked(jobs)
        start = time.perf_counter()
        final = jax.block_until_ready(compiled(arguments))
        seconds = time.perf_counter() - start
        final = jax.tree.map(np.asarray, final)
        each = [jax.tree.map(lambda x, i=i: x[i], final) for i in range(len(jobs))]
        return seconds, 0.0, each

    settings = f"{count} devices" if spread else ""
    return Trainer(run, 0, compiling, settings)


def looped(cached: bool, task: Task) -> Trainer:
    """Trains by one jitted step, called in a Python loop: what one writes at first."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import jaxgrl

    rates = jaxgrl.dann_learning_rate(LEARNING_RATE, transition_steps=task.steps)
    optimizer = optax.sgd(rates, momentum=MOMENTUM)
    inputs, labels = jnp.array(digits()["inputs"]), jnp.array(digits()["labels"])

    template = nnx_model(task)

    @nnx.jit
    def step(model, optimizer, batch, index, peak):
        scale = jaxgrl.dann_schedule(task.steps, end_value=peak)(index)

        def loss(model):
            return dann_loss(model(inputs[batch], scale), labels[batch[:BATCH]])

        optimizer.update(model, nnx.grad(loss)(model))

    def prepare(seed, peak, steps=task.steps):
        # A clone: a class of its own for each seed would be compiled anew.
        model = nnx.clone(template)
        nnx.update(model, jax.tree.map(jnp.array, task.initial(seed)))
        batches = list(jnp.array(task.batches(seed)[:steps]))
        state = model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        jax.block_until_ready((nnx.state(state), batches))
        call = (nnx.cached_partial if cached else functools.partial)(step, *state)
        return model, call, peak, batches

    def train(given):
        model, call, peak, batches = given
        for i, batch in enumerate(batches):
            call(batch, i, peak)
        return jax.block_until_ready(nnx.to_pure_dict(nnx.state(model)))

    first = prepare(0, 1.0, 1)
    compiling = clock(train, first)
    run = one_by_one(prepare, train, lambda p: jax.tree.map(np.asarray, p))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(first[0])))
    return Trainer(run, parameters, compiling, plain=jax_products(task))


# PyTorch.
def torch_device(task: Task) -> Any:
    """Returns the device of the task."""
    torch: Any = importlib.import_module("torch")
    if task.device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU")
    return torch.device("cuda" if task.device == "gpu" else "cpu")


def torch_products(task: Task) -> Callable[[], float]:
    """Returns Trainer.plain."""
    torch: Any = importlib.import_module("torch")
    device = torch_device(task)
    first, kernels = operands(task)
    first = torch.tensor(first, device=device)
    kernels = {name: torch.tensor(k, device=device) for name, k in kernels.items()}

    def chunk():
        features = first
        for _ in range(CHUNK):
            features, _ = products(features, kernels)
        synchronize(device)

    return lambda: clock(chunk) / CHUNK


def constant_reversal() -> Callable[..., Any]:
    """Returns torch-gradient-reversal's layer of strength 1.

    Its strength is a Python float, which torch.compile makes a constant of the program:
    each value of a schedule is compiled anew, and from the eighth on fullgraph=True is
    an error.
    """
    reverse: Any = importlib.import_module("gradient_reversal").gradient_reversal
    # PyTorch warns at each compilation that the operator returns an alias of its input.
    warnings.filterwarnings("ignore", message="gradient_reversal::grl")
    return lambda x, scale: reverse(x, 1.0)


def scheduled_reversal() -> Callable[..., Any]:
    """Returns pytorch-revgrad's layer, whose strength is a tensor."""
    return importlib.import_module("pytorch_revgrad.functional").revgrad


def torch_dann(
    task: Task, reverse: Callable[..., Any]
) -> tuple[Any, Callable[..., Any]]:
    """Returns the model in PyTorch, and loss(model, batch, scale)."""
    torch: Any = importlib.import_module("torch")
    functional, device = torch.nn.functional, torch_device(task)
    inputs = torch.tensor(digits()["inputs"], device=device)
    labels = torch.tensor(digits()["labels"], device=device).long()
    domains = torch.arange(2 * BATCH, device=device)[:, None].ge(BATCH).float()
    cross_entropy = functional.cross_entropy
    binary_cross_entropy = functional.binary_cross_entropy_with_logits

    class DANN(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, shape in task.layers().items():
                setattr(self, name, torch.nn.Linear(*shape))

        def forward(self: Any, x, scale):
            features = functional.relu(self.features(x))
            hidden = functional.relu(self.hidden(reverse(features, scale)))
            return self.classifier(features[:BATCH]), self.discriminator(hidden)

    def loss(model, batch, scale):
        label_logits, domain_logits = model(inputs[batch], scale)
        label_loss = cross_entropy(label_logits, labels[batch[:BATCH]])
        return label_loss + binary_cross_entropy(domain_logits, domains)

    return DANN().to(device), loss


def pytorch(
    make_reversal: Callable[[], Callable[..., Any]],
    compiled: bool,
    threads: Sequence[int],
    task: Task,
) -> Trainer:
    """Trains by a loop over steps, with the settings that a trial finds fastest."""
    torch: Any = importlib.import_module("torch")
    device = torch_device(task)
    model, eager_loss = torch_dann(task, make_reversal())
    rates, scales = torch_schedules(task)
    loss, setting = eager_loss, "fused"

    def prepare(seed, peak, steps=task.steps):
        for name, values in task.initial(seed).items():
            put(getattr(model, name), values)
        options = {"lr": LEARNING_RATE, "momentum": MOMENTUM, setting: True}
        optimizer = torch.optim.SGD(model.parameters(), **options)
        batches = torch.tensor(task.batches(seed)[:steps], device=device).unbind()
        lambdas = torch.tensor(peak * scales[:steps], device=device).float().unbind()
        synchronize(device)
        return optimizer, list(zip(batches, lambdas, rates[:steps], strict=True))

    def train(given):
        optimizer, steps = given
        (group,) = optimizer.param_groups
        for batch, scale, rate in steps:
            group["lr"] = rate
            loss(model, batch, scale).backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)

    def set_threads(number):
        nonlocal loss
        torch.set_num_threads(number)
        if compiled:
            torch.compiler.reset()
            loss = torch.compile(eager_loss, fullgraph=True)
            train(prepare(0, 1.0, 1))

    def trial(choice, steps):
        nonlocal setting
        number, setting = choice
        if torch.get_num_threads() != number:
            set_threads(number)
        return clock(train, prepare(0, 1.0, steps))

    # The first compilation is the one that counts: nothing is cached yet.
    compiling = clock(set_threads, threads[0]) if compiled else 0.0
    torch.set_num_threads(threads[0])
    start = time.perf_counter()
    number, setting = fastest(list(itertools.product(threads, SGD)), trial)
    if torch.get_num_threads() != number:
        set_threads(number)
    tuning = time.perf_counter() - start

    def finish(state):
        del state
        return {name: get(getattr(model, name)) for name in task.layers()}

    run = one_by_one(prepare, train, finish)
    parameters = sum(p.numel() for p in model.parameters())
    settings = f"{number} threads, {setting}"
    if make_reversal is constant_reversal:
        settings += ", strength 1 from the first step"
    plain = torch_products(task)
    return Trainer(run, parameters, compiling, settings, tuning, plain)


def fastest(choices: Sequence[Any], seconds: Callable[[Any, int], float]) -> Any:
    """Returns the choice with the smallest seconds(choice, steps)."""
    # Threads that wait for one another on a busy machine can take minutes: a first
    # look drops such choices.
    first = {choice: seconds(choice, TRIAL // 5) for choice in choices}
    kept = [choice for choice in choices if first[choice] < 2 * min(first.values())]
    # From the last one back and each at a stretch: another number of threads is another
    # compilation.
    times = {
        choice: [seconds(choice, TRIAL) for _ in range(3)] for choice in reversed(kept)
    }
    return min(times, key=lambda choice: statistics.median(times[choice]))


def torch_schedules(task: Task) -> tuple[list[float], np.ndarray]:
    """Returns learning rates and scales of every step, computed beforehand."""
    p = np.arange(task.steps) / task.steps
    return list(LEARNING_RATE / (1 + 10 * p) ** 0.75), np.tanh(5 * p)


def put(linear: Any, values: dict[str, np.ndarray]) -> None:
    """Fills a torch.nn.Linear."""
    torch: Any = importlib.import_module("torch")
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(values["kernel"].T))
        linear.bias.copy_(torch.tensor(values["bias"]))


def get(linear: Any) -> dict[str, np.ndarray]:
    """Returns what a torch.nn.Linear holds."""
    weight, bias = (p.detach().cpu().numpy() for p in (linear.weight, linear.bias))
    return {"kernel": weight.T.copy(), "bias": bias.copy()}


def synchronize(device: Any) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        importlib.import_module("torch").cuda.synchronize()


def skada_modules(task: Task) -> tuple[Any, Any]:
    """Returns the base module and the domain classifier, as skada wants them."""
    torch: Any = importlib.import_module("torch")
    reverse = importlib.import_module("skada.deep.modules").GradientReversalLayer.apply
    nn, layers = torch.nn, task.layers()

    class Base(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Linear(*layers["features"]), nn.ReLU())
            self.classifier = nn.Linear(*layers["classifier"])

        def forward(self, x, sample_weight=None):
            del sample_weight
            return self.classifier(self.features(x))

    class Discriminator(nn.Module):
        alpha = 0.0

        def __init__(self):
            super().__init__()
            self.hidden = nn.Linear(*layers["hidden"])
            self.discriminator = nn.Linear(*layers["discriminator"])

        def forward(self, features):
            hidden = torch.relu(self.hidden(reverse(features, self.alpha)))
            return self.discriminator(hidden)[:, 0]

    return Base(), Discriminator()


def skada(threads: Sequence[int], task: Task) -> Trainer:
    """Trains by skada's DANN, with its own loader and loop, which skorch provides."""
    torch: Any = importlib.import_module("torch")
    callbacks: Any = importlib.import_module("skorch.callbacks")
    deep: Any = importlib.import_module("skada.deep")
    rates, scales = torch_schedules(task)
    labels = np.concatenate([digits()["labels"], np.full(SOURCE, -1)])
    domains = np.repeat([1, -2], SOURCE)  # skada's sign for a target is minus

    class Schedules(callbacks.Callback):
        def __init__(self, peak):
            self.peak, self.step = peak, 0

        def on_batch_begin(self, net, training=False, **kwargs):
            net.module_.domain_classifier_.alpha = self.peak * scales[self.step]
            net.optimizer_.param_groups[0]["lr"] = rates[self.step]
            self.step += 1

    def prepare(seed, peak, steps=task.steps):
        torch.manual_seed(seed)
        base, domain_classifier = skada_modules(task)
        net = deep.DANN(
            base,
            layer_name="features",
            domain_classifier=domain_classifier,
            reg=0.5,  # its domain loss is the sum over domains, twice the mean
            domain_criterion=torch.nn.BCEWithLogitsLoss(),
            batch_size=BATCH,
            max_epochs=steps // (SOURCE // BATCH),
            train_split=None,
            optimizer=torch.optim.SGD,
            optimizer__momentum=MOMENTUM,
            callbacks=[("schedules", Schedules(peak))],
            warm_start=True,
            verbose=0,
            device=torch_device(task),
        )
        net.initialize()
        for name, values in task.initial(seed).items():
            put(linears(net)[name], values)
        return net

    def linears(net):
        base, domain = net.module_.base_module_, net.module_.domain_classifier_
        own = {"features": base.features[0], "classifier": base.classifier}
        return own | {"hidden": domain.hidden, "discriminator": domain.discriminator}

    def train(net):
        net.fit(X=digits()["inputs"], y=labels, sample_domain=domains)
        synchronize(torch_device(task))
        return net

    def trial(number, steps):
        torch.set_num_threads(number)
        return clock(train, prepare(0, 1.0, steps))

    start = time.perf_counter()
    number = fastest(threads, trial)
    torch.set_num_threads(number)
    tuning = time.perf_counter() - start

    def finish(net):
        return {name: get(linear) for name, linear in linears(net).items()}

    parameters = sum(p.numel() for p in prepare(0, 1.0).module_.parameters())
    run = one_by_one(prepare, train, finish)
    settings, plain = f"{number} threads, its own loop", torch_products(task)
    return Trainer(run, parameters, 0.0, settings, tuning, plain)


def find_gpu() -> tuple[str, str]:
    """Returns the name of the GPU, and what is wrong with it or nothing."""
    import jax

    try:
        name = jax.devices("cuda")[0].device_kind
    except RuntimeError:
        return "", "JAX finds no CUDA GPU"
    if importlib.util.find_spec("torch"):
        torch: Any = importlib.import_module("torch")
        if not torch.cuda.is_available():
            return name, "PyTorch finds no GPU"
    return name, ""


NNX, EAGER, SKADA = "jaxgrl + NNX", "PyTorch eager", "skada"
CONSTANT = "PyTorch compiled, constant scale"
FLAX, TORCH = ("jax", "optax", "flax.nnx", "jaxgrl.nnx"), ("torch", "pytorch_revgrad")
# Each with the modules that it needs, whose memory is not its own.
TRAINERS: dict[str, tuple[tuple[str, ...], Callable[..., Trainer]]] = {
    NNX: (FLAX, functools.partial(scanned, nnx_loss)),
    "jaxgrl + Linen": (
        ("jax", "optax", "flax.linen", "jaxgrl.linen"),
        functools.partial(scanned, linen_loss),
    ),
    "JAX by hand": (("jax", "optax"), functools.partial(scanned, hand_loss)),
    "jaxgrl + NNX, a loop": (FLAX, functools.partial(looped, False)),
    "jaxgrl + NNX, a cached loop": (FLAX, functools.partial(looped, True)),
    EAGER: (TORCH, functools.partial(pytorch, scheduled_reversal, False)),
    "PyTorch compiled": (TORCH, functools.partial(pytorch, scheduled_reversal, True)),
    CONSTANT: (
        ("torch", "gradient_reversal"),
        functools.partial(pytorch, constant_reversal, True),
    ),
    SKADA: (("torch", "skada.deep"), skada),
}
