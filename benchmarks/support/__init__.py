"""The modules of `examples/support`, which examples and benchmarks share."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "examples" / "support")]
