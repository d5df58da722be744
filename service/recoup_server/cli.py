"""`recoup-server`: up | api | worker | migrate | engine | teacher | keys | demo | align.

What each starts is imported then.
"""

import gc
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from recoup_jobs.settings import Settings
from recoup_server import keys

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
DEFAULT_PORT, TEACHER_PORT = 8321, 8000

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run Recoup's service and workers.")

app.add_typer(keys.app, name="keys")

Home = Annotated[
    Path | None, typer.Option(help="Where everything is kept. [default: RECOUP_HOME or ~/.recoup]")
]
Host = Annotated[str, typer.Option(help="Address to listen on; anything but loopback needs a key.")]
Port = Annotated[int, typer.Option(min=1, max=65535)]


def main() -> None:
    app()


@app.command()
def up(home: Home = None, host: Host = "127.0.0.1", port: Port = DEFAULT_PORT) -> None:
    """Start a whole installation on this machine: broker, API and one worker."""
    from recoup_server.embedded import StartError, running

    settings = _settings(home)
    _require_key(settings, host)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        with running(settings, host, port) as installation:
            typer.echo(f"Recoup is up on {installation.url} (documentation: {installation.url}/docs).")
            typer.echo(f"Models go below {settings.model_roots[0]}. Stop it with Ctrl-C.")
            while True:
                installation.check()
                time.sleep(1.0)
    except KeyboardInterrupt:
        typer.echo("Stopped.")
    except StartError as error:
        typer.echo(str(error), err=True)
        sys.exit(1)


@app.command()
def api(home: Home = None, host: Host = "127.0.0.1", port: Port = DEFAULT_PORT) -> None:
    """Serve the REST API and publish hints to the workers."""
    import uvicorn

    from recoup_api.app import create_app
    from recoup_api.limit import LONGEST_HEAD
    from recoup_jobs.ledger import open_ledger

    settings = _settings(home)
    _observed(settings, "recoup-api")
    _require_key(settings, host)
    ledger = open_ledger(settings)
    try:
        served = create_app(settings, ledger, sweep=True)
        gc.freeze()  # what a service is made of stays: no request looks through it for garbage
        uvicorn.run(
            served,
            host=host,
            port=port,
            timeout_graceful_shutdown=5,
            server_header=False,
            log_config=None,
            h11_max_incomplete_event_size=LONGEST_HEAD,
        )
    finally:
        ledger.close()


@app.command()
def worker(
    home: Home = None,
    once: Annotated[
        bool,
        typer.Option("--once", help="Take up the best job that waits, if there is one, and end with it."),
    ] = False,
) -> None:
    """Take up recoveries from the queue, one at a time."""
    from recoup_worker.main import serve, serve_once

    gc.freeze()  # what the imports left stays
    settings = _settings(home)
    _observed(settings, "recoup-worker")
    (serve_once if once else serve)(settings)


@app.command()
def migrate(home: Home = None) -> None:
    """Bring the ledger's schema up to date and end. API and workers do so too when they start."""
    from recoup_jobs.ledger import open_ledger

    settings = _settings(home)
    _observed(settings, "recoup-migrate")
    open_ledger(settings).close()


@app.command()
def engine(
    socket: Annotated[Path, typer.Option(help="The unix socket to listen on.")], home: Home = None
) -> None:
    """Answer for deployments by transformers, one request at a time, where there is no vLLM."""
    from recoup_worker.engine import serve

    serve(_settings(home), socket)


@app.command(context_settings={"allow_extra_args": True})
def teacher(
    context: typer.Context,
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the teacher.")],
    home: Home = None,
    port: Port = TEACHER_PORT,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Longest sequence in tokens. [default: the model's]")
    ] = None,
) -> None:
    """Serve a teacher by vLLM, from an environment of its own; more of vLLM's flags after `--`."""
    from recoup_server.embedded import StartError
    from recoup_server.teacher import Teacher, serve

    asked = Teacher(model.resolve(), "127.0.0.1", port, max_length, tuple(context.args))
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        serve(asked, _settings(home), typer.echo)
    except KeyboardInterrupt:
        typer.echo("Stopped.")
    except StartError as error:
        typer.echo(str(error), err=True)
        sys.exit(1)


@app.command()
def demo(
    damage: Annotated[Literal["finetuning", "quantization", "pruning"], typer.Option()] = "finetuning",
    home: Home = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="The teacher answers from vLLM.")] = False,
) -> None:
    """Damage a real small model, recover it through the API, and print the verdict."""
    from recoup_server.demo import run_demo
    from recoup_server.embedded import StartError

    try:
        sys.exit(run_demo(damage, _settings(home), by_vllm=vllm))
    except StartError as error:
        typer.echo(str(error), err=True)
        sys.exit(1)


@app.command()
def align(
    student: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of one model.")],
    teacher: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the other.")],
    out: Annotated[Path, typer.Option(help="Folder for alignment.json, .csv, .png, .svg and .safetensors.")],
    prompts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSONL of prompts or text. [default: built in]"),
    ] = None,
    texts: Annotated[int, typer.Option(min=2, max=1_000_000, help="At most so many texts.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, max=32_768, help="At most so many tokens a text.")] = 32,
    max_length: Annotated[int, typer.Option(min=2, max=32_768, help="Where a text is cut.")] = 256,
    completion_only: Annotated[bool, typer.Option(help="Compare only tokens of completions.")] = False,
    controls: Annotated[bool, typer.Option(help="Also measure ceiling and floor.")] = True,
    pooled: Annotated[bool, typer.Option(help="Compare texts by their means, not tokens.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    json: Annotated[bool, typer.Option(help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare two models layer by layer (CKA, with intervals), without a recovery."""
    from recoup_server.align import Comparison, run_align

    asked = Comparison(
        student, teacher, prompts, out, texts, tokens, max_length, completion_only, controls, pooled, seed
    )
    sys.exit(run_align(asked, json))


def _settings(home: Path | None) -> Settings:
    return Settings(home=home) if home else Settings()


def _observed(settings: Settings, service: str) -> None:
    from recoup_jobs import logs, tracing

    logs.configure(settings.log_format)
    tracing.start(service)


def _require_key(settings: Settings, host: str) -> None:
    if host not in LOOPBACK and settings.api_key is None and not _has_keys(settings):
        message = "make one with `recoup-server keys create`, set RECOUP_API_KEY, or listen on 127.0.0.1"
        typer.echo(f"Listening on {host} needs a key: {message}.", err=True)
        sys.exit(2)


def _has_keys(settings: Settings) -> bool:
    from recoup_jobs.keys import any_key
    from recoup_jobs.ledger import open_ledger

    ledger = open_ledger(settings)
    try:
        return any_key(ledger)
    finally:
        ledger.close()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
