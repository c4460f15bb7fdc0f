"""Judges from outside: `python tests/external/judges.py llmprobe` or `schemathesis`.

Each is installed from its registry into a folder that is removed afterwards, runs against a server of this checkout
with the bundled pair (or --url), and sends nothing anywhere else. Exit code 1 where it finds what must not be.

llmprobe (npm): how far a server keeps to OpenAI's and Anthropic's interfaces. What a model of this size cannot do is
named in MODEL; with --written a model that is written down (judges_model.py) does it, and nothing is excused.
schemathesis (PyPI): requests drawn from the OpenAPI document, answers compared with it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

LLMPROBE, SCHEMATHESIS = "llmprobe@0.6.12", "schemathesis==4.32.5"
FLAGS = ["--no-parent", "--num-draft-tokens", "3"]  # of a server that is started
# MUST failures that are the bundled model's: a text, or a call's argument, that goes on until max_tokens is cut amid
# its JSON, with the finish reason "length", as OpenAI's are; and a name that it was told, and cannot say.
MODEL = {f"{route}-{what}" for route in ("chat", "responses") for what in ("json-mode-parses", "typed-args-json")}
MODEL.add("responses-chain-remembers")
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    "negative_data_rejection",
)
OPERATIONS = 5  # routes with bodies, among which the cases are shared


@contextmanager
def served(args: argparse.Namespace, *flags: str):
    """The address of a server: the given one, or one that is started."""
    from benchmarks.server.processes import Serving

    if args.url is not None:
        yield args.url
        return
    if args.written:
        from judges_model import Knowing
        from serving import serving

        from mlx_gemma_mtp import load

        with load(draft_model="none") as engine, serving(Knowing(engine)) as url:
            yield url
        return
    model = ["--model", args.model] if args.model else []
    server = Serving(["mlx_gemma_mtp.serve", *FLAGS, *model, *flags], "openblas")
    try:
        yield server.url
        for line in server.said().splitlines():
            if " ERROR " in line or "Traceback" in line:
                print("log:", line[:300])
    finally:
        server.close()


def llmprobe(args: argparse.Namespace, folder: Path) -> bool:
    """Whether no MUST fails but for the model's."""
    subprocess.run(["npm", "install", "--no-save", "--no-audit", "--no-fund", LLMPROBE], cwd=folder, check=True)
    script, found = folder / "node_modules/llmprobe/bin/dist/llmprobe.mjs", folder / "found.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLMPROBE_")}
    with served(args, "--max-output-tokens", "300") as url:
        subprocess.run(
            ["node", script, url, "--no-save", "--no-bench", "--no-color", "--reasoning", "default", "--timeout", "300",
             "--json", "--save", found, *(["--full"] if args.full else [])],
            env=environment | {"HOME": str(folder)}, stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    judged = json.loads(found.read_text())["conformance"]
    if args.save:
        args.save.write_bytes(found.read_bytes())
    print(f"llmprobe: {judged['passed']} of {judged['total']} checks; not decided: {len(judged['inconclusive'])}")
    bad = False
    for result in judged["results"]:
        for failure in result["failures"]:
            model = failure["id"] in MODEL and not args.written
            bad |= failure["severity"] == "MUST" and not model
            print(f"  {failure['severity']}{' (the model)' if model else ''}: {failure['id']}: {failure['message']}")
    for each in judged["inconclusive"]:
        print(f"  not decided: {each['id']}: {each['reason']}")
    return not bad


def schemathesis(args: argparse.Namespace, folder: Path) -> bool:
    """Whether no case finds a fault of the server, or an answer that the document does not describe."""
    program = Path(sys.executable).parent / "st"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        subprocess.run([folder / "venv/bin/pip", "install", "-q", SCHEMATHESIS], check=True)
        program = folder / "venv/bin/st"
    with served(
        args, "--max-output-tokens", "4", "--timeout", "20", "--max-prompt-tokens", "500", "--alias", "*"
    ) as url:
        began = time.monotonic()
        done = subprocess.run(
            [program, "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS), "--phases", "fuzzing",
             "-n", str(-(-args.cases // OPERATIONS)), "--workers", "4", "--continue-on-failure", "--no-color",
             "--request-timeout", "120", "--suppress-health-check", "all", "--generation-database", "none",
             "--seed", str(args.seed), "--report", "json", "--report-json-path", folder / "found.json"],
            cwd=folder, check=False,
        )  # fmt: skip
        print(f"schemathesis: {time.monotonic() - began:.0f} s, exit code {done.returncode}")
    if args.save:
        args.save.write_bytes((folder / "found.json").read_bytes())
    return done.returncode == 0


JUDGES = {"llmprobe": llmprobe, "schemathesis": schemathesis}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("judge", choices=JUDGES)
    p.add_argument("--url", help="of a server that runs, without /v1")
    p.add_argument("--model", help="of a server that is started (default: the bundled pair)")
    p.add_argument("--written", action="store_true", help="of llmprobe: the model is written down")
    p.add_argument("--full", action="store_true", help="of llmprobe: its slow checks too")
    p.add_argument("--cases", type=int, default=5000, help="of schemathesis, at least (default: 5000)")
    p.add_argument("--seed", type=int, default=1, help="of schemathesis (default: 1)")
    p.add_argument("--save", type=Path, metavar="FILE", help="keep what was found")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="judge-") as folder:
        return int(not JUDGES[args.judge](args, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
