"""Figures as people read them."""

from __future__ import annotations


def size(count: int) -> str:
    """A number of bytes for people to read: in KiB below one MiB, in MiB below one GiB, else in GiB."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / 1024:.0f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.2f} MiB"


def traffic(count: int) -> str:
    """The same, but below one KiB in bytes: what a kernel moves can be that little."""
    return f"{count} B" if count < 1024 else size(count)
