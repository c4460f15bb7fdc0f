"""The trained pairs beside the tests: what was recorded of them keeps its meaning when the bundled pair changes.

Each holds target/ and drafter/. MOE has the sizes of the bundled pair, and was it once; E2B is of E2B's kind.
"""

from pathlib import Path

DATA = Path(__file__).parent / "data"
MOE, E2B = DATA / "moe", DATA / "e2b"

# For `load`: MOE loops, says one thing for long and writes no calls, which the bundled pair was taught not to.
OF_MOE = {"model": MOE / "target", "draft_model": MOE / "drafter"}
