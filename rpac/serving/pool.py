"""The pages of a cache: which are free, and how many users each of the others has."""

from __future__ import annotations

import numpy as np

from rpac.batch.build import INT32, Int64s, Integers, integers
from rpac.contract.kind import Int32s
from rpac.errors import OutOfPagesError, PageError


class PagePool:
    """Pages 0 to `num_pages` - 1 with a reference count each. Every method does all of its work or, raising, none.

    Not safe to call from several threads.
    """

    def __init__(self, num_pages: int) -> None:
        self._uses = np.zeros(num_pages, np.int32)
        self._free = np.arange(num_pages - 1, -1, -1, dtype=np.int32)  # a stack: its first num_free entries
        self.num_free = num_pages

    def uses(self, pages: Int32s) -> Int32s:
        """How many users each of these pages has; 0 for a free one."""
        return self._uses[pages]

    def allocate(self, count: int) -> Int32s:
        """`count` free pages, with one user each. Raises OutOfPagesError where there are fewer."""
        if count < 0:
            raise PageError(f"{count} pages were asked for; must be 0 or more")
        if count > self.num_free:
            raise OutOfPagesError(
                f"{count} pages were asked for; the pool has {self.num_free} free of {len(self._uses)}; "
                "free a sequence and ask again, or build with a larger num_pages"
            )
        self.num_free -= count
        pages = self._free[self.num_free : self.num_free + count][::-1].copy()
        self._uses[pages] = 1
        return pages

    def share(self, pages: Integers) -> None:
        """One user more for each of these pages. Raises PageError where one is free or not the pool's."""
        ids, counts = self._counted(pages, 1)
        self._uses[ids] += counts

    def release(self, pages: Integers) -> None:
        """One user less for each of these pages; those without any are free.

        Raises PageError where a page is none of the pool's, or is released more often than it has users.
        """
        ids, counts = self._counted(pages, None)
        self._uses[ids] -= counts
        free = ids[self._uses[ids] == 0]
        self._free[self.num_free : self.num_free + len(free)] = free[::-1]
        self.num_free += len(free)

    def freed_by(self, pages: Int32s) -> int:
        """How many pages would become free if these were released."""
        ids, counts = np.unique(pages, return_counts=True)
        return int((self._uses[ids] == counts).sum())

    def _counted(self, pages: Integers, least: int | None) -> tuple[Int64s, Int32s]:
        """The different pages and how often each is there; `least` users must each have, by default as many as that."""
        ids, counts = np.unique(integers("pages", pages, INT32.min), return_counts=True)
        if ids.size and not 0 <= ids[0] <= ids[-1] < len(self._uses):
            bad = ids[0] if ids[0] < 0 else ids[-1]
            raise PageError(f"page {bad} is not of this pool; must be 0 to {len(self._uses) - 1}")
        lacking = self._uses[ids] < (counts if least is None else least)
        if lacking.any():
            at = int(lacking.argmax())
            raise PageError(
                f"page {ids[at]} has {self._uses[ids[at]]} users and was given {counts[at]} times; "
                "must be in use that often: it was freed already, or never allocated"
            )
        return ids, counts.astype(np.int32)
