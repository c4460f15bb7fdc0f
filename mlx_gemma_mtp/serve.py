"""`python -m mlx_gemma_mtp.serve`: OpenAI's and Anthropic's HTTP interfaces on a pair, for many clients at once."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .cli.command import Parser, Stage, command, tell
from .cli.flags import add_drafts, add_limits, add_models, load_engine, load_options, read_depth, read_timeout
from .errors import UserError, shown
from .sampling.params import MAX_ROWS, number
from .server.launch import CLIENTS, KEY

if TYPE_CHECKING:
    from .engine.engine import Engine
    from .server.launch import Setup
    from .server.limits import Limits
    from .server.security import Rules
    from .server.service import Served
    from .server.supervisor import Inherited

BUNDLED = "mlx-gemma-mtp-demo"  # name of the bundled pair
LARGEST = 2**31 - 1
SECRET = ("api_key", "model", "draft_model", "inherited", "launch_folder", "launched")  # not told at /health


def parser() -> argparse.ArgumentParser:
    p = Parser("mlx_gemma_mtp.serve", description="Gemma 4 with its MTP drafter behind OpenAI's and Anthropic's APIs.")
    add_models(p)
    _add_names(p)
    _add_address(p)
    _add_replies(p)
    add_drafts(p)
    _add_limits(p)
    _add_launch(p)
    p.add_argument(
        "--metrics-prefix",
        default="mlx_gemma_mtp:",
        metavar="TEXT",
        help="of the names in /metrics; vllm: suits vLLM's dashboards (default: mlx_gemma_mtp:)",
    )
    p.add_argument(
        "--no-parent",
        action="store_true",
        help="serve in this process, without one that starts it again where it fails",
    )
    p.add_argument("--inherited", help=argparse.SUPPRESS)  # what a child has of its parent
    p.add_argument("--log-level", choices=("debug", "info", "warning"), default="info", help="(default: info)")
    p.add_argument("--version", action="version", version=f"mlx_gemma_mtp {__version__}")
    return p


def _add_names(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("names")
    group.add_argument(
        "--name", help="the model's name for clients (default: its folder's; the bundled pair's is " + BUNDLED + ")"
    )
    group.add_argument(
        "--alias",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that the model answers to, with * and ? as in file names; repeatable",
    )


def _add_address(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("address and access")
    group.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    group.add_argument("--port", type=int, default=8080, help="(default: 8080; 0 takes any)")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key that clients must send; repeatable. Others see arguments, so prefer the variable {KEY}",
    )
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a further name of this server; repeatable"
    )
    group.add_argument(
        "--allowed-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a web page that may ask, such as http://localhost:3000; repeatable",
    )


def _add_replies(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("replies")
    group.add_argument("--thinking", action="store_true", help="let replies think where a request does not say")
    group.add_argument(
        "--reasoning-field",
        choices=("reasoning_content", "reasoning", "both"),
        default="reasoning_content",
        help="where OpenAI's clients find thoughts (default: reasoning_content)",
    )


def _add_limits(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("limits")
    group.add_argument(
        "--max-rows", type=int, default=MAX_ROWS, metavar="N", help=f"decoded at once (default: {MAX_ROWS})"
    )
    group.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="that wait; more are refused (default: 256)"
    )
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="of a prompt (default: the context)")
    group.add_argument("--max-output-tokens", type=int, metavar="N", help="of a reply (default: the context)")
    group.add_argument(
        "--max-body", type=float, default=16.0, metavar="MB", help="of a request, in MB of 10^6 bytes (default: 16)"
    )
    group.add_argument(
        "--drain",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="that requests have to end on SIGTERM (default: 60)",
    )
    group.add_argument(
        "--idle-unload",
        type=float,
        metavar="SECONDS",
        help="without requests, after which the model is unloaded; the next one loads it, and waits (default: never)",
    )
    add_limits(group, timeout=600.0)


def _add_launch(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("clients")
    group.add_argument(
        "--launch",
        choices=tuple(CLIENTS),
        help="print how this client is started on this server; what it needs is written into a folder of its own",
    )
    group.add_argument("--launch-folder", metavar="FOLDER", help="for its files (default: in the cache folder)")
    group.add_argument(
        "--exec",
        action="store_true",
        help="run it, and end with it; what follows -- are its arguments, and the server's log is a file",
    )
    group.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)  # by --exec


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 after a signal, 1 where the server fails again and again, 2 for bad input; of the client
    with --exec.
    """
    given = sys.argv[1:] if argv is None else argv
    at = given.index("--") if "--" in given else len(given)
    return command(partial(run, given[:at], given[at + 1 :]), parser, given[:at])


def run(given: list[str], rest: list[str], args: argparse.Namespace) -> int:
    """given: the arguments as they came, for the process that serves. rest: those of the client."""
    _check_installed()
    from .server.security import Rules
    from .server.supervisor import UNLOADED, Inherited, supervise

    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    limits = read_limits(args)
    keys = args.api_key or list(filter(None, [os.environ.get(KEY)]))
    rules = Rules.of(args.host, keys, limits.body, args.allowed_host, args.allowed_origin)
    args.num_draft_tokens = read_depth(args.num_draft_tokens)
    load_options(args)  # what is wrong is told here, not by one child after another
    parent = None if args.inherited is None else Inherited.of(args.inherited)
    _check_launch(args, rest)
    if args.exec and not args.launched:
        return execute(given, rest, args, keys)
    listening = listen(args) if parent is None else parent.socket()
    if args.launch and parent is None and not args.launched:
        print(launch(args, listening, bool(keys)), flush=True)
    if parent is None and not args.no_parent:
        return supervise(given, listening)
    if parent is not None:
        parent.follow()
    rows = {"max_rows": args.max_rows, "max_waiting": max(limits.waiting + args.max_rows, 1)}
    with load_engine(args, "mlx_gemma_mtp.serve", **rows) as engine:
        unloaded = serve(make_served(args, engine, limits), rules, args, listening, parent)
    return UNLOADED if unloaded else 0


def _check_launch(args: argparse.Namespace, rest: list[str]) -> None:
    """Raises UserError for flags of a client without one."""
    for name, given in (("--exec", args.exec), ("--launch-folder", args.launch_folder)):
        if given and not args.launch:
            raise UserError(f"{name} is given without --launch; expected the name of a client with it")
    if rest and not args.exec:
        raise UserError(
            f"-- and {shown(rest[0])} are given without --exec; expected --launch CLIENT --exec before them"
        )


def launch(args: argparse.Namespace, listening: socket.socket, keyed: bool) -> str:
    """Writes the files of the client that is asked for, and returns the lines that start it."""
    from .server.launch import shown_setup

    return shown_setup(_client(args, listening.getsockname()[1]), keyed)


def execute(given: list[str], rest: list[str], args: argparse.Namespace, keys: list[str]) -> int:
    """Runs the client that is asked for on a server of its own. Returns the client's exit code."""
    from .server.launch import command_of, environment_of, folder_of
    from .server.launch_run import execute

    with listen(args) as free:  # which the server takes next
        port = free.getsockname()[1]
    setup = _client(args, port)
    client, log = command_of(setup, rest), folder_of(args.launch, args.launch_folder).with_suffix(".log")
    server = [sys.executable, "-m", "mlx_gemma_mtp.serve", *given, "--launched", "--port", str(port)]
    tell(f"{setup.title} starts once the model is loaded; the server's log: {log}")
    return execute(client, environment_of(setup, next(iter(keys), None)), server, (_local(args), port), log)


def _client(args: argparse.Namespace, port: int) -> Setup:
    """The client that is asked for, set up for a server on this port; its files are written."""
    from .files import hub
    from .files.folder import read_config
    from .models.config import TargetConfig
    from .server.launch import Site, folder_of, written

    config = TargetConfig.from_dict(read_config(hub.find_pair(args.model, "none", args.revision).target))
    host, folder = _local(args), folder_of(args.launch, args.launch_folder)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    setup = CLIENTS[args.launch](Site(url, model_name(args), config.context, folder))
    written(setup, folder)
    return setup


def _local(args: argparse.Namespace) -> str:
    """Where a client of this machine finds the server."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(args.host, args.host)


def model_name(args: argparse.Namespace) -> str:
    """Returns the model's name for clients."""
    return args.name or (BUNDLED if args.model is None else PurePath(args.model).name or args.model)


def listen(args: argparse.Namespace) -> socket.socket:
    """Returns a socket at the address of the arguments. Raises UserError where it cannot be listened on."""
    _at_least("--port", args.port, 0, 65535)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        return socket.create_server((args.host, args.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"--host {args.host} --port {args.port} cannot be listened on ({error.strerror or error}); expected an "
            "address of this machine and a free port"
        ) from None


def _check_installed() -> None:
    """Raises UserError where a package of the extra is missing, before anything is loaded."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise UserError(f"the server needs {package}; install it: pip install 'mlx-gemma-mtp[serve]'")


def serve(
    served: Served, rules: Rules, args: argparse.Namespace, listening: socket.socket, parent: Inherited | None
) -> bool:
    """Serves on a socket until a signal comes. Returns whether it ends since nobody has asked for long instead."""
    from .server.app import make_app
    from .server.drain import Server

    host = f"[{args.host}]" if ":" in args.host else args.host
    tell(f"{served.name} on http://{host}:{listening.getsockname()[1]}/v1 ({served.description})")
    server = Server(make_app(served, rules), served, args.drain, parent, args.idle_unload)
    server.run([listening])
    return server.unloaded


def read_limits(args: argparse.Namespace) -> Limits:
    """Returns the limits that the arguments name. Raises UserError."""
    from .server.limits import Limits

    limits = replace(
        Limits(),
        body=int(_above_zero("--max-body", args.max_body) * 1e6),
        seconds=read_timeout(args.timeout),
        waiting=_at_least("--max-waiting", args.max_waiting, 0),
    )
    if args.max_prompt_tokens is not None:
        limits = replace(limits, prompt_tokens=_at_least("--max-prompt-tokens", args.max_prompt_tokens, 1))
    if args.max_output_tokens is not None:
        limits = replace(limits, output_tokens=_at_least("--max-output-tokens", args.max_output_tokens, 1))
    args.drain = number("--drain", args.drain, lambda s: 0 <= s <= 1e9, "seconds, 0 or more")
    if args.idle_unload is not None:
        args.idle_unload = number("--idle-unload", args.idle_unload, lambda s: 1 <= s <= 1e9, "seconds, 1 or more")
        if args.no_parent:
            raise UserError("--idle-unload needs a parent that loads the model again; expected it without --no-parent")
    return limits


def make_served(args: argparse.Namespace, engine: Engine, limits: Limits) -> Served:
    """Returns what is served, after a first text: kernels are compiled, and it is known why there are no drafts."""
    from .server.service import Served
    from .server.warm import warm_up

    name = model_name(args)
    with Stage() as stage:
        stage("generating first texts")
        first = warm_up(engine)
    plain = engine.drafter is None or args.num_draft_tokens == 0
    return Served(
        engine,
        name,
        aliases=args.alias,
        limits=limits,
        thinking=args.thinking,
        reasoning=args.reasoning_field,
        settings=origins(args),
        mtp_reason=first.stats.mtp_reason if plain else None,
        metrics_prefix=args.metrics_prefix,
    )


def origins(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns every argument with where its value comes from, without keys and folders."""
    defaults, secret = vars(parser().parse_args([])), SECRET
    return {
        name: {"value": value, "origin": "default" if value == defaults[name] else "flag"}
        for name, value in vars(args).items()
        if name not in secret
    }


def _at_least(name: str, value: int, least: int, most: int = LARGEST) -> int:
    if not least <= value <= most:
        raise UserError(f"{name} is {shown(value)}, expected {least} to {most}")
    return value


def _above_zero(name: str, value: float) -> float:
    return number(name, value, lambda n: 0 < n <= 1e9, "a number above 0")


if __name__ == "__main__":
    sys.exit(main())
