"""What `mkdocs build` adds: files from outside of docs/, links to the API, the matrix.

A hook of MkDocs and, for docstrings, an extension of Griffe, which reads them.

Pages link to files of the repository by their path (`../examples/dann_moons.py`), which
works where the repository is read. On the site such a file becomes a page with its code
or, for a picture, a copy.
"""

import html
import importlib.util
import pathlib
import re
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[1]
OUTSIDE = re.compile(r"(\]\()((?:\.\./)+)([^)#\s]+)")
PICTURES = {".gif", ".png", ".svg"}
# The public names of the package, and of jaxgrl.nnx for names that Linen shares.
NAMES = {
    name: f"jaxgrl.{name}"
    for name in re.findall(
        r"^from \._\w+ import \w+ as (\w+)",
        (ROOT / "jaxgrl" / "__init__.py").read_text(),
        re.M,
    )
} | {name: f"jaxgrl.nnx.{name}" for name in ("DANN", "GradientReversal")}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside of docs/ to which a page links."""
    linked = set()
    for file in files.documentation_pages():
        depth = file.src_uri.count("/") + 1
        for _, ups, path in OUTSIDE.findall(file.content_string):
            if ups.count("../") == depth:
                linked.add(path)
    for path in sorted(linked):
        source = ROOT / path
        if source.suffix in PICTURES:
            files.append(File.generated(config, path, abs_src_path=str(source)))
        else:
            files.append(File.generated(config, f"{path}.md", content=_as_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Turns links out of docs/ into links within the site, and fills in the matrix."""
    depth = page.file.src_uri.count("/") + 1

    def inside(match: re.Match[str]) -> str:
        before, ups, path = match.groups()
        if ups.count("../") != depth:
            return match[0]
        page = "" if pathlib.Path(path).suffix in PICTURES else ".md"
        return f"{before}{'../' * (depth - 1)}{path}{page}"

    markdown = OUTSIDE.sub(inside, markdown)
    # Every second part is a fenced block.
    parts = re.split(r"(^ *```.*?^ *```$)", markdown, flags=re.S | re.M)
    parts[::2] = [with_links(part, "`") for part in parts[::2]]
    markdown = "".join(parts)
    markdown = markdown.replace("<!-- correctness counts -->", _counts())
    return markdown.replace("<!-- correctness matrix -->", _matrix())


def on_page_content(content: str, **kwargs: Any) -> str:
    """Makes each picture a link to itself, so that it can be enlarged on a phone."""
    return re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', content)


def with_links(markdown: str, ticks: str) -> str:
    """Returns Markdown in which a public name in code links to its documentation."""

    def link(match: re.Match[str]) -> str:
        code, module, name = match.groups()
        if name not in NAMES:
            return match[0]
        target = f"jaxgrl.{module}.{name}" if module else NAMES[name]
        return f"[{code}][{target}]"

    # Not in a heading, and not where the code is the text of a link already.
    inline = rf"(?<![\[`])({ticks}(?:jaxgrl\.)?(?:(nnx|linen)\.)?(\w+){ticks})(?![\]`])"
    lines = markdown.split("\n")
    return "\n".join(
        line if line.startswith("#") else re.sub(inline, link, line) for line in lines
    )


class Docstrings(griffe.Extension):
    """Reads our docstrings, which are written for `help()`, as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of an object before it is parsed."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Returns a docstring with literal blocks, examples and its source as Markdown."""
    text = re.sub(r"::$", ":", text, flags=re.M)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    text = re.sub(r"^Source:", r"\n**Source**:", text, flags=re.M)
    return with_links(text, "``")


def _as_page(path: str) -> str:
    text = (ROOT / path).read_text()
    front = "---\nsearch:\n  exclude: true\n---\n"
    if path.endswith(".md"):
        return front + text
    language = {".py": "python", ".toml": "toml"}.get(pathlib.Path(path).suffix, "text")
    return f"{front}# {path}\n\n````{language}\n{text}````\n"


LIMITS = "known limits"
HEADERS = {
    "nondiff_argnums": "five lines, <code>nondiff_argnums</code>",
    "closure": "five lines, a closure",
    "whole tree": "five lines, whole trees",
    "custom_jvp": "<code>custom_jvp</code>",
    "stop_gradient trick": "<code>stop_gradient</code> trick",
    "optax.scale_gradient": "<code>optax.scale_gradient</code>",
}


def _correctness() -> tuple[str, list[str], list[dict[str, Any]]]:
    """Returns JAX versions, implementations, and rows with a list in every cell."""
    path = ROOT / "benchmarks" / "parts" / "results.py"
    spec = importlib.util.spec_from_file_location("results", path)
    assert spec and spec.loader
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    data = results.newest(ROOT / "benchmarks" / "results", "correctness")
    versions = " / ".join(v["jax"] for v in (data["versions"], *data["beside"]))
    rows = data["rows"]
    names = [name for name in rows[0] if name not in ("group", "situation")]
    for row in rows:
        for name in names:
            # The newest JAX, then the others; one entry where they are equal.
            row[name] = row[name] if isinstance(row[name], list) else [row[name]] * 2
    return versions, names, rows


def _counts() -> str:
    """Returns how often each implementation is right, wrong or an error, as a table."""
    versions, names, rows = _correctness()
    lines = ["| implementation | right | silently wrong | error |", "| --- " * 4 + "|"]
    for name in names:
        each = [row[name] for row in rows if row["group"] != LIMITS]
        counts = [
            " / ".join(
                str(sum(c.startswith(v) for c in cells))
                for cells in zip(*each, strict=True)
            )
            for v in ("right", "wrong", "error")
        ]
        lines.append(f"| {HEADERS.get(name, name)} | {' | '.join(counts)} |")
    return "\n".join([*lines, "", f"Two numbers are those of JAX {versions}."])


def _matrix() -> str:
    """Returns every cell of the saved comparison as a sortable table."""
    _, names, rows = _correctness()
    titles = ["#", "situation", *(HEADERS.get(name, name) for name in names)]
    lines = ['<div class="matrix" tabindex="0"><table class="sortable"><thead><tr>']
    lines += [f"<th>{title}</th>" for title in titles]
    lines.append("</tr></thead><tbody>")
    for number, row in enumerate(rows, 1):
        situation, group = (html.escape(row[k]) for k in ("situation", "group"))
        lines.append(f"<tr><td>{number}</td><td>{situation}<small>{group}</small></td>")
        lines += [_cell(row[name]) for name in names]
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table></div>"])


def _cell(results: list[str]) -> str:
    """Returns a cell: the newest JAX, and the oldest too where its verdict differs."""
    verdicts = [result.split(":")[0] for result in results]
    shown = results if len(set(verdicts)) > 1 else results[:1]
    # Of an error its type; the message appears where the pointer rests.
    texts = [r.split(": ")[1] if r.startswith("error") else r for r in shown]
    text = " / ".join(html.escape(t) for t in texts)
    text = re.sub("(?<=[a-z])(?=[A-Z])", "<wbr>", text)
    title = html.escape(results[0])
    return f'<td class="{verdicts[0]}" title="{title}">{text}</td>'
