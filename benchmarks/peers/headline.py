"""The README's table of rpac and its peers, between two comments there: a few cells of docs/benchmarks.md.

python -m peers.headline        in benchmarks/: rewrites the table, as `benchmarks/peers.py` does after each change
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- peers: written by benchmarks/peers/headline.py from docs/benchmarks.md -->"
END = "<!-- end of peers -->"

SECTION = "tpu7x, pages of 128"
BATCHES = {
    "decode 64 x 256 (MBU)": "decode 256",
    "decode 64 x 1024 (MBU)": "decode 1024",
    "decode 64 x 4096 (MBU)": "decode 4096",
    "decode 64 x 8000 (MBU)": "decode 8000",
    "prefill 4 x 512 of 4096 (MFU)": "prefill 4 x 512",
}
CONTENDERS = {
    "rpac": "rpac, RPA v3's cache layout",
    "rpac, separate": "rpac, K and V separate in each page",
    "RPA v3, best": "RPA v3, the best of several tile sets",
    "JAX v2": "JAX's ragged paged attention (v2)",
    "flywheel-tpu": "flywheel-tpu",
    "tokamax": "tokamax",
}
EARLIER = "Figures with an asterisk were made with an earlier version of the kernel or the predictor."


def headline(page: str) -> str:
    """The table, from the text of docs/benchmarks.md: the share of the peak that each cell of that page ends with."""
    shares = _shares(page)
    lines = [_row(["", *BATCHES.values()]), _row(["---", *["--:"] * len(BATCHES)])]
    lines += [_row([title, *(shares[batch][name] for batch in BATCHES)]) for name, title in CONTENDERS.items()]
    text = "\n".join(lines)
    return f"{text}\n\n{EARLIER}" if "*" in text else text


def rewritten(readme: str, page: str) -> str:
    """The README with the table in place of the one that it has. Raises ValueError where it has no place for one."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: must have the comments {BEGIN} and {END}")
    return f"{before}{begin}\n{headline(page)}\n\n{end}{after}"


def _shares(page: str) -> dict[str, dict[str, str]]:
    """MBU or MFU, with its asterisk, by batch and contender."""
    section = page.partition(f"\n## {SECTION}\n")[2].partition("\nWhat ran:")[0]
    header, _, *rows = [_cells(line) for line in section.splitlines() if line.startswith("|")]
    return {
        row[0]: {name: re.sub(r".*, ", "", cell) for name, cell in zip(header[1:], row[1:], strict=True)}
        for row in rows
    }


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(), PAGE.read_text()))
