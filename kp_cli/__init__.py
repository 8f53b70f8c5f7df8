"""The `kp` command: a function a subcommand; everything heavy is imported inside it."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from typing import Annotated

try:
    try:
        import typer
    except ImportError:
        sys.exit("kp: the command needs typer and rich, which are not installed; run: pip install 'kp-edge[cli]'")

    from kp_cli import bundles, faces, machines, training, video
    from kp_cli.report import fail, one_line_errors, tell
except KeyboardInterrupt:  # typer does so too, once it runs the command
    sys.exit(130)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich takes half as long to import as a short command takes to run
    context_settings={"help_option_names": ["-h", "--help"]},
    help="68 facial keypoints, from PyTorch to the edge, provably unchanged.",
    epilog="From train on, commands need kp-edge-tools beside kp-edge; a checkout has both.",
)


def _say_version(asked: bool) -> None:
    """Prints what `--version` asks for, and ends."""
    if asked:
        from kp_runtime import __version__
        from kp_runtime.files import git_revision

        revision = git_revision()
        tell(f"kp {__version__}" + (f", revision {revision}" if revision else ""))
        raise typer.Exit


@app.callback()
def _kp(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say which kp this is.")
    ] = False,
) -> None:
    """The options of `kp` itself."""


app.command()(faces.predict)
app.command("filter")(faces.put_effect)
app.command()(video.run)
app.command()(faces.convert)
app.command()(machines.bench)
app.command()(machines.tune)
app.command()(machines.doctor)
app.command()(bundles.inspect)
# from here on with kp-edge-tools alone, as the help's last line says
app.command()(training.train)
app.command()(training.refit)
app.command()(training.train_detector)
app.command("eval")(training.evaluate)
app.command()(bundles.export)
app.command()(bundles.verify)
app.command()(bundles.plan)
app.command()(bundles.pack)
app.command()(bundles.sign)


def main() -> None:
    """Runs the command; errors that a user can do something about become one line on stderr and exit status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text, and most locales refuse to print it
        sys.stdout.reconfigure(errors="backslashreplace")
    for i, word in enumerate(sys.argv[1:], 1):  # an empty path would mean the current folder
        if re.fullmatch("(--[a-z0-9-]+=)?", word):
            words = shlex.join(sys.argv[max(1, i - 1) : i + 1])
            fail("kp", f"an argument is empty: {words}; a shell variable may not be set: name a value, or leave it out")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # see kp_runtime.backend_ort.import_onnxruntime
    try:
        with one_line_errors("kp"):
            app()
    except ImportError as error:
        if error.name == "fcntl":
            fail("kp", "this command needs Linux or macOS, as it locks bundles by fcntl; on Windows use WSL")
        tools = "kp-edge-tools " if (error.name or "").partition(".")[0] in ("kp_train", "kp_export") else ""
        wanted = f"pip install {tools}'kp-edge[export]'"
        fail("kp", f"this command needs a package that is not here ({error}); run: {wanted}")
