"""Coding agents set up for this server: their environment, their files in a folder of their own, and their start."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..files.files import cache_folder, whole

KEY = "MLX_GEMMA_MTP_API_KEY"  # variable with the API key
NO_KEY = "none"  # what clients send that insist on a key, to a server without
MARK = ".mlx-gemma-mtp"  # is in a folder whose files are written here
PROVIDER = "mlx_gemma_mtp"
REPLY = 8192  # tokens of a reply, for clients that want to know; less where the context is short


@dataclass(frozen=True)
class Site:
    """What a client has to know. url: of the server, without /v1. context: tokens. folder: for its files."""

    url: str
    model: str
    context: int
    folder: Path

    @property
    def reply(self) -> int:
        """Tokens of the longest reply."""
        return min(REPLY, self.context // 4)


@dataclass(frozen=True)
class Setup:
    """How a client is started.

    title, program: its names. install: the command that gets it. environment: its variables; KEY as a value stands for
    the key. unset: variables that would lead it elsewhere. files: texts by their names in the folder. arguments: its
    own, before those of the user.
    """

    title: str
    program: str
    install: str
    environment: Mapping[str, str] = field(default_factory=dict)
    unset: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()

    def variables(self, key: str | None) -> dict[str, str]:
        """Returns the variables with the key in its place."""
        return {name: (key or NO_KEY) if value == KEY else value for name, value in self.environment.items()}


def claude(site: Site) -> Setup:
    """Claude Code speaks Anthropic's messages; its background models are this one, too."""
    kinds = ("HAIKU", "SONNET", "OPUS", "FABLE")
    return Setup(
        "Claude Code",
        "claude",
        "npm install -g @anthropic-ai/claude-code",
        {
            "ANTHROPIC_BASE_URL": site.url,
            "ANTHROPIC_AUTH_TOKEN": KEY,
            "ANTHROPIC_MODEL": site.model,
            **{f"ANTHROPIC_DEFAULT_{kind}_MODEL": site.model for kind in kinds},
            "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(site.context),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(site.reply),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        },
        unset=("ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX"),
    )


def codex(site: Site) -> Setup:
    """Codex speaks Responses. Its home is the folder, so that nothing of the user's own is read or written."""
    lines = [
        f"model = {json.dumps(site.model)}",
        f'model_provider = "{PROVIDER}"',
        f"model_context_window = {site.context}",
        "show_raw_agent_reasoning = true",
        'web_search = "disabled"',
        "check_for_update_on_startup = false",
        "",
        f"[model_providers.{PROVIDER}]",
        'name = "mlx_gemma_mtp"',
        f"base_url = {json.dumps(site.url + '/v1')}",
        f'env_key = "{KEY}"',
        'wire_api = "responses"',
        "",
        "[analytics]",
        "enabled = false",
    ]
    return Setup(
        "Codex",
        "codex",
        "npm install -g @openai/codex",
        {"CODEX_HOME": str(site.folder), KEY: KEY},
        files={"config.toml": "\n".join(lines) + "\n"},
    )


def opencode(site: Site) -> Setup:
    """opencode speaks chat completions. Its file comes beside the user's own, and wins."""
    model = {
        "name": site.model,
        "tool_call": True,
        "reasoning": True,
        "limit": {"context": site.context, "output": site.reply},
    }
    options = {"baseURL": f"{site.url}/v1", "apiKey": f"{{env:{KEY}}}"}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "mlx_gemma_mtp",
        "options": options,
        "models": {site.model: model},
    }
    config = {
        "$schema": "https://opencode.ai/config.json",
        "provider": {PROVIDER: provider},
        "model": f"{PROVIDER}/{site.model}",
        "small_model": f"{PROVIDER}/{site.model}",
        "autoupdate": False,
        "share": "disabled",
    }
    return Setup(
        "opencode",
        "opencode",
        "npm install -g opencode-ai",
        {"OPENCODE_CONFIG": str(site.folder / "opencode.json"), KEY: KEY},
        files={"opencode.json": json.dumps(config, indent=2) + "\n"},
    )


def aider(site: Site) -> Setup:
    """Aider speaks chat completions, through litellm, which does not know the model."""
    name = f"openai/{site.model}"
    config = {
        "model": name,
        "weak-model": name,
        "openai-api-base": f"{site.url}/v1",
        "model-metadata-file": str(site.folder / "model.json"),
        "show-model-warnings": False,
        "check-update": False,
        "analytics": False,
    }
    about = {
        "max_input_tokens": site.context,
        "max_output_tokens": site.reply,
        "litellm_provider": "openai",
        "mode": "chat",
        "input_cost_per_token": 0,
        "output_cost_per_token": 0,
    }
    lines = (f"{option}: {json.dumps(value)}\n" for option, value in config.items())
    return Setup(
        "Aider",
        "aider",
        "pip install aider-chat",
        {"OPENAI_API_KEY": KEY},
        files={"aider.conf.yml": "".join(lines), "model.json": json.dumps({name: about}, indent=2) + "\n"},
        arguments=("--config", str(site.folder / "aider.conf.yml")),
    )


def continue_(site: Site) -> Setup:
    """Continue's command line speaks chat completions; the file also suits its editors."""
    lines = [
        "name: mlx_gemma_mtp",
        "version: 1.0.0",
        "schema: v1",
        "models:",
        f"  - name: {json.dumps(site.model)}",
        "    provider: openai",
        f"    model: {json.dumps(site.model)}",
        f"    apiBase: {json.dumps(site.url + '/v1')}",
        f"    apiKey: ${{{{ secrets.{KEY} }}}}",
        "    roles: [chat, edit, apply]",
        "    capabilities: [tool_use]",
        "    defaultCompletionOptions:",
        f"      contextLength: {site.context}",
        f"      maxTokens: {site.reply}",
    ]
    return Setup(
        "Continue",
        "cn",
        "npm install -g @continuedev/cli",
        {KEY: KEY},
        files={"config.yaml": "\n".join(lines) + "\n"},
        arguments=("--config", str(site.folder / "config.yaml")),
    )


CLIENTS: dict[str, Callable[[Site], Setup]] = {
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
    "aider": aider,
    "continue": continue_,
}


def folder_of(client: str, named: str | None) -> Path:
    """Returns the folder for a client's files. named: by the user; None is one beside the caches of this package."""
    return Path(named).expanduser().absolute() if named else cache_folder() / "launch" / client


def written(setup: Setup, folder: Path) -> None:
    """Writes a client's files into its folder. Raises UserError where the folder has files that came from elsewhere."""
    if not setup.files:
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--launch-folder {folder} is no folder; expected one that is empty, or does not exist")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise UserError(
            f"--launch-folder {folder} has files that were not written here; expected a folder that is empty, or does "
            "not exist: nothing of yours is written over"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / MARK).touch()
    for name, text in setup.files.items():
        with whole(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def shown_setup(setup: Setup, keyed: bool) -> str:
    """Returns the lines of a shell that start a client. keyed: whether the server has keys, which are never shown."""
    lines = [f"# {setup.title}; installed by: {setup.install}"]
    lines += [f"unset {name}" for name in setup.unset]
    for name, value in setup.environment.items():
        if value != KEY:
            lines.append(f"export {name}={shlex.quote(value)}")
        elif not keyed:
            lines.append(f"export {name}={NO_KEY}")
        elif name != KEY:
            lines.append(f'export {name}="${KEY}"')
    return "\n".join([*lines, shlex.join([setup.program, *setup.arguments])])


def command_of(setup: Setup, given: Sequence[str]) -> list[str]:
    """Returns the command of a client. given: the user's arguments. Raises UserError where it is not installed."""
    program = shutil.which(setup.program)
    if program is None:
        raise UserError(f"{setup.title} is not installed: there is no {setup.program!r}; run {setup.install}")
    return [program, *setup.arguments, *given]


def environment_of(setup: Setup, key: str | None) -> dict[str, str]:
    """Returns the environment of a client: this process's own, changed as it needs it."""
    own = {name: value for name, value in os.environ.items() if name not in setup.unset}
    return own | setup.variables(key)
