"""The README's table of peers is what docs/benchmarks.md says."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

PAGE = """# A page
## v6e, pages of 128

| batch | rpac |
| --- | --: |
| decode 64 x 256 (MBU) | 1 / 1, 0.99 |

## tpu7x, pages of 128

{table}

What ran:

| batch | rpac |
"""


def headline() -> Any:
    return importlib.import_module("peers.headline")


def page(cells: dict[str, str]) -> str:
    names = list(headline().CONTENDERS)
    rows = [f"| {batch} | {' | '.join(cells.get(name, '-') for name in names)} |" for batch in headline().BATCHES]
    return PAGE.format(table="\n".join([f"| batch | {' | '.join(names)} |", "| --- |", *rows]))


def test_the_readme_has_the_figures_of_the_page() -> None:
    module = headline()
    readme = module.README.read_text()
    fix = "run `python -m peers.headline` in benchmarks/"
    assert module.rewritten(readme, module.PAGE.read_text()) == readme, fix


def test_a_cell_is_the_share_of_the_peak_with_its_asterisk() -> None:
    text = headline().headline(page({"rpac": "1,234 / 1,111, 0.50", "tokamax": "3 / 2, 0.25 *"}))
    assert f"| {headline().CONTENDERS['rpac']} | {' | '.join(['0.50'] * 5)} |" in text
    assert f"| tokamax | {' | '.join(['0.25 *'] * 5)} |" in text
    assert f"| flywheel-tpu | {' | '.join(['-'] * 5)} |" in text
    assert text.endswith(headline().EARLIER)
    assert headline().EARLIER not in headline().headline(page({"rpac": "1 / 1, 0.50"}))


def test_a_readme_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the comments"):
        headline().rewritten("# rpac\n", page({}))
