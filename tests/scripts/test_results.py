"""The saved results of the benchmarks: their form, and that they hold what is said."""

import contextlib
import io
import itertools
import json
import math
import re
import sys
from unittest import mock

import numpy as np
import pytest
from run_script import ROOT, load

RESULTS = ROOT / "benchmarks" / "results"
saved = pytest.mark.skipif(
    not RESULTS.is_dir(), reason="the saved results are not part of the sdist"
)
INTERRUPTED = {  # The time on the GPU was limited; the document says what is missing.
    "timing-nvidia-h200-20261126-032110.json",
    "training-nvidia-h200-20261126-031617.json",
}
DOCUMENT = (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.fixture(scope="module")
def results():
    return load("benchmarks/parts/results.py")


@pytest.fixture(scope="module")
def report():
    return load("benchmarks/parts/report.py")


@pytest.fixture(scope="module")
def newest(results):
    return lambda name: results.newest(RESULTS, name)


def test_tables_come_back_as_they_were_with_floats_of_six_digits(
    tmp_path, results, report
):
    rows = [
        {"what": "a", "same": True, "seconds": 1234567.0, "times": [1 / 3, 2]},
        {"what": "b", "same": True, "seconds": math.pi, "times": []},
        {"what": "b", "error": None},
        {"what": "c", "count": 1},
        {"what": "c", "count": True},
        {"what": "c", "count": 1.0},
    ]
    data = {"name": "ø", "numbers": [1, 2], "empty": [], "rows": rows, "none": None}
    path = tmp_path / "file.json"
    report.write(path, data)
    found = results.read(path)
    rows[0] |= {"seconds": 1234570.0, "times": [0.333333, 2]}
    rows[1] |= {"seconds": 3.14159}
    assert json.dumps(found, sort_keys=True) == json.dumps(data, sort_keys=True)
    # A line for each row, and what rows have in common is written once.
    lines = path.read_text().splitlines()
    assert sum(line.startswith("[") for line in lines) == len(rows)
    assert path.read_text().count('"same"') == path.read_text().count('"error"') == 1


def test_a_write_that_fails_leaves_the_old_file(tmp_path, results, report):
    path = tmp_path / "file.json"
    report.write(path, {"rows": [{"a": 1}]})
    with pytest.raises(TypeError):
        report.write(path, {"rows": [{"a": object()}]})

    def broken(draft):
        draft.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.replace(path, broken)
    assert results.read(path) == {"rows": [{"a": 1}]}


def test_a_run_never_writes_into_the_file_of_another(tmp_path, report, results):
    records = [report.Record("x", tmp_path) for _ in range(3)]
    for number, record in enumerate(records):
        record.add({"number": number, "third": 1 / 3})
    assert len({record.path for record in records}) == 3
    found = [results.read(record.path) for record in records]
    rows = [[{"number": n, "third": 0.333333}] for n in range(3)]
    # What is in memory is what a run that is resumed would read.
    assert [data["rows"] for data in found] == rows == [r.rows for r in records]
    assert not any(data["complete"] for data in found)


def test_a_saved_command_names_no_folder_of_the_machine(report):
    script = str(ROOT / "benchmarks" / "timing.py")
    options = ["--output", "/home/me/out", "--data", "/home/me/x.mat", "--seeds", "3"]
    options += ["--also=../../env/bin/python", "--output=/tmp/y", "--only", "steps"]
    with mock.patch.object(sys, "argv", [script, *options]):
        said = report.command()
    assert said == (
        "python benchmarks/timing.py --data PATH/x.mat --seeds 3 --also=python "
        "--only steps"
    )


def test_the_interval_of_a_median_covers_it_with_95_percent_and_no_rank_to_spare():
    median_interval = load("benchmarks/parts/intervals.py").median_interval
    for n, joint in itertools.product((6, 7, 20, 21, 60, 301), (1, 4)):
        found = median_interval([*range(n, 0, -1)], joint)
        if found is None:
            assert 2 * 0.5**n > 0.05 / joint
            continue
        low, high = found
        assert low + high == n + 1  # as many ranks below as above
        # Missed if fewer than `low` of n values are below the median, or above it.
        missed = [
            2 * sum(math.comb(n, i) for i in range(rank)) / 2**n
            for rank in (low, low + 1)
        ]
        assert missed[0] <= 0.05 / joint < missed[1]
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) is None
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == (1.0, 6.0)


def test_the_interval_of_a_mean_is_that_of_student():
    mean_interval = load("benchmarks/parts/intervals.py").mean_interval
    values = np.array([1.0, 2.0, 4.0, 8.0, 5.0])
    # 2.7764 is the quantile of t with 4 degrees of freedom, from a table.
    margin = 2.7764 * values.std(ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(mean_interval(values), [4 - margin, 4 + margin], 1e-4)


def test_the_counts_of_programs_come_back(tmp_path, results, report):
    counts = load("benchmarks/parts/counts.py")
    case = {"program": "MLP", "dtype": "float32", "scale": "traced", "sharded": True}
    base = dict.fromkeys(counts.FORWARD, 7) | {"collectives": ["f32[2] all-reduce"]}
    parts = {
        "forward": {"none": base, "jaxgrl": base | {"same bits": True}},
        "gradient": {
            "by hand": base | {"residual bytes": 9},
            "jaxgrl": base | {"residual bytes": 9, "same bits": False},
            "five lines": base | {"residual bytes": 8, "same bits": True},
            "trick": base | {"residual bytes": 9, "collectives": []},
            "optax": {"error": "TypeError"},
        },
    }
    path = tmp_path / "file.json"
    report.write(path, {"rows": [counts.to_row(case, parts)]})
    (row,) = results.read(path)["rows"]
    assert row["forward, jaxgrl"] == "equal"
    found_case, found = counts.from_row(row)
    assert found_case == case and found["gradient"]["optax"] == {"error": "TypeError"}
    gradient = found["gradient"]
    assert gradient["jaxgrl"]["same bits"] is False
    assert gradient["five lines"]["residual bytes"] == 8
    assert gradient["trick"]["collectives"] == "none"
    assert gradient["by hand"]["collectives"].startswith("1 all-reduce, ")
    others = ["f32[3] all-reduce"]
    assert counts.summed(others) != gradient["by hand"]["collectives"]


@saved
def test_saved_results_are_small_complete_and_name_no_folder(results):
    files = sorted(RESULTS.iterdir())
    files = [path for path in files if path.suffix == ".json"]
    assert sum(path.stat().st_size for path in files) <= 400_000
    for path in files:
        data = results.read(path)
        if path.name not in INTERRUPTED:
            holds = None if data["benchmark"] == "curves" else True  # claims nothing
            assert data["complete"] and data["holds"] is holds, path
        assert data["rows"] and not data["failures"], path
        assert not re.search(r"/(tmp|home|work|root)/", path.read_text()), path


@saved
def test_pictures_in_documents_are_at_most_300_kb():
    pictures = [*RESULTS.glob("*.png"), *(ROOT / "docs").rglob("*.png")]
    assert pictures
    assert {p.name: p.stat().st_size for p in pictures if p.stat().st_size > 3e5} == {}


# What the page of the benchmarks says, against the saved results.
@saved
@pytest.mark.parametrize("name, least", [("overheads", 11), ("trainings", 40)])
def test_a_table_is_that_of_the_saved_results(name, least):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        getattr(load("benchmarks/plot.py"), f"print_{name}")(RESULTS)
    rows = [line for line in said.getvalue().splitlines() if line.startswith("|")]
    assert len(rows) >= least
    assert [row for row in rows if row not in DOCUMENT] == []


@saved
def test_the_times_of_steps_are_those_of_the_saved_results(results):
    files = results.saved(RESULTS, "timing")
    rows = [row for data in files for row in data["rows"] if row["section"] == "steps"]
    for row in rows:
        size, _, pair = row["what"].partition(", ")
        if "jaxgrl /" in pair:
            shown = "{ratio:.3f} [{low:.3f}, {high:.3f}]".format(**row)
            lines = re.findall(rf"^\| {size}, .* ms .*", DOCUMENT, re.M)
            assert any(shown in line for line in lines), row
    assert len(rows) == 18


@saved
def test_the_times_of_calls_are_those_of_the_saved_results(results):
    files = results.saved(RESULTS, "timing")
    rows = {row["what"]: row for data in files for row in data["rows"]}
    imported = rows["import jaxgrl, after jax and optax"]["milliseconds"]
    assert f"`import jaxgrl` adds {imported:.0f} ms" in DOCUMENT
    said = {
        "one more call: trace + lower": "one more call in a program, traced",
        "DANN step: trace + lower": "a DANN step, traced and lowered",
        "DANN step: compile": "a DANN step, compiled",
        "eager forward": "eager forward",
        "eager gradient": "eager gradient",
    }
    for what, name in said.items():
        (line,) = re.findall(rf"^\| {name} .*", DOCUMENT, re.M)
        *_, ours, theirs, ratio = (c.strip() for c in line.strip("|").split("|"))
        row = rows[what]
        for cell, value in ((ours, row["jaxgrl, ms"]), (theirs, row["five lines, ms"])):
            places = len(cell.partition(".")[2])
            assert cell == f"{value:.{places}f}", line
        assert ratio == f"{row['ratio']:.{len(ratio.partition('.')[2])}f}"


@saved
def test_how_often_jaxgrl_is_right_is_that_of_the_saved_results(newest):
    data = newest("correctness")
    rows = [row for row in data["rows"] if row["group"] != "known limits"]
    cells = [row["jaxgrl"] for row in rows]
    each = [cell if isinstance(cell, list) else [cell, cell] for cell in cells]
    newer, older = (
        sum(c == "right" for c in column) for column in zip(*each, strict=True)
    )
    versions = data["versions"]["jax"], data["beside"][0]["jax"]
    said = (
        f"{newer} of {len(rows)} on JAX {versions[0]} and in {older} on {versions[1]}"
    )
    assert said in DOCUMENT


@saved
def test_the_table_of_adaptations_is_that_of_the_saved_results(newest):
    rows = newest("adaptation")["summary"]
    shown = ["{mean:.1f} ± {std:.1f}".format(**row) for row in rows]
    missing = [text for text in shown if text not in DOCUMENT.replace("*", "")]
    assert len(shown) >= 50 and missing == []


@saved
def test_the_table_of_chips_is_that_of_the_saved_results(results):
    (data,) = results.saved(RESULTS, "scale")
    page = (ROOT / "docs" / "how-to" / "several-devices-and-hosts.md").read_text()
    for row in data["rows"]:
        shown = (
            f"| {row['chips']:,} | {row['global batch']:,} | 1 {row['collectives']} | "
            f"{row['all-reduce bytes']:,} bytes | {row['sent bytes'] / 1e6:.2f} MB | "
            f"{row['temporary bytes'] / 1e6:.1f} MB |"
        )
        assert shown in page
    assert len(data["rows"]) == 7


@saved
def test_the_tables_of_questions_are_those_of_the_saved_results(newest):
    page = (ROOT / "docs" / "questions.md").read_text().replace("*", "")
    lines = dict(re.findall(r"^\| ([^|]+) \| (.*)", page, re.M))
    runs = {
        "": "works, scale 1",
        "scale=0.03": "the discriminator wins, scale 0.03",
        "gain=0": "it starves, its output is constant",
        "rate=0.1": "it dies, rate 0.1",
        "scale=30": "too strong, scale 30",
        "scale=10 gamma=inf rate=0.1": (
            "the features vanish, scale 10 from the first step, rate 0.1"
        ),
        "twice=1": "scale on the loss too",
    }
    choices = {
        "scale": ("scale", {"1": ""}),
        "gamma": ("gamma", {"10": "", "constant from the first step": "gamma=inf"}),
        "width": (
            "discriminator",
            {"linear": "width=0", "1 unit": "width=1", "100": ""},
        ),
        "rate": ("learning rate", {"0.01": ""}),
    }
    rows = newest("curves")["rows"]
    ends = {row["setting"]: np.array(row["target accuracy"]) for row in rows}
    for setting, title in runs.items():
        mean, std = ends[setting].mean(), ends[setting].std(ddof=1)
        assert f"{mean:.1f} ± {std:.1f} " in lines[title]
    shown = 0
    for key, (title, names) in choices.items():
        for name, accuracy in re.findall(r"([^,:|]+): ([\d.]+)", lines[title]):
            setting = names.get(name.strip(), f"{key}={name.strip()}")
            assert accuracy == f"{ends[setting].mean():.1f}"
            shown += 1
    assert shown == 7 + 7 + 7 + 5
