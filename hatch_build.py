"""What hatchling asks for the package's long description and its addresses, which depend on where the repository is public.

`RPAC_HOME=https://github.com/OWNER/rpac make release` makes every link of the README absolute, to the files of the version's
tag, and gives the package its addresses. Without it the links stay relative and lead nowhere on a package index.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

HOME = "RPAC_HOME"
# Those with a scheme or of this page alone are left as they are.
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!\w+:|#)(?P<path>[^)\s]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    """Sets `readme`, and `urls` where the address is known."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        home = os.environ.get(HOME, "").rstrip("/")
        if home:
            text, metadata["urls"] = absolute(text, home, f"v{metadata['version']}"), urls(home, metadata["version"])
        else:
            print(f"{HOME} is not set: the links of the package's description stay relative", file=sys.stderr)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, home: str, tag: str) -> str:
    """Markdown whose links lead to the files of a tag of the repository at `home`: pages to `blob`, images to `raw`."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}[{found['text']}]({home}/{kind}/{tag}/{found['path']})"

    return LINK.sub(link, text)


def urls(home: str, version: str) -> dict[str, str]:
    """The addresses that a package index shows."""
    if not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+)+", home):
        raise ValueError(
            f"{HOME}: found {home!r}; must be the repository's address, such as https://github.com/OWNER/rpac"
        )
    pages = {"Documentation": "docs/getting-started.md", "Changelog": "docs/changelog.md"}
    return {"Source": home, **{name: f"{home}/blob/v{version}/{path}" for name, path in pages.items()}}
