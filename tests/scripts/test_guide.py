"""The code of docs/guide.md, block after block."""

import re

from run_script import ROOT, run


def test_guide_code_runs_and_its_report_finds_nothing_to_mend(tmp_path):
    guide = (ROOT / "docs" / "guide.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.S | re.M))
    script = tmp_path / "guide.py"
    script.write_text(code)
    result = run(script)
    assert result.returncode == 0, result.stderr
    assert "reversed once, by `scale`: nothing to mend in the reversal" in result.stdout
    # Numbers may differ in the last digit between versions; what is reversed may not.
    (promised,) = re.findall(r"^```text\n(parameter.*?)^```", guide, re.S | re.M)
    rows = [
        [line.split()[:2] for line in t.splitlines()[:9]]
        for t in (promised, result.stdout)
    ]
    assert rows[0] == rows[1]
    # Of the two scales that tie, as the guide says, rounding chooses.
    assert re.search(r"^scale (1|3), seed \d$", result.stdout, re.M)
