"""One hypothesis profile for all tests: the same examples on every machine and every run."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=150)
hypothesis.settings.load_profile("fixed")
