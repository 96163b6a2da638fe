"""The command line: parses arguments, calls rpac, prints. `rpac.errors` defines the exit codes."""

from __future__ import annotations

import sys
from typing import Any

import click

from rpac._version import __version__
from rpac.cli.bench import bench_command
from rpac.cli.buckets import buckets
from rpac.cli.build import build, generate
from rpac.cli.check import check
from rpac.cli.diff import diff_command
from rpac.cli.explain import explain_command
from rpac.cli.init import init_command
from rpac.cli.inspect import inspect
from rpac.cli.pack import pack
from rpac.cli.plan import plan
from rpac.cli.predict import predict_command
from rpac.cli.rebuild import rebuild_command
from rpac.cli.receipt import receipt_command
from rpac.cli.report import report_command
from rpac.cli.serve_check import serve_check_command
from rpac.cli.show_config import show_config_command
from rpac.cli.sign import keygen_command, sign_command, verify_command
from rpac.cli.specs import specs_command
from rpac.cli.streams import INTERRUPTED, checked_streams
from rpac.cli.support import support_command
from rpac.cli.tune import tune_command
from rpac.errors import RpacError


class Group(click.Group):
    """Prints an RpacError to stderr and ends the process with the error's exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        with checked_streams():
            return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RpacError as error:
            click.echo(f"rpac: {type(error).__name__}: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:  # click would end with 1, which says that a check failed
            click.echo("rpac: interrupted", err=True)
            sys.exit(INTERRUPTED)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rpac")
def main() -> None:
    """Ahead-of-time compiler for ragged paged attention on TPU.

    \b
    Exit codes: 0 done, 1 a check failed, 2 bad spec, batch or usage, 3 incompatible target or toolchain,
    4 corrupt or untrusted bundle, 5 output cannot be written, 6 schedule cannot be read, 130 interrupted, 141 nobody reads the
    output any more.
    """


COMMANDS = (
    init_command, plan, buckets, build, check, bench_command, diff_command, explain_command, generate, inspect, keygen_command,
    pack, predict_command, rebuild_command, receipt_command, report_command, serve_check_command, show_config_command,
    sign_command, specs_command, support_command, tune_command, verify_command,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)
