"""Agents as they are: `python tests/external/agents.py` has five real ones fix a bug.

Their programs are packages of npm and PyPI, installed into a folder (--packages keeps it) and started with dummy keys
as `mlx_gemma_mtp.serve --launch` sets them up. They talk to this checkout's HTTP layer, whose model is written down in
agents_model.py; whatever else they want to reach is refused by a proxy, and named. Exit code 1 where a run does not end
with the test of the scratch repository passing, or where a client sends what nobody has decided on.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import uvicorn
from agents_model import BARE, CHECK, CONTEXT, FILES, TASK, WAYS, Agent, steps_of, ways_of
from agents_seen import DECIDED, Noting, Outside

from mlx_gemma_mtp import load
from mlx_gemma_mtp.server.app import make_app
from mlx_gemma_mtp.server.connection import Connection
from mlx_gemma_mtp.server.launch import CLIENTS, Setup, Site, written
from mlx_gemma_mtp.server.limits import Limits
from mlx_gemma_mtp.server.security import Rules
from mlx_gemma_mtp.server.service import Served

PACKAGES = {
    "claude": "@anthropic-ai/claude-code@2.1.332",
    "codex": "@openai/codex@0.171.0",
    "opencode": "opencode-ai@1.18.33",
    "continue": "@continuedev/cli@1.5.47",
    "aider": "aider-chat==0.86.2",
}
PROGRAMS = ("node_modules/.bin", "python/bin")  # in the folder of the packages
SILENT = {"continue"}  # clients that end without a word on a reply that was cut off
MODEL = "gemma"
LONGEST = 6000  # tokens of a reply
LIMIT = re.compile(
    'max_output_tokens|output token|output limit|exceeded the|"reason":"length"'
)  # what a client says of a reply that was cut off
ARGUMENTS = {
    "claude": ["-p", TASK, "--output-format", "stream-json", "--verbose", "--allowedTools", "Bash,Edit,Read"],
    "codex": ["exec", "--strict-config", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", TASK],
    "opencode": ["run", "--format", "json", "--print-logs", "--log-level", "WARN", TASK],
    "continue": ["-p", "--auto", TASK],
    "aider": ["--yes-always", "--auto-test", "--test-cmd", CHECK, "--message", TASK, *FILES],
}


@contextmanager
def serving(engine: Agent, cut: int | None) -> Iterator[tuple[str, Noting]]:
    """Serves an engine, and notes what it is asked."""
    told = Served(engine, MODEL, thinking=True, limits=Limits(output_tokens=LONGEST))
    app = Noting(make_app(told, Rules.of("127.0.0.1", (), told.limits.body)), cut, engine.bare)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=Connection, interface="asgi3", log_level="critical", lifespan="off", ws="none")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def environment_of(setup: Setup, home: Path, outside: Outside) -> dict[str, str]:
    """The whole environment of a client: nothing of whoever runs this."""
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), outside.url)
    local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    own = {"HOME": str(home), "PATH": os.environ["PATH"], "TERM": "dumb", "LANG": "C.UTF-8"}
    return own | proxies | local | {"OPENCODE_DISABLE_MODELS_FETCH": "1"} | setup.variables(None)


def run(client: str, way: str, engine: Any, packages: Path, folder: Path, log: Any, patience: float) -> list[str]:
    """Has a client fix the bug. Returns what was wrong."""
    home, work = folder / "home", folder / "work"
    for each in (home, work):
        each.mkdir(parents=True)
    for name, text in FILES.items():
        (work / name).write_text(text)
    subprocess.run(["git", "init", "-q", work], check=True)
    agent, outside = Agent(engine, steps_of(client, way, work), way, client in BARE), Outside()
    with serving(agent, 4 if way == "cut" else None) as (url, seen):
        setup = CLIENTS[client](Site(url, MODEL, CONTEXT, home / "launch"))
        written(setup, home / "launch")
        program = shutil.which(setup.program, path=os.pathsep.join(str(packages / each) for each in PROGRAMS))
        command = [program, *setup.arguments, *ARGUMENTS[client]]
        began = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=work, env=environment_of(setup, home, outside), stdin=subprocess.DEVNULL, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=patience, check=False,
            )  # fmt: skip
            code, said = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            code, said = None, (late.stdout or b"").decode(errors="replace")
    outside.close()
    log.write(f"\n===== {client}, {way}\n{said}\n")
    check = subprocess.run([sys.executable, "test_calc.py"], cwd=work, capture_output=True, text=True, check=False)
    faults = [f"exit code {code}"] if code else ["not over in time"] if code is None else []
    if check.returncode and not (way == "spent" and (client in SILENT or LIMIT.search(said))):
        faults.append("the test still fails")
    elif way == "spent" and code == 1:
        faults.clear()  # it says that the reply was cut off, and ends
    faults += [] if agent.open == 0 else [f"{agent.open} calls of the engine are still open"]
    faults += [f"undecided: {what}" for what in seen.unknown if what not in DECIDED]
    faults += [f"HTTP {status}: {method} {path}" for method, path, status in seen.requests if status >= 400]
    if way == "cut" and ("CUT", *seen.requests[0][1:2], 0) not in seen.requests:
        faults.append("no stream was cut")
    told = " ".join(f"{method} {path} {status}," for method, path, status in seen.requests)
    took = f"{time.monotonic() - began:.1f} s, {len(agent.replies)} replies"
    print(f"{client}, {way}: {'; '.join(faults) or 'good'} ({took})", flush=True)
    print(f"    {told}")
    for what, count in sorted(seen.unknown.items()):
        print(f"    sends {what} ({count} times): {DECIDED.get(what, 'UNDECIDED')}")
    for what, count in outside.asked.items():
        print(f"    wanted out {count} times: {what}")
    return faults


def install(folder: Path, clients: Sequence[str]) -> None:
    """Installs what is missing of the clients."""
    folder.mkdir(parents=True, exist_ok=True)
    named = [PACKAGES[each] for each in clients if each != "aider"]
    wanted = [each for each in named if not (folder / "node_modules" / each.rpartition("@")[0]).exists()]
    if wanted:
        (folder / "package.json").write_text("{}") if not (folder / "package.json").exists() else None
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", *wanted], cwd=folder, check=True)
    if "aider" in clients and not (folder / "python/bin/aider").exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "python"], check=True)
        subprocess.run([folder / "python/bin/pip", "install", "-q", PACKAGES["aider"]], check=True)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("clients", nargs="*", choices=[*PACKAGES, []], help="which (default: all)")
    p.add_argument("--way", action="append", choices=WAYS, help="repeatable (default: all)")
    p.add_argument("--packages", type=Path, metavar="FOLDER", help="where they are, or are installed and kept")
    p.add_argument("--patience", type=float, default=180, metavar="SECONDS", help="of a run (default: 180)")
    p.add_argument("--log", type=Path, default=Path(os.devnull), metavar="FILE", help="for what the clients say")
    args = p.parse_args()
    clients = args.clients or list(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="agents-") as folder, open(args.log, "a") as log:
        packages = args.packages.absolute() if args.packages else Path(folder, "packages")
        install(packages, clients)
        bad = 0
        with load(draft_model="none") as engine:
            for client in clients:
                for way in filter(args.way.__contains__, ways_of(client)) if args.way else ways_of(client):
                    here = Path(folder, client, way)
                    bad += bool(run(client, way, engine, packages, here, log, args.patience))
                    shutil.rmtree(here, ignore_errors=True)
    print(f"{bad} runs with faults" if bad else "all good")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
