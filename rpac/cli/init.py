"""`rpac init`: makes a commented spec of a model's config.json and a server's flags."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from rpac.cli.common import Amount, command
from rpac.devices.chip import TPU_TARGETS
from rpac.errors import OutputError
from rpac.init.servers import DTYPE_WORDS, SERVERS, Flag, Request, Server
from rpac.spec.parse import MAX_DEVICES

DEFAULT_CHIP: Final = "v6e"
_SUFFIXES: Final = {"k": 10**3, "m": 10**6, "K": 1 << 10, "M": 1 << 20}


class Count(click.IntRange):
    """An integer, or one with a suffix as vLLM takes it: 32k is 32,000, and 32K is 32,768."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value[-1:] in _SUFFIXES and value[:-1].isdecimal() and len(value) < 10:
            value = int(value[:-1]) * _SUFFIXES[value[-1]]
        return super().convert(value, param, ctx)


def _parameter(server: Server, flag: Flag) -> str:
    return f"{server.name}_{flag.key}"


def _server_options(run: Callable[..., None]) -> Callable[..., None]:
    """The flags of all servers, as they name them."""
    for server in reversed(list(SERVERS.values())):
        for flag in reversed(server.flags):
            least = -1 if flag.name == "--chunked-prefill-size" else 1
            kind = Count(least, int(flag.most)) if flag.type is int else Amount(0, flag.most, min_open=True)
            words = f"{server.title}: {flag.help}"
            run = click.option(*flag.names, _parameter(server, flag), type=kind, help=words)(run)
    return run


@command("init")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--chip", type=click.Choice(TPU_TARGETS), default=DEFAULT_CHIP, show_default=True, help="What serves it.")
@click.option(
    "--devices", type=click.IntRange(1, MAX_DEVICES), help="Devices that serve it. Default: one, or what flags ask for."
)
@click.option(
    "--per-device",
    is_flag=True,
    help="Write the share of one of the devices, as the adapters' install needs it, in place of `parallel`.",
)
@click.option(
    "--like",
    type=click.Choice(list(SERVERS)),
    default="vllm",
    show_default=True,
    help="The server whose flags and defaults count.",
)
@click.option("--dtype", type=click.Choice(["auto", *DTYPE_WORDS]), default="auto", help="Both: dtype of the model.")
@click.option("--kv-cache-dtype", default="auto", help="Both: dtype of the cache, as the server names it.")
@_server_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write. Default: stdout.")
@click.option("--force", is_flag=True, help="Replace the file that -o names.")
def init_command(
    model: Path,
    chip: str,
    devices: int | None,
    per_device: bool,
    like: str,
    dtype: str,
    kv_cache_dtype: str,
    output: Path | None,
    force: bool,
    **flags: Any,
) -> None:
    """Write a commented spec for MODEL, a folder with a config.json or that file, as model hubs have it.

    Behind each value stands the key, flag or default that it follows from. The page size and the number of sequences are the
    server's own where they plan, and the cache takes the HBM that the weights leave. No network is used.
    """
    from rpac.init.draft import make_draft

    server = SERVERS[like]
    request = Request(server, chip, devices, _given(server, flags), dtype, kv_cache_dtype, per_device)
    _refuse_existing(output, force)
    draft = make_draft(model, request, _command_line(click.get_current_context()))
    for line in (*draft.budget.lines(), *draft.notes):
        click.echo(f"rpac init: {line}", err=True)
    if output is None:
        click.echo(draft.text, nl=False)
    else:
        _write(output, draft.text, force)


def _given(server: Server, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given, by key. Raises UsageError for one of another server."""
    for other in SERVERS.values():
        for flag in other.flags:
            if other is not server and flags[_parameter(other, flag)] is not None:
                ours = [one.name for one in server.flags if one.key == flag.key]
                fix = f"write {ours[0]}, or --like {other.name}" if ours else f"write --like {other.name}"
                raise click.UsageError(f"{flag.name} is a flag of {other.title}, and --like is {server.name}; {fix}")
    values = {flag.key: flags[_parameter(server, flag)] for flag in server.flags}
    return {key: value for key, value in values.items() if value is not None}


def _command_line(ctx: click.Context) -> str:
    """What was written, without where it is written to."""
    words = ["rpac", "init", str(ctx.params["model"])]
    for param in ctx.command.params:
        given = param.name and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE
        if given and isinstance(param, click.Option) and param.name not in ("output", "force"):
            words += [param.opts[0], *([] if param.is_flag else [str(ctx.params[param.name])])]
    return shlex.join(words)


def _refuse_existing(output: Path | None, force: bool) -> None:
    if output is not None and not force and os.path.lexists(output):
        raise OutputError(f"{output}: the file exists; nothing was written; name another file with -o, or add --force")


def _write(output: Path, text: str, force: bool) -> None:
    """Puts the whole file there in one step. Raises OutputError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
        stage = Path(name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            stage.chmod(0o666 & ~_umask())
            if force:
                stage.replace(output)
            else:
                os.link(stage, output)  # unlike a rename, it replaces nothing
        finally:
            stage.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({error.strerror}); nothing was written; check the path"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
