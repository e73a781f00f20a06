"""The command line: every command resolves the settings, then imports and calls one service module."""

import json
import os
import platform
import secrets
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from buffer.errors import StalewiseError
from services.log_lines import LogSettings, set_up_logging
from services.objectives_cli import objectives_app
from services.settings import RunConfig, connect, describe, load_config

app = typer.Typer(
    name="stalewise",
    help="Asynchronous off-policy RL for language models, around one durable replay buffer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(objectives_app, name="objectives")

Config = Annotated[Path | None, typer.Option("--config", help="TOML file of settings, such as recipes/demo.toml.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one setting; may be repeated.")
]


def main() -> None:
    """Run a command; an error that a user can meet is one sentence on stderr and its exit code."""
    set_up_logging(LogSettings(), run_id="")
    try:
        app()
    except StalewiseError as error:
        print(f"stalewise: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"stalewise {version('stalewise')}, Python {platform.python_version()}, torch {version('torch')}")
        raise typer.Exit


@app.callback()
def stalewise(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Take what stands before a command: --version alone."""


@app.command()
def serve(config: Config = None, overrides: Overrides = []) -> None:  # noqa: B006  typer never changes it
    """Serve a run's replay buffer and weights."""
    settings = _load(config, overrides)
    from services.serve import run_service

    run_service(settings)


@app.command()
def learn(
    config: Config = None,
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint, or begin without one: for runs that may be preempted.",
        ),
    ] = False,
) -> None:
    """Train on what the buffer hands out, and publish versions."""
    settings = _load(config, overrides)
    from services.learner_service import run_learner

    run_learner(settings, resume=resume)


@app.command()
def act(
    config: Config = None,
    overrides: Overrides = [],  # noqa: B006
    actor_id: Annotated[
        str | None, typer.Option("--actor-id", help="Name of this actor; default: the first free HOST-NUMBER.")
    ] = None,
    engine: Annotated[str | None, typer.Option("--engine", help="torch or vllm; overrides actor.engine.")] = None,
    follow_only: Annotated[
        bool,
        typer.Option(
            "--follow-only",
            help="Generate nothing: keep the server at actor.vllm.url at the newest version, for agents.",
        ),
    ] = False,
) -> None:
    """Generate groups with the newest weights and submit them."""
    settings = _load(config, overrides)
    from services.actor_service import run_actor

    run_actor(settings, actor_id=actor_id, engine=engine, follow_only=follow_only)


@app.command("serve-vllm")
def serve_vllm(
    config: Config = None,
    overrides: Overrides = [],  # noqa: B006
    host: Annotated[str, typer.Option("--host", help="Address to listen on; whoever reaches it controls it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", help="Port; actor.vllm.url of the actor names it.")] = 8100,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampler; default: another one each time.")] = None,
) -> None:
    """Start the vLLM server of an actor whose actor.vllm.url names it: docs/vllm.md."""
    settings = _load(config, overrides)
    from actor.vllm.server import run_server
    from services.model_dir import local_model_dir

    run_server(
        local_model_dir(settings.run.model),
        settings.actor.vllm,
        host=host,
        port=port,
        seed=secrets.randbelow(1 << 31) if seed is None else seed,
    )


@app.command()
def demo(
    config: Config = Path("recipes/demo.toml"),
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run service, learner and actors as separate processes, and report what was learned."""
    settings = _load(config, overrides)
    from services.demo import run_demo

    run_demo(settings, arguments=_arguments(config, overrides))


@app.command("make-model")
def make_tiny_model(
    out_dir: Annotated[Path, typer.Argument(help="Directory to write, such as models/mine.")],
    seed: Annotated[int, typer.Option("--seed", help="Of the first weights and of the teacher.")] = 0,
    warmup_steps: Annotated[
        int | None, typer.Option("--warmup-steps", help="Supervised steps; default: what the demo's model had.")
    ] = None,
) -> None:
    """Make the demo's tiny model: config, tokenizer, and weights that imitate a teacher who slips."""
    from services.make_model import WARMUP_STEPS, make_model

    make_model(out_dir, seed=seed, warmup_steps=WARMUP_STEPS if warmup_steps is None else warmup_steps)


@app.command("make-tokens")
def make_role_tokens(
    directory: Annotated[Path, typer.Argument(help="Where to write one file a role, such as /run/stalewise.")],
    config: Config = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write the bearer token of each role to a file: the one of service.tokens, else a random one, made once."""
    settings = _load(config, overrides)
    from services.tokens import make_tokens

    for path in make_tokens(directory, settings.service.tokens):
        print(f"written: {path}")


@app.command()
def ping(config: Config = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Ask the service who it is, once and with this process's token: a health check for learners and actors."""
    settings = _load(config, overrides)
    once = settings.model_copy(update={"client": settings.client.model_copy(update={"retry_budget_s": 0.0})})
    run = connect(once).run_info()
    print(f"run {run.run_id}, latest version {run.latest_version}")


@app.command()
def stats(
    config: Config = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and end.")] = False,
) -> None:
    """Show the live numbers of a running service until Ctrl-C."""
    settings = _load(config, overrides)
    if as_json:
        print(json.dumps(connect(settings).stats(), indent=2))
        return
    from rich.console import Console

    from services.live_stats import show_stats

    show_stats(
        connect(settings),
        title=settings.run.name,
        total_updates=settings.learner.total_updates,
        console=Console(),
    )


@app.command("export")
def export_groups(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File to write: .jsonl or .parquet.")],
    config: Config = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write the groups that a running service stores to a file."""
    settings = _load(config, overrides)
    from services.transfer import export_file

    print(f"{export_file(connect(settings), path)} groups written to {path}")


@app.command("import")
def import_groups(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="File of an export: .jsonl or .parquet.")],
    config: Config = None,
    overrides: Overrides = [],  # noqa: B006
    foreign: Annotated[
        bool, typer.Option("--foreign", help="Other weights than this run's drew the tokens: versions become null.")
    ] = False,
    patience_s: Annotated[
        float, typer.Option("--patience-s", help="Give up when the table was full for so long.")
    ] = 60.0,
) -> None:
    """Insert the groups of a file into a running service."""
    settings = _load(config, overrides)
    from services.transfer import import_file

    for outcome, number in import_file(connect(settings), path, foreign=foreign, patience_s=patience_s).items():
        print(f"{outcome}: {number}")


@app.command("settings")
def show_settings(config: Config = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Print the resolved settings and end."""
    print(describe(_load(config, overrides)))


def _load(config: Path | None, overrides: list[str]) -> RunConfig:
    settings = load_config(config, overrides=overrides, environment=os.environ)
    set_up_logging(settings.log, run_id=settings.run.name)
    return settings


def _arguments(config: Path | None, overrides: list[str]) -> list[str]:
    """Return the options that give a child process the same settings."""
    given = [part for override in overrides for part in ("--set", override)]
    return (["--config", str(config)] if config else []) + given


if __name__ == "__main__":
    main()
