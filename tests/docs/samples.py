"""The samples of the docs: fenced blocks that show the output of a command, or a piece of a file.

An HTML comment on the line above a block says where its content comes from:

    <!-- sample: rpac plan specs/tiny.yaml --target tpu7x -->             the standard output of a command
    <!-- sample, numbers vary: rpac serve-check build/tiny.rpac -->       the same, for output with times and sizes
    <!-- excerpt: specs/llama3-8b.yaml -->                               a whole file
    <!-- excerpt: generated/llama3-8b/tpu7x/decode.py flash_step -->      one function of a Python file

The commands of a page run one after the other in one empty folder, beside copies of specs/ and of models/, which is in this
folder. A command is `rpac ...` or
`python FILE ...`, where FILE is a script in this folder.

In a block, a line that is only `...` stands for any number of lines, and `...` inside a line for any text. Where numbers
vary, numbers with a decimal point and numbers before a unit are not compared, and neither are the widths of columns.

    python tests/docs/samples.py --write      rewrites the blocks that are not what their commands print
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

BLOCK = re.compile(
    r"^<!-- (?P<kind>sample|sample, numbers vary|excerpt): (?P<source>[^\n]+) -->\n```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
ELISION = "..."


@dataclass(frozen=True)
class Sample:
    """One marked block of a page. `start` and `end` are where its text lies in the page."""

    kind: str
    source: str
    text: str
    start: int
    end: int

    def holds(self, found: str) -> bool:
        """Whether the block shows `found`, what its source says now."""
        loose = self.kind == "sample, numbers vary"
        shown, said = (_loosened(text) if loose else text for text in (self.text, found))
        return re.fullmatch(_pattern(shown), said) is not None


def samples(page: Path) -> list[Sample]:
    """The marked blocks of a page, in order."""
    return [
        Sample(one["kind"], one["source"], one["text"], one.start("text"), one.end("text"))
        for one in BLOCK.finditer(page.read_text())
    ]


def found(samples: list[Sample], folder: Path, cache: Path) -> Iterator[str]:
    """What the source of each sample of one page says now. Commands run in `folder`, which is empty."""
    shutil.copytree(ROOT / "specs", folder / "specs")
    for name in ("models", "my_models"):
        shutil.copytree(HERE / name, folder / name)
    for sample in samples:
        yield excerpt(sample.source) if sample.kind == "excerpt" else run(sample.source, folder, cache)


def run(command: str, folder: Path, cache: Path) -> str:
    """The standard output of a command, without spaces at the ends of lines."""
    program, *arguments = shlex.split(command)
    if program == "python":
        words = [sys.executable, str(HERE / arguments[0]), *arguments[1:]]
    else:
        assert program == "rpac", f"{command}: must begin with rpac or python"
        words = [sys.executable, "-m", "rpac.cli", *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "RPAC_CACHE": str(cache),
        "RPAC_TUNED": "none",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stderr}"
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def excerpt(source: str) -> str:
    """A file of the repository, or one function of it without its indentation."""
    path, *names = source.split()
    text = (ROOT / path).read_text()
    if not names:
        return text
    [name] = names
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return textwrap.dedent("".join(text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]))
    raise AssertionError(f"{path} has no function {name}: name another one in the page")


def rewrite(page: Path, cache: Path) -> None:
    """Puts what the sources say into the blocks that say something else."""
    text = page.read_text()
    blocks = samples(page)
    with tempfile.TemporaryDirectory() as folder:
        now = list(found(blocks, Path(folder), cache))
    for sample, content in reversed(list(zip(blocks, now, strict=True))):
        if not sample.holds(content):
            text = text[: sample.start] + content + text[sample.end :]
            elided = "; put back the `...` where lines were left out" if ELISION in sample.text else ""
            print(f"{page.relative_to(ROOT)}: rewrote {sample.source}{elided}")
    if text != page.read_text():
        page.write_text(text)


def _pattern(shown: str) -> str:
    """A regular expression for the texts that a block stands for."""
    lines = [
        r"(?:.*\n)*" if line.strip() == ELISION else r".*".join(map(re.escape, line.split(ELISION))) + r"\n"
        for line in shown.splitlines()
    ]
    return "".join(lines)


def _loosened(text: str) -> str:
    """The text without what differs from run to run: decimal numbers, numbers before a unit, widths of columns."""
    text = re.sub(r"\d+\.\d+", "0.0", text)
    text = re.sub(r"\d+(?= (?:KiB|MiB|s|ms|us)\b)", "0", text)
    text = re.sub(r"-{2,}", "--", text)
    return re.sub(r" {2,}", "  ", text)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/docs/samples.py --write")
    with tempfile.TemporaryDirectory() as builds:
        for one in PAGES:
            rewrite(one, Path(builds))
