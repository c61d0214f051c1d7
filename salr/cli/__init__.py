"""The `salr` command: each subcommand parses its flags and calls one library function.

Exit status: 0 done, 1 refused or failed, 2 usage, 3 verify mismatch, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from . import adapters, bench, console, convert, doctor, eval, export, finetune, generate, inspect, join, unpack, verify

app = typer.Typer(
    name="salr",
    help="Turn a dense or LoRA-fine-tuned language model into one sparse + low-rank .salr file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert", rich_help_panel="Make")(console.guarded(convert.convert))
app.command("finetune", rich_help_panel="Make")(console.guarded(finetune.finetune))
app.add_typer(adapters.app, name="adapters", rich_help_panel="Make")
app.command("inspect", rich_help_panel="Look")(console.guarded(inspect.inspect))
app.command("verify", rich_help_panel="Look")(console.guarded(verify.verify))
app.command("eval", rich_help_panel="Look")(console.guarded(eval.evaluate))
app.command("generate", rich_help_panel="Run")(console.guarded(generate.generate))
app.command("bench", rich_help_panel="Run")(console.guarded(bench.bench))
app.add_typer(export.app, name="export", rich_help_panel="Leave")
app.command("unpack", rich_help_panel="Leave")(console.guarded(unpack.unpack))
app.command("join", rich_help_panel="Tools")(console.guarded(join.join))
app.command("doctor", rich_help_panel="Tools")(console.guarded(doctor.doctor))


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        app()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
