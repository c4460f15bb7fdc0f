"""The prompts of tests/data: what models of the tests were not trained on."""

import json
from pathlib import Path

PROMPTS = [each["prompt"] for each in json.loads((Path(__file__).parent / "data" / "prompts.json").read_text())]
