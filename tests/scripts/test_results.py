"""The saved results: how they are written, and that they hold what the pages say."""


from run_script import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def test_dummy():
    pass
