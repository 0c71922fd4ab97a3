"""The command line. Exit codes: 0 done, 1 an error of ours (one line says which), 2 wrong usage,
130 interrupted, 129 and 143 ended by SIGHUP and SIGTERM. Nothing heavy is imported before a command
needs it."""

from __future__ import annotations

import asyncio
import errno
import importlib.metadata
import itertools
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from glasshive import audit_commands, member_commands, swarm_commands, whitelist_commands
from glasshive.dht.addresses import LOOPBACK, check_places
from glasshive.graph.errors import GlasshiveError
from glasshive.models import ModelUnavailableError
from glasshive.settings import Settings, config_path, data_dir, load_settings
from glasshive.terminal import (
    Ended,
    LogFormat,
    byte_bar,
    console,
    ended_by_signals,
    print_error,
    set_up_logging,
)

app = typer.Typer(
    name="glasshive",
    help="Interpretability experiments on language models split over a peer-to-peer swarm.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(swarm_commands.app)
app.add_typer(whitelist_commands.app)
app.add_typer(member_commands.app)
app.add_typer(audit_commands.app)

ANYWHERE = "/ip4/0.0.0.0/tcp/31331"
BOOTSTRAP_LISTEN = swarm_commands.BOOTSTRAP_LISTEN

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A hive.toml; else the default one, if there.")
]
BootstrapOption = Annotated[
    list[str] | None,
    typer.Option("--bootstrap", help="Address of a bootstrap peer; may be given several times."),
]
ServeBootstrapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--bootstrap",
        help="Address of a bootstrap peer of the swarm to join; may be given several times. "
        "Without one here or in the config this host begins a swarm of its own.",
    ),
]
AnnounceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--announce",
        help="Multiaddr under which others reach it, if that is not the machine's own: that of a "
        "router which forwards the port. May be given several times.",
    ),
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="Key file; made at the first use, for you only.")
]
HostKeyOption = Annotated[
    Path | None,
    typer.Option("--key", help="Key file; made at the first use. Else the first that is free."),
]
LogFormatOption = Annotated[LogFormat, typer.Option("--log-format", help="How to write logs.")]
ReportOption = Annotated[int | None, typer.Option("--report-descriptor", hidden=True)]
KeyInUseOption = Annotated[str | None, typer.Option("--key-in-use", hidden=True)]
StandByOption = Annotated[bool, typer.Option("--stand-by", hidden=True)]
SpareOption = Annotated[
    bool,
    typer.Option(
        "--spare/--no-spare",
        help="Keep a process ready (some 0.5 GB) that takes over when one has to be ended.",
    ),
]
StdinOption = Annotated[bool, typer.Option("--until-stdin-ends", hidden=True)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> NoReturn:
    """The entry point: runs the command and exits with its code."""
    try:
        app()
    except (GlasshiveError, ModelUnavailableError) as error:
        print_error(error)
        sys.exit(1)
    except Ended as ended:
        sys.exit(ended.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"glasshive {importlib.metadata.version('glasshive')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, exit."),
    ] = False,
) -> None:
    """Interpretability experiments on language models split over a peer-to-peer swarm."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model folder, or the name of a fetched model."),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(help="Blocks to serve, first:end, such as 0:10; without it the whole model."),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Number format; auto: bfloat16 on CUDA, else float32."),
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option()] = "auto",
    attention: Annotated[Literal["sdpa", "eager", "flash"], typer.Option()] = "sdpa",
    memory: Annotated[
        str | None,
        typer.Option(
            help="The most memory that all traces take at a time, such as 8GiB (a plain number is "
            "bytes), besides the model; without it three quarters of what is free at the start."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Announce the model under this name.")] = None,
    listen: Annotated[
        str | None,
        typer.Option(help=f"Multiaddr to listen at, such as {ANYWHERE}; else {LOOPBACK}."),
    ] = None,
    announce: AnnounceOption = None,
    bootstrap: ServeBootstrapOption = None,
    config: ConfigOption = None,
    key: HostKeyOption = None,
    log_format: LogFormatOption = "pretty",
    report_descriptor: ReportOption = None,
    key_in_use: KeyInUseOption = None,
    until_stdin_ends: StdinOption = False,
    spare: SpareOption = True,
    stand_by: StandByOption = False,
) -> None:
    """Lend this machine: serve some blocks of a model to the swarm until Ctrl-C."""
    set_up_logging(log_format)
    if model is None:
        raise typer.BadParameter(
            "name a model: a folder that Hugging Face saved, or SmolLM2-135M-Instruct once "
            "`glasshive demo` has fetched it",
            param_hint="MODEL",
        )
    span = _blocks(blocks, model)
    _check_name(name)
    settings = load_settings(
        config,
        bootstraps=bootstrap,
        host_key=key,
        memory=memory,
        listen=listen,
        announce=announce,
    )
    listen = settings.listen or LOOPBACK
    if report_descriptor is None:
        from glasshive.models import find_model

        default = data_dir() / "host.key"
        _check_can_listen(listen, settings.announce, settings)
        find_model(model)  # before a process is started for it
        _supervise(settings.host_key, default, settings, until_stdin_ends, spare=spare)
    from glasshive import host_process

    options = host_process.ServeOptions(model, span, dtype, device, attention, name)
    inherited = host_process.stand_by(options) if stand_by else None
    if inherited:
        listen = inherited.listen
    host_process.run_host(
        host_process.Life(
            *(settings, settings.host_key_path, listen, log_format, report_descriptor),
            announce=settings.announce,
            key_in_use=key_in_use,
        ),
        options,
        inherited,
    )


@app.command()
def bootstrap(
    listen: Annotated[
        str | None,
        typer.Option(
            help="Multiaddr to listen at; else where the config names the peer of this key, else "
            f"{BOOTSTRAP_LISTEN}."
        ),
    ] = None,
    announce: AnnounceOption = None,
    others: BootstrapOption = None,
    config: ConfigOption = None,
    key: HostKeyOption = None,
    log_format: LogFormatOption = "pretty",
    report_descriptor: ReportOption = None,
    key_in_use: KeyInUseOption = None,
    until_stdin_ends: StdinOption = False,
) -> None:
    """Be the peer through which others find the swarm. Prints its address; serves no model."""
    set_up_logging(log_format)
    settings = load_settings(config, bootstraps=others)
    default = data_dir() / "bootstrap.key"
    listen = listen or _named_place(settings, key or default, announce or ()) or BOOTSTRAP_LISTEN
    if report_descriptor is None:
        _check_can_listen(listen, announce or (), settings, config_path(config))
        _supervise(key, default, settings, until_stdin_ends, listen=listen)
    from glasshive.host_process import Life, run_bootstrap

    run_bootstrap(
        Life(
            *(settings, key or default, listen, log_format, report_descriptor),
            announce=tuple(announce or ()),
            key_in_use=key_in_use,
            config=config_path(config),
        )
    )


@app.command()
def status(
    model: Annotated[str | None, typer.Option(help="Only this model, by name or id.")] = None,
    as_json: JsonOption = False,
    bootstrap: BootstrapOption = None,
    config: ConfigOption = None,
    key: KeyOption = None,
) -> None:
    """Who serves what, and what is missing; with --model, 1 if the model can't be traced whole."""
    set_up_logging("pretty")
    from glasshive.connection import open_swarm, with_bootstraps
    from glasshive.security.membership import Act
    from glasshive.status_report import print_report, report_of

    settings = with_bootstraps(load_settings(config, bootstraps=bootstrap, key=key), config)
    with open_swarm(settings, config, Act.READ) as swarm:
        report = report_of(settings.swarm, swarm.records(model), swarm.transport.now())
        where = swarm.where.hosts
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        print_report(report, Console(), where)
    if model is not None and not all(one["complete"] for one in report["models"]):
        raise typer.Exit(1)


@app.command()
def manifest(
    path: Annotated[str, typer.Argument(help="A model folder, or the name of a fetched model.")],
    name: Annotated[str | None, typer.Option(help="The model's name; else the folder's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What a model is: its id, and the hash of every file that counts."""
    set_up_logging("pretty")
    from glasshive.manifest_cache import known_manifest, model_name
    from glasshive.models import find_model

    folder = find_model(path)
    with byte_bar("hashing", show=True) as on_hashing:
        found = known_manifest(folder, name or model_name(path, folder), on_hashing)
    if as_json:
        files = [
            {"name": one.name, "size_bytes": one.size_bytes, "sha256": one.sha256.hex()}
            for one in found.files
        ]
        print(json.dumps({"name": found.name, "id": found.model_id, "files": files}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "bytes", "sha256", title=f"{found.name}\n{found.model_id}")
    table.columns[1].justify = "right"
    table.columns[2].overflow = "fold"
    for one in found.files:
        table.add_row(one.name, f"{one.size_bytes:,}", one.sha256.hex())
    Console().print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo-output"),
    cuts: Annotated[
        str, typer.Option(help="Where the model's 30 blocks are cut: a host for each piece.")
    ] = "10,20",
) -> None:
    """Run three experiments on a real model, split over hosts on this machine."""
    set_up_logging("pretty")
    from glasshive.demo import SPANS, run_demo

    end = SPANS[-1][1]
    parts = cuts.split(",") if cuts else []
    bounds = [0, *(int(part) if part.strip().isdecimal() else -1 for part in parts), end]
    spans = list(itertools.pairwise(bounds))
    if not all(first < last for first, last in spans):
        raise typer.BadParameter(
            f"got {cuts!r}, wanted ascending blocks between 0 and {end}, such as 10,20",
            param_hint="--cuts",
        )
    with ended_by_signals():
        code = run_demo(out, spans=spans)
    raise typer.Exit(code)


def _blocks(text: str | None, model: str) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, end = text.partition(":")
    whole = first.isdecimal() and end.isdecimal()
    if whole and int(first) < int(end):
        return int(first), int(end)
    if first.isdecimal() and not colon:
        why = f"; block {first} alone is {first}:{int(first) + 1}"
    elif whole:
        why = ", and the first below the end"
    else:
        why = ""
    raise typer.BadParameter(
        f"got {text!r}, wanted first:end (end excluded), such as 0:10 for the first ten{why}"
        f"{_said_of_blocks(model)}",
        param_hint="--blocks",
    )


def _said_of_blocks(model: str) -> str:
    """How many blocks a model has, if its configuration is here and says so in the usual word."""
    from glasshive.models import find_model

    try:
        # Read as it is: transformers takes seconds to import.
        config = json.loads((find_model(model) / "config.json").read_bytes())
    except (ModelUnavailableError, OSError, ValueError):
        return ""
    n_blocks = config.get("num_hidden_layers") if isinstance(config, dict) else None
    return f"; {model} has {n_blocks} blocks, 0:{n_blocks}" if type(n_blocks) is int else ""


def _check_name(name: str | None) -> None:
    from glasshive.dht.records import is_text

    if name is not None and not is_text(name):
        raise typer.BadParameter(
            f"got {name[:140]!r}, wanted 1 to 128 letters, digits, spaces or ._/@:+,()-, the first "
            "a letter or digit; without --name the model goes by its folder's",
            param_hint="--name",
        )


def _supervise(
    key: Path | None,
    default: Path,
    settings: Settings,
    until_stdin_ends: bool,
    *,
    spare: bool = False,
    listen: str | None = None,
) -> NoReturn:
    """Become the supervisor of a process with this very command line, and of a spare one.

    Without a key that the user named, the first free one from `default` on is taken. It listens
    where `listen` says, if that is given, and again where it did.
    """
    from glasshive.dht.transport import PeerAddress
    from glasshive.keyring import take_free_key, take_key
    from glasshive.peer.supervisor import Supervisor
    from glasshive.security.keys import Identity

    for address in settings.bootstraps:
        PeerAddress.parse(address)
    in_use: list[str] = []
    if key is not None:
        lock = take_key(key)
    else:
        key, lock = take_free_key(default)
        if key != default:  # which the process says once it knows that it can start
            in_use = ["--key-in-use", default.name]
    Identity.load_or_create(key)

    def command(report_descriptor: int, listening_at: str | None = None) -> list[str]:
        place = listening_at or listen
        again = ["--listen", place] if place else []
        report = ["--report-descriptor", str(report_descriptor), "--key", str(key)]
        return [sys.executable, "-m", "glasshive.cli", *sys.argv[1:], *again, *in_use, *report]

    def waiting(report_descriptor: int) -> list[str]:
        return [*command(report_descriptor), "--stand-by"]

    async def run() -> int:
        supervisor = Supervisor(command, spare=waiting if spare else None)
        return await supervisor.run(until_stdin_ends=until_stdin_ends)

    try:
        code = asyncio.run(run())
    finally:
        lock.release()
    if console.is_terminal:
        console.show_cursor()  # the process may have been ended in the middle of a progress bar
    sys.exit(code)


def _named_place(settings: Settings, key: Path, announce: Sequence[str]) -> str | None:
    """Where the config has others look for the peer of this key, to listen there.

    Not where `announce` leads, which need be no address of this machine. Raises KeyFileError.
    """
    from glasshive.security.keys import Identity

    if not key.exists():
        return None  # it is made now, so no config names its peer
    own = f"/p2p/{Identity.load_or_create(key).peer_id}"
    named = (one.removesuffix(own) for one in settings.bootstraps if one.endswith(own))
    return next(
        (one for one in named if one.startswith(("/ip4/", "/ip6/")) and one not in announce), None
    )


def _check_can_listen(
    listen: str, announce: Sequence[str], settings: Settings, names_it: Path | None = None
) -> None:
    """Raises BadAddress or ListenRefused for where a peer can't listen or be announced.

    The network daemon would share a port that is in use, and each peer get half of the calls.
    `names_it`: the config by whose `bootstraps` others find this peer, if it is a bootstrap peer.
    """
    from glasshive.dht.errors import BadAddress, ListenRefused

    if not listen.startswith("/"):
        raise BadAddress(
            f"got --listen {listen!r}, wanted a multiaddr such as /ip4/127.0.0.1/tcp/31331"
        )
    check_places([listen], announce, whitelisted=settings.root is not None)
    _, kind, host, protocol, port, *_ = listen.split("/")
    if protocol != "tcp":
        return
    family = socket.AF_INET6 if kind == "ip6" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, int(port)))
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            what_to_do = (
                "give another port with --listen, or let one be chosen: "
                f"--listen /{kind}/{host}/tcp/0"
            )
            is_named = any(one.startswith(f"{listen}/p2p/") for one in settings.bootstraps)
            if names_it and is_named and error.errno == errno.EADDRNOTAVAIL:
                what_to_do = (
                    f"{names_it} names this peer there, and that is no address of this machine; "
                    "if a router leads from there to this one, say with --listen where this peer "
                    f"listens, and --announce {listen}"
                )
            elif names_it and any(f"/tcp/{port}/p2p/" in one for one in settings.bootstraps):
                what_to_do = (
                    f"stop that one (an earlier `glasshive bootstrap`?), since {names_it} names "
                    "this port; with another port of --listen change `bootstraps` there too, and "
                    "make invites anew: those made before hold the old address"
                )
            raise ListenRefused(
                f"can't listen at {listen}: "
                f"{'another process does' if in_use else error.strerror or error}; {what_to_do}"
            ) from None


if __name__ == "__main__":
    main()
