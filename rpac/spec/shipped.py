"""The specs that come with rpac."""

from __future__ import annotations

from pathlib import Path

from rpac.contract.data import data_dir
from rpac.errors import OutputError, SpecError
from rpac.spec.nodes import Report


def shipped_specs() -> dict[str, Path]:
    """The shipped specs by name, in order."""
    return {path.stem: path for path in sorted(data_dir("specs").glob("*.yaml"))}


def copy_spec(name: str, target: Path) -> None:
    """Writes the shipped spec `name` to a new file.

    Raises SpecError where no spec has that name, and OutputError where the file exists or cannot be written.
    """
    specs = shipped_specs()
    if name not in specs:
        report = Report(name)
        report.at(
            None, None, "", "no shipped spec of this name", f"must be one of {', '.join(specs)}", "see `rpac specs`"
        )
        raise SpecError(report.problems)
    try:
        with target.open("xb") as file:
            file.write(specs[name].read_bytes())
    except FileExistsError:
        raise OutputError(f"{target}: exists already, and a copy must be a new file; name another file") from None
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror}); name another file") from error
