"""The page in a real browser, without a network: light, dark and as narrow as a telephone.

Screenshots are left in the folder that $RPAC_SCREENSHOTS names; `make report-browser` installs a browser and makes them.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rpac.report import Report, page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here; run `make report-browser`"
)

PROBE = """<!doctype html>
<body style="margin: 0"><iframe id="frame" style="width: {width}px; height: {height}px; border: 0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
frame.onload = () => {{
  const inside = frame.contentDocument, root = inside.documentElement;
  const loaded = frame.contentWindow.performance.getEntriesByType("resource").length;
  const charts = [...inside.querySelectorAll("svg.chart")].map(svg => svg.getBoundingClientRect().width);
  found.textContent = JSON.stringify([
    root.scrollWidth - root.clientWidth, loaded, Math.min(...charts),
    frame.contentWindow.getComputedStyle(inside.body).backgroundColor,
  ]);
}};
</script>
"""


def browse(path: Path, dark: bool, *options: str) -> str:
    assert BROWSER is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", scheme, *options]
    profile = f"--user-data-dir={path.parent / 'profile'}"
    done = subprocess.run([*command, profile, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.parametrize("width, dark", [(390, False), (1100, False), (1100, True)])
def test_the_page_fits_and_follows_the_color_scheme(tmp_path: Path, usual: Report, width: int, dark: bool) -> None:
    path = tmp_path / "probe.html"
    path.write_text(PROBE.format(width=width, height=1600, page=html.escape(page(usual))))
    found = re.search(
        r'<pre id="found">\[(-?\d+),(\d+),([\d.]+),"rgb\((\d+), (\d+), (\d+)\)"\]', browse(path, dark, "--dump-dom")
    )
    assert found is not None
    overflow, loaded, narrowest = int(found[1]), int(found[2]), float(found[3])
    assert overflow <= 0, f"the page is {overflow} px wider than {width}"
    assert loaded == 0
    assert narrowest > 280
    assert (int(found[4]) < 128) is dark
    folder = os.environ.get("RPAC_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        picture = Path(folder, f"report-{width}-{'dark' if dark else 'light'}.png").absolute()
        browse(path, dark, f"--window-size={max(width, 500)},1600", f"--screenshot={picture}")
        assert picture.stat().st_size > 10_000
