"""A system in a process of its own: `python -m benchmarks.systems SYSTEM TARGET [DRAFTER]`.

It loads, tells on one line of JSON what it is, then answers each line of standard input, {METHOD: {ARGUMENT: VALUE}},
with a line: {"result": ...} or {"error": "..."}. benchmarks/workers.py is the end that asks. What a library prints
goes to standard error. A call has ended when its time is read: its tokens are on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.systems.call import Backlog, Request, System


def load(name: str, target: str, drafter: str, rows: int | None) -> System:
    if name == "mlx-lm":
        from benchmarks.systems.lm import MlxLm as Named
    elif name == "mlx-vlm":
        from benchmarks.systems.vlm import MlxVlm as Named
    elif name == "transformers":
        from benchmarks.systems.hf import Transformers as Named
    else:
        from benchmarks.systems.ours import Ours

        return Ours(target, drafter, rows)
    return Named(target, drafter)


def trace(system: System, tokens: Sequence[int], **request: Any) -> dict[str, float]:
    """Primitives and host syncs of a pass: what a longer call takes more than a shorter one, so that the prefill and
    the ends cancel. tokens: the lengths of the two calls. Empty where both make as many passes.
    """
    from benchmarks.trace import Trace

    counts = []
    for count in tokens:
        with Trace() as counted:
            timing = system.call(Request(max_tokens=count, **request))
        counts.append((timing.passes, counted.primitives, counted.syncs))
    passes, nodes, syncs = (longer - shorter for shorter, longer in zip(*counts, strict=True))
    if passes <= 0:
        return {}
    return {"primitives_per_round": round(nodes / passes, 1), "host_syncs_per_round": round(syncs / passes, 2)}


def methods(system: System) -> dict[str, Callable[..., Any]]:
    """What can be asked."""
    return {
        "call": lambda **request: asdict(system.call(Request(**request))),
        "trace": lambda **request: trace(system, **request),
        "serve": lambda **backlog: asdict(system.serve(Backlog(**backlog))),
    } | system.methods()


def answer(known: dict[str, Callable[..., Any]], line: str) -> dict[str, Any]:
    ((method, arguments),) = json.loads(line).items()
    try:
        return {"result": known[method](**arguments)}
    except Exception as error:  # whatever another project's code raises: it is reported, and the next call may work
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.systems", description="One system of benchmarks.decode.")
    parser.add_argument("system", choices=("mlx_gemma_mtp", "mlx-lm", "mlx-vlm", "transformers"))
    parser.add_argument("target", help="folder of the target")
    parser.add_argument("drafter", nargs="?", default="", help="folder of the drafter")
    parser.add_argument("--rows", type=int, help="of a batch, for the system that is told so when it is loaded")
    args = parser.parse_args(argv)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up between the replies
    system = load(args.system, args.target, args.drafter, args.rows)
    print(json.dumps({"result": system.about()}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(methods(system), line)), file=replies, flush=True)


if __name__ == "__main__":
    main()
