"""What README and the pages of docs/ promise: their code runs, their links lead on."""

import importlib
import importlib.metadata
import inspect
import io
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import pytest

import jaxgrl

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_CODE = {
    "docs/benchmarks.md",
    "docs/changelog.md",
    "docs/contributing.md",
    "docs/how-to/index.md",
    "docs/reliability.md",
}
QUICK = {"README.md", "docs/index.md", "docs/how-to/plain-jax.md"}
LANGUAGES = {"python", "sh", "text"}
FENCED = re.compile(r"^( *)```(?P<language>[^\n]*)\n(?P<code>.*?)^\1```$", re.S | re.M)
PROMISE = re.compile(r"^ *print\(.*\)  # (.*)$")


def _name(page):
    return page.relative_to(ROOT).as_posix()


def _every(pages, slow=False):
    return [
        pytest.param(
            page,
            id=_name(page),
            marks=[pytest.mark.slow] if slow and _name(page) not in QUICK else [],
        )
        for page in pages
    ]


def _python(text):
    """Returns the code of a page, each line at its place, so that errors say where."""
    lines = [""] * len(text.splitlines())
    for block in FENCED.finditer(text):
        if block["language"] == "python":
            first = text.count("\n", 0, block.start("code"))
            code = textwrap.dedent(block["code"]).splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


def _without_code(text):
    return re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))


@pytest.fixture
def as_users_run_it(tmp_path, monkeypatch):
    """The settings of JAX that users have, and a folder to write into."""
    settings = {
        "jax_enable_x64": False,
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    monkeypatch.chdir(tmp_path)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def _run_page(text, name):
    """Runs the code of a page in one namespace; returns what each line printed."""
    printed = {}

    def record(*values, **options):
        out = io.StringIO()
        print(*values, **{"file": out, **options})
        printed.setdefault(sys._getframe(1).f_lineno, []).append(out.getvalue())

    namespace = {"__name__": "__main__", "print": record}
    exec(compile(_python(text), name, "exec"), namespace)
    return {line: "".join(texts).rstrip("\n") for line, texts in printed.items()}


@pytest.mark.parametrize("page", _every(PAGES, slow=True))
@pytest.mark.usefixtures("as_users_run_it")
def test_code_runs_and_prints_what_the_page_says(page):
    text = page.read_text()
    needs = re.match(r"<!-- needs: (.*) -->", text)
    for package in needs[1].split(", ") if needs else ():
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the page needs {package}")
    code = _python(text)
    assert bool(code.strip()) == (_name(page) not in WITHOUT_CODE)
    promised = {
        number: match[1]
        for number, line in enumerate(code.splitlines(), 1)
        if (match := PROMISE.match(line))
    }
    printed = _run_page(text, _name(page))
    assert {line: printed.get(line) for line in promised} == promised


@pytest.mark.parametrize("page", _every(PAGES))
def test_every_block_names_a_language_that_says_whether_it_runs(page):
    text = page.read_text()
    assert {block["language"] for block in FENCED.finditer(text)} <= LANGUAGES
    assert "```" not in FENCED.sub("", text)


def _anchors(path):
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.M)
    # As Python-Markdown and GitHub write them, for the headings that we have.
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings
    }


@pytest.mark.parametrize("page", _every(PAGES))
def test_links_to_files_and_headings_are_alive(page):
    text = _without_code(page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if target.suffix in {".gif", ".png"}:
            assert target.stat().st_size <= 300_000, link
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), link


def test_a_page_that_breaks_its_promises_is_found():
    page = "```python\nx = 1\n```\n\nThen\n\n```python\nprint(x + 1)  # 2\n```\n"
    assert _run_page(page, "page") == {8: "2"}
    with pytest.raises(ZeroDivisionError):
        _run_page(page.replace("x + 1", "x / 0"), "page")


def test_every_public_name_is_in_the_api_reference():
    names = {
        f"jaxgrl.{name}"
        for name, value in vars(jaxgrl).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    } | {
        f"jaxgrl.{module}.{name}"
        for module in ("nnx", "linen")
        for name, value in vars(importlib.import_module(f"jaxgrl.{module}")).items()
        if inspect.isclass(value) and value.__module__ == f"jaxgrl.{module}"
    }
    reference = (ROOT / "docs" / "api.md").read_text()
    assert names == set(re.findall(r"^::: (\S+)$", reference, re.M))


def test_readme_is_short_and_shows_code_at_once():
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert "import jax" in lines[:30]


def test_readme_has_two_commands():
    section = re.search(
        r"^##+ [^\n]*Two commands\n(.*?)^## ", README.read_text(), re.S | re.M
    )
    assert section and len(re.findall(r"^```sh\n", section[1], re.M)) == 2


def _table_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="README shows the newest JAX"
)
def test_readme_table_of_failures_is_what_happens(tmp_path):
    section = re.search(
        r"^## Why not five lines.*?(?=^## )", README.read_text(), re.S | re.M
    )
    assert section
    header, _, *promised = _table_rows(section[0])
    script = ROOT / "benchmarks" / "correctness.py"
    options = ("--quick", "--markdown", "--output", tmp_path)
    # Without the flags for JAX's future rules, under which errors read otherwise.
    env = {k: v for k, v in os.environ.items() if not re.match(r"JAX_.*3$|JAX_EN", k)}
    result = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, env=env
    )
    assert result.returncode == 0, result.stdout + result.stderr
    found_header, _, *found = _table_rows(result.stdout)
    assert header == found_header and len(promised) == 3
    assert all(row in found for row in promised)
