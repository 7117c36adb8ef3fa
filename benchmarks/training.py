r"""How fast a DANN trains with jaxgrl, compared with what a user could pick instead.

What a step costs depends on what dominates it. Each process also times the matrix
products of a step alone, of the same shapes and by the same library. "Share" is the
time of these products over that of the step. The claims, on an idle machine:

- Where PyTorch eager spends less than a quarter of a step in products (the small
  network on most machines), calling the operations dominates. (Above a third, no
  trainer could be 3 times as fast.) There jaxgrl + NNX trains at least 3 times as fast
  as PyTorch eager with pytorch-revgrad, a sweep over 8 scales x 5 seeds, which a traced
  scale makes one compiled program, takes at most a third of PyTorch eager's 40 runs one
  after another, and no other row is shown to be faster than jaxgrl, with NNX or Linen
  in a lax.scan, by more than 3 %.
- Where the products dominate (the large network), the library that multiplies decides,
  and jaxgrl does not choose it. There jaxgrl + NNX reaches at least half of the rate of
  the plain products, and JAX by hand is not shown to be faster by more than 3 %.

A share and a factor are medians over rounds of the ratio of two times. A claim must
hold at the unfavourable end of the 95 % interval of the median (from 6 rounds on). "Not
shown to be faster" means that the interval is not wholly below 0.97.

The comparison is void unless all have the same number of parameters, the same final
accuracy on the target domain and the same final parameters. The mean accuracy over the
seeds may differ by s sqrt(2 / rounds), with s the standard deviation over seeds: chance
does as much to two independent trainings, and these have the same initial parameters
and minibatches in common. How far the parameters are "apart" is their distance from
those of jaxgrl + NNX, as a share of the way that training took them; the median over
seeds may be 0.1, as the steps amplify rounding. skada draws its own minibatches: it is
allowed 3 times the difference in accuracy, and its parameters are not compared.
"PyTorch compiled, constant scale" is torch-gradient-reversal, whose strength is a
float: under torch.compile a schedule would compile each value anew. It trains with
strength 1 from the first step, so only its time is compared.

A round trains one seed with every row in random order, each in a process of its own,
and times the products. A first round warms up. Compiling, with empty caches, and the
trials that choose PyTorch's threads and kind of SGD are counted apart; "first run" is
compiling and training together. Memory is the peak of the process on the host, and of
that what came on top of its imports. "A loop" is jaxgrl as one writes it at first, one
nnx.jit step called from Python: nnx.jit walks through the model at every call, which
takes longer than a small step does. nnx.cached_partial walks once. Both are shown, and
no part of the claim.

The environment in one command, in a clone (PyTorch and skada are optional: without
them their rows read "not installed"):

    python3 -m venv .venv-training && .venv-training/bin/pip install \
        -e '.[benchmarks]' torch pytorch-revgrad torch-gradient-reversal skada skorch

    .venv-training/bin/python benchmarks/training.py           # about 8 minutes
    .venv-training/bin/python benchmarks/training.py --quick   # a minute; no verdict

Exits with status 1 where the claim does not hold.
"""

import concurrent.futures
import functools
import importlib
import itertools
import multiprocessing
import os
import pathlib
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from parts import report, trainers
from parts.intervals import median_interval
from parts.trainers import CHUNK
from tqdm import tqdm

SIZES = {"small": 100, "middle": 256, "large": 512}
APART = 0.1
TARGET, SHARE, BEHIND = 3.0, 0.5, 0.97
DISPATCH = 0.25  # below this share of products, PyTorch eager is bound by its calls
SCALES = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0)
PACKAGES = (
    *report.PACKAGES,
    *("torch", "pytorch_revgrad", "torch-gradient-reversal", "skada", "skorch"),
)
OURS, BY_HAND = (trainers.NNX, "jaxgrl + Linen"), "JAX by hand"
VMAP, SPREAD = "one program, vmap", "one program, lax.map on each device"
EAGER_SWEEP, CORES = "PyTorch eager, one by one", "PyTorch eager, a process a core"
SWEEP = (VMAP, SPREAD, "jaxgrl, one by one", "static scale, one by one")
SWEEP += (EAGER_SWEEP, CORES)
COLUMNS = {
    "training": (
        *("size", "trainer", "steps/s", "ratio", "interval", "share", "its interval"),
        *(
            "compile s",
            "first run s",
            "accuracy",
            "difference",
            "apart",
            "MiB",
            "over imports",
            "settings",
        ),
    ),
    "sweep": (
        *("size", "trainer", "sweep s", "ratio", "interval", "compile s"),
        *("ratio with compile", "its interval", "accuracy", "settings"),
    ),
}
Row = dict[str, Any]


class Worker:
    """A process that holds one trainer.

    Attributes:
      info: What the trainer says about itself, and ``missing``, a module or None.
    """

    def __init__(self, modules: Sequence[str], make: Callable[..., Any], device: str):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        arguments = end, modules, make, device
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        # Inherited: an interruption is for the parent alone, which ends the others.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        end.close()
        self.info = self.receive()

    def receive(self) -> Row:
        """Waits for the answer."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            sys.exit(f"A worker died with status {self.process.exitcode}")
        if "error" in answer:
            sys.exit(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        if not self.info["missing"]:
            self.pipe.send(None)
        self.process.join()


def serve(
    pipe: Any, modules: Sequence[str], make: Callable[[], trainers.Trainer], device: str
) -> None:
    """Trains what it is asked to, until it is asked for nothing."""
    os.environ["JAX_PLATFORMS"] = "cuda" if device == "gpu" else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the rows share a GPU
    # PyTorch's default. Without it JAX's products on a GPU are of lower precision.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] += f"/{os.getpid()}"  # an empty one
    try:
        try:
            for module in modules:
                importlib.import_module(module)
        except ImportError as error:
            pipe.send({"missing": error.name or str(error)})
            return
        imports = peak_memory()
        made = make()
        functions = ("run", "plain")
        info = {k: v for k, v in vars(made).items() if k not in functions}
        pipe.send(info | {"missing": None})
        while jobs := pipe.recv():
            seconds, compiling, finals = made.run(jobs)
            answer = {
                "seconds": seconds,
                "compiling": compiling,
                "plain": made.plain() if made.plain else 0.0,
                "accuracy": float(np.mean([*map(trainers.accuracy, finals)])),
                "memory": peak_memory(),
                "over imports": peak_memory() - imports,
                "final": trainers.flat(finals[0]),
            }
            pipe.send(answer)
    except Exception:
        pipe.send({"error": traceback.format_exc()})


def peak_memory() -> float:
    """Returns the largest resident memory of this process so far, in MiB, on Linux."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM"))


def compare(times: np.ndarray, reference: np.ndarray) -> Row:
    """Returns the median over rounds of the ratio of two times, and its interval."""
    ratios = times / reference
    bounds = median_interval(ratios.tolist())
    shown = "[{:.2f}, {:.2f}]".format(*bounds) if bounds else "too few rounds"
    return {"ratio": float(np.median(ratios)), "interval": shown, "bounds": bounds}


def measure(
    makers: dict[str, tuple[Sequence[str], Callable[..., Any], int]],
    device: str,
    rounds: Sequence[Sequence[trainers.Job]],
    rng: random.Random,
    bar: Any,
) -> dict[str, tuple[Row, list[Row]]]:
    """Returns what each row says about itself, and its answers in every round.

    A row is made of (modules, make, how many workers); the workers share the jobs.
    """
    teams: dict[str, list[Worker]] = {}
    for name, (modules, make, count) in makers.items():
        bar.set_description(f"starting {name}")
        teams[name] = [Worker(modules, make, device) for _ in range(count)]
    present = sorted(n for n, team in teams.items() if not team[0].info["missing"])
    answers: dict[str, list[Row]] = {name: [] for name in teams}
    for jobs in [rounds[0], *rounds]:
        for name in rng.sample(present, len(present)):
            bar.set_description(name)
            team = teams[name]
            for i, worker in enumerate(team):
                worker.pipe.send(jobs[i :: len(team)])
            parts = [worker.receive() for worker in team]
            answer: Row = {k: sum(part[k] for part in parts) for k in parts[0]}
            answer["seconds"] = max(part["seconds"] for part in parts)
            answer["accuracy"] /= len(parts)
            answers[name].append(answer)
            bar.update()
    for worker in (worker for team in teams.values() for worker in team):
        worker.close()
    return {n: (team[0].info, answers[n][1:]) for n, team in teams.items()}


class Verdict:
    """What was found wrong, and what could not be measured."""

    def __init__(self, judged: bool):
        self.judged = judged
        self.failures: list[str] = []
        self.unmeasured: list[str] = []

    def fail(self, text: str, always: bool = False) -> None:
        """Notes a failure, unless too few rounds were run to judge."""
        if self.judged or always:
            self.failures.append(text)

    def at_least(self, what: str, ratio: Row, target: float) -> None:
        """Demands a ratio at the unfavourable end of its interval."""
        low = (ratio["bounds"] or (0.0,))[0]
        if low < target:
            self.fail(
                f"{what}: {ratio['ratio']:.2f} {ratio['interval']} times, "
                f"not at least {target:g}"
            )


def column(answers: Sequence[Row], key: str) -> np.ndarray:
    """Returns one number, of all rounds."""
    return np.array([answer[key] for answer in answers])


def train_with_all(size: str, args: Any, record: report.Record, bar: Any) -> Verdict:
    """Measures the training at one size; saves the rows and returns what failed."""
    task = trainers.Task(SIZES[size], args.steps, args.device)
    threads = thread_counts(args.device)
    makers = {}
    for name, (modules, make) in trainers.TRAINERS.items():
        if name not in args.only:
            continue
        given = {"threads": threads} if "torch" in modules else {}
        makers[name] = modules, functools.partial(make, task=task, **given), 1
    rounds = [[(seed, 1.0)] for seed in range(args.rounds)]
    measured = measure(makers, args.device, rounds, random.Random(0), bar)
    expected, reference = measured[trainers.NNX]
    times, accuracy = column(reference, "seconds"), column(reference, "accuracy")
    initial = [trainers.flat(task.initial(seed)) for seed in range(args.rounds)]
    travel = column(reference, "final") - np.array(initial)
    verdict = Verdict(judged=not args.quick)
    for name, (info, answers) in measured.items():
        row: Row = {"what": "training", "size": size, "trainer": name}
        if info["missing"]:
            record.add(row | {"settings": f"not installed: {info['missing']}"})
            continue
        seconds, own = column(answers, "seconds"), column(answers, "accuracy")
        away = column(answers, "final") - column(reference, "final")
        away = np.linalg.norm(away, axis=1) / np.linalg.norm(travel, axis=1)
        ratio = compare(seconds, times)
        difference = float((own - accuracy).mean())
        plain = column(answers, "plain")
        share = compare(args.steps * plain, seconds)
        row |= {"steps/s": float(args.steps / np.median(seconds)), **ratio}
        row |= {"products us": 1e6 * float(np.median(plain)), "share": share["ratio"]}
        row |= {"its interval": share["interval"]}
        row |= {"compile s": info["compiling"], "tuning s": info["tuning"]}
        row |= {"first run s": info["compiling"] + float(np.median(seconds))}
        spread = float(np.std(own, ddof=1)) if args.rounds > 1 else 0.0
        row |= {"accuracy": f"{own.mean():.1f} ± {spread:.1f}"}
        row |= {"difference": f"{difference:+.2f}", "settings": info["settings"]}
        row |= {"apart": float(np.median(away))}
        row |= {"MiB": round(answers[-1]["memory"])}
        row |= {"over imports": round(answers[-1]["over imports"])}
        row |= {"parameters": info["parameters"], "seconds": seconds.tolist()}
        record.add(row | {"accuracies": own.tolist()})
        where = f"{size}, {name}"
        if info["parameters"] != expected["parameters"]:
            verdict.fail(f"{where}: void, {info['parameters']} parameters", always=True)
        noise = float(np.std(accuracy, ddof=args.rounds > 1)) * (2 / args.rounds) ** 0.5
        allowed = noise * (3 if name == trainers.SKADA else 1)
        if name == trainers.CONSTANT:
            continue
        if name != trainers.SKADA and np.median(away) > APART:
            verdict.fail(
                f"{where}: void, ends {np.median(away):.2g} apart", always=True
            )
        if abs(difference) > allowed:
            verdict.fail(
                f"{where}: void, accuracy differs by {difference:+.2f} points, "
                f"more than {allowed:.2f}"
            )
    answers = {n: own for n, (_, own) in measured.items() if own}
    judge_speed(size, args.steps, answers, verdict)
    return verdict


def judge_speed(
    size: str, steps: int, answers: dict[str, list[Row]], verdict: Verdict
) -> None:
    """Demands the ratio or the share of this size, and that none of ours is behind."""
    times = {name: column(own, "seconds") for name, own in answers.items()}
    others = [name for name in times if name not in OURS]
    if trainers.EAGER not in times:
        verdict.unmeasured.append(f"{size}, PyTorch eager")
        others = [name for name in others if name == BY_HAND]
    elif dispatch_dominates(answers, steps):
        print(f"{size}: calling the operations dominates PyTorch eager")
        ratio = compare(times[trainers.EAGER], times[trainers.NNX])
        verdict.at_least(f"{size}, PyTorch eager / jaxgrl", ratio, TARGET)
    else:
        print(f"{size}: matrix products dominate PyTorch eager")
        plain = steps * column(answers[trainers.NNX], "plain")
        share = compare(plain, times[trainers.NNX])
        verdict.at_least(f"{size}, share of the plain products' rate", share, SHARE)
        others = [name for name in others if name == BY_HAND]
    for own, other in itertools.product([n for n in OURS if n in times], others):
        ratio = compare(times[other], times[own])
        if (ratio["bounds"] or (0.0, 1.0))[1] < BEHIND:
            factor = f"{ratio['ratio']:.3f} {ratio['interval']}"
            verdict.fail(f"{size}: {own} is behind {other}, which takes {factor}")


def dispatch_dominates(answers: dict[str, list[Row]], steps: int) -> bool:
    """Returns whether PyTorch eager spends most of its time beside the products."""
    eager = answers[trainers.EAGER]
    share = steps * column(eager, "plain") / column(eager, "seconds")
    return bool(np.median(share) < DISPATCH)


def sweep_with_all(size: str, args: Any, record: report.Record, bar: Any) -> Verdict:
    """Measures the sweep at one size; saves the rows and returns what failed."""
    task = trainers.Task(SIZES[size], args.sweep_steps, args.device)
    scales, seeds = (SCALES[:2], 2) if args.quick else (SCALES, 5)
    jobs = [(seed, scale) for scale in scales for seed in range(seeds)]
    makers: dict[str, tuple[Sequence[str], Callable[..., Any], int]] = {}

    def add(
        name: str, like: str, make: Callable[..., Any], *given: Any, count: int = 1
    ):
        if name not in args.only:
            return
        make = functools.partial(make, *given, task=task)
        makers[name] = trainers.TRAINERS[like][0], make, count

    nnx, eager, threads = trainers.NNX, trainers.EAGER, thread_counts(args.device)
    add(SPREAD, nnx, trainers.one_program, True, jobs)
    add(VMAP, nnx, trainers.one_program, False, jobs)
    add("jaxgrl, one by one", nnx, trainers.scanned, trainers.nnx_loss)
    add("static scale, one by one", nnx, trainers.recompiled)
    eager_torch = trainers.pytorch, trainers.scheduled_reversal, False
    add(EAGER_SWEEP, eager, *eager_torch, threads)
    cores = os.cpu_count() or 1
    if cores > 1 and args.device == "cpu":
        add(CORES, eager, *eager_torch, (1,), count=cores)
    rounds = [jobs] * args.sweep_rounds
    measured = measure(makers, args.device, rounds, random.Random(1), bar)
    verdict = Verdict(judged=not args.quick)
    best = reference_of(args.device)
    reference = column(measured[best][1], "seconds")
    compiling = measured[best][0]["compiling"]
    accuracy = measured[best][1][0]["accuracy"]
    for name, (info, answers) in measured.items():
        row: Row = {"what": "sweep", "size": size, "trainer": name}
        if info["missing"]:
            record.add(row | {"settings": f"not installed: {info['missing']}"})
            continue
        seconds = column(answers, "seconds")
        compiled = info["compiling"] + column(answers, "compiling")
        ratio, whole = (
            compare(seconds, reference),
            compare(seconds + compiled, reference + compiling),
        )
        row |= {"sweep s": float(np.median(seconds)), **ratio}
        row |= {"compile s": float(np.median(compiled))}
        row |= {"ratio with compile": whole["ratio"], "its interval": whole["interval"]}
        mean = answers[0]["accuracy"]
        row |= {"accuracy": f"{mean:.1f}", "settings": info["settings"]}
        record.add(row | {"seconds": seconds.tolist(), "tuning s": info["tuning"]})
        where = f"{size}, sweep, {name}"
        if abs(mean - accuracy) > 1:
            verdict.fail(f"{where}: void, mean accuracy {mean:.1f} for {accuracy:.1f}")
        if name == EAGER_SWEEP and size == "small":
            verdict.at_least(where, ratio, TARGET)
    if size == "small" and not measured.get(EAGER_SWEEP, ({}, []))[1]:
        verdict.unmeasured.append("small, sweep, PyTorch eager")
    return verdict


def reference_of(device: str) -> str:
    """Returns the row of the sweep with which the others are compared."""
    return VMAP if device == "gpu" else SPREAD


def thread_counts(device: str) -> list[int]:
    """Returns the numbers of threads to try: powers of two, and all cores."""
    cores = os.cpu_count() or 1
    powers = {2**i for i in range(cores.bit_length())}
    return (
        [1] if device == "gpu" else sorted({n for n in powers if n <= cores} | {cores})
    )


def parse_args() -> Any:
    """Returns the options, checked."""
    parser = report.make_parser(__doc__)
    add = parser.add_argument
    add("--sizes", default="small,large", help="of small, middle, large")
    rows = (*trainers.TRAINERS, *SWEEP)
    text = "rows to measure (default: all); those they are compared with are added"
    add("--only", nargs="+", choices=rows, default=rows, metavar="ROW", help=text)
    add("--device", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    add("--steps", type=int, default=1000, help="of a training (default: 1000)")
    add("--rounds", type=int, default=6, help="seeds of a training (default: 6)")
    add("--sweep-sizes", default="small", help="of --sizes (default: small)")
    add("--sweep-steps", type=int, default=300, help="of a run there (default: 300)")
    add("--sweep-rounds", type=int, default=6, help="default: 6; 0 is no sweep")
    add("--quick", action="store_true", help="a smoke run: judges no time or accuracy")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds, args.sweep_steps = 200, 2, 100
        args.sizes, args.sweep_rounds = "small", min(args.sweep_rounds, 1)
    args.only = {*args.only, trainers.NNX, reference_of(args.device)}
    args.sizes, args.sweep_sizes = args.sizes.split(","), args.sweep_sizes.split(",")

    def check(option: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(args, option.replace("-", "_"))
            parser.error(f"--{option} must be {rule}, got {value}")

    for option in ("sizes", "sweep-sizes"):
        given = set(getattr(args, option.replace("-", "_")))
        check(option, given <= SIZES.keys(), "of small, middle and large")
    for option in ("steps", "sweep-steps"):
        steps = getattr(args, option.replace("-", "_"))
        whole = steps >= 2 * CHUNK or (args.quick and steps >= CHUNK)
        check(
            option, whole and steps % CHUNK == 0, f"a multiple of {CHUNK}, 200 or more"
        )
    least = 1 if args.quick else 6
    check("rounds", args.rounds >= least, "6 or more, for an interval")
    rounds = args.sweep_rounds
    check("sweep-rounds", rounds == 0 or rounds >= least, "0, or 6 or more")
    args.gpu = None
    if args.device == "gpu":
        args.gpu, problem = isolated(trainers.find_gpu)
        if problem:
            parser.error(f"--device gpu: {problem}")
    return args


def isolated(function: Callable[[], Any]) -> Any:
    """Returns what the function returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function).result()


def main() -> int:
    """Measures, saves each row, prints the tables; returns the exit status."""
    args = parse_args()
    record = report.Record("training", args.output, device=args.gpu, packages=PACKAGES)
    record.data["arguments"] = {
        key: value for key, value in vars(args).items() if key not in ("output", "only")
    }
    verdicts: list[Verdict] = []
    trained = len(args.only & {*trainers.TRAINERS}) * (args.rounds + 1)
    swept = len(args.only & {*SWEEP}) * (args.sweep_rounds + 1)
    sweeps = len({*args.sizes} & {*args.sweep_sizes}) if args.sweep_rounds else 0
    runs = len(args.sizes) * trained + sweeps * swept
    try:
        with (
            tempfile.TemporaryDirectory() as cache,
            tqdm(total=runs, unit="run") as bar,
        ):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            for size in args.sizes:
                verdicts.append(train_with_all(size, args, record, bar))
                if args.sweep_rounds and size in args.sweep_sizes:
                    verdicts.append(sweep_with_all(size, args, record, bar))
    except KeyboardInterrupt:
        sys.exit(f"Interrupted: what was finished is in {record.path}")
    failures = [text for verdict in verdicts for text in verdict.failures]
    unmeasured = [text for verdict in verdicts for text in verdict.unmeasured]
    for what, columns in COLUMNS.items():
        rows = [row for row in record.rows if row["what"] == what]
        if not rows:
            unmeasured.append(f"the {what}")
            continue
        print(f"\n{what}: ratio is the time over that of the first row of its size")
        report.print_table(rows, columns)
    claim = f"in {', '.join(args.sizes)}"
    if unmeasured:
        claim += f"; not measured: {'; '.join(unmeasured)}"
    record.data["not measured"] = unmeasured
    return record.close(None if args.quick else claim, failures)


if __name__ == "__main__":
    sys.exit(main())
