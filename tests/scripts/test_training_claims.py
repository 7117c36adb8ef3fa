"""What training.py claims, decided for times that are made up."""

import pytest
from run_script import load

STEPS = 100


@pytest.fixture(scope="module")
def training():
    return load("benchmarks/training.py")


def _answers(share, us, wobble=0.01):
    """Six rounds of a trainer: microseconds a step, and the part that is products."""
    factors = [1 + wobble * i for i in (-2, -1, 0, 0, 1, 2)]
    return [
        {"seconds": 1e-6 * STEPS * us * f, "plain": 1e-6 * us * share * f}
        for f in factors
    ]


def _judge(training, wobble=0.0, **trainers):
    names = {
        "nnx": "jaxgrl + NNX",
        "hand": "JAX by hand",
        "eager": "PyTorch eager",
        "compiled": "PyTorch compiled",
    }
    answers = {names[k]: _answers(*v, wobble) for k, v in trainers.items()}
    verdict = training.Verdict(judged=True)
    training.judge_speed("small", STEPS, answers, verdict)
    return verdict.failures, verdict.unmeasured


def test_where_calls_dominate_pytorch_must_take_three_times_as_long(training):
    nnx, hand = (0.7, 100), (0.7, 100)
    assert _judge(training, nnx=nnx, hand=hand, eager=(0.2, 310)) == ([], [])
    (failure,), _ = _judge(training, nnx=nnx, eager=(0.2, 290))
    assert "PyTorch eager / jaxgrl: 2.90 [2.90, 2.90] times, not at least 3" in failure
    # It must hold at the unfavourable end of the interval.
    verdict = training.Verdict(judged=True)
    answers = {"jaxgrl + NNX": _answers(*nnx, 0.0)}
    answers["PyTorch eager"] = _answers(0.2, 310, 0.05)
    training.judge_speed("small", STEPS, answers, verdict)
    assert len(verdict.failures) == 1 and "3.10 [2.79, 3.41]" in verdict.failures[0]


def test_where_products_dominate_the_share_of_their_rate_counts(training):
    # PyTorch is faster here, since its products are. That is not what is claimed.
    peers = {"eager": (0.8, 90), "compiled": (0.8, 80)}
    assert _judge(training, nnx=(0.6, 100), hand=(0.6, 100), **peers) == ([], [])
    (failure,), _ = _judge(training, nnx=(0.4, 100), hand=(0.4, 100), **peers)
    assert "share of the plain products' rate: 0.40 [0.40, 0.40]" in failure


@pytest.mark.parametrize("eager", [(0.2, 400), (0.8, 400)])
def test_the_same_training_by_hand_may_not_be_faster(training, eager):
    assert _judge(training, nnx=(0.6, 100), hand=(0.6, 98), eager=eager) == ([], [])
    (failure,), _ = _judge(training, nnx=(0.6, 100), hand=(0.6, 96), eager=eager)
    assert "jaxgrl + NNX is behind JAX by hand, which takes 0.960" in failure


def test_where_calls_dominate_no_other_row_may_be_faster(training):
    peers = {"eager": (0.2, 400), "compiled": (0.5, 96)}
    (failure,), _ = _judge(training, nnx=(0.6, 100), **peers)
    assert "jaxgrl + NNX is behind PyTorch compiled" in failure


def test_without_pytorch_its_ratio_is_not_measured(training):
    assert _judge(training, nnx=(0.6, 100), hand=(0.6, 100)) == (
        [],
        ["small, PyTorch eager"],
    )
