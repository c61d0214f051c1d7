"""`salr generate`: text from a .salr file, as it comes; without a prompt a conversation."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..formats.errors import OptionError
from . import console

if TYPE_CHECKING:
    from ..runtime.generation import Generated, GenerateOptions, Message

Device = Annotated[str, typer.Option(help="cpu or cuda[:i].")]
Dtype = Annotated[str, typer.Option(help="Of activations: auto (the model's), bf16, fp16 or fp32.")]
Backend = Annotated[str | None, typer.Option(help="What computes.", show_default="see `salr doctor`")]


def generate(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")],
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="No prompt: a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message for the chat template.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0: the likeliest token each time.", show_default="the model's own")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling.", show_default="another each time")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; no chat template.")] = False,
    adapter: Annotated[
        list[str], typer.Option(metavar="NAME[=SCALE]", help="Only these adapters; 'none'.", show_default="all")
    ] = [],  # noqa: B006
    device: Device = "cpu",
    dtype: Dtype = "auto",
    backend: Backend = None,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Generate text with FILE, in the model's chat format where it has one."""
    from ..runtime.generation import GenerateOptions, has_chat_template
    from ..runtime.loading import load, load_tokenizer

    options = GenerateOptions(max_tokens, temperature, seed, raw)
    scales = parse_scales(adapter)
    if prompt is None and as_json:
        raise OptionError("--json without a prompt", fix="give a prompt")
    tokenizer = load_tokenizer(path)
    if system is not None and (raw or not has_chat_template(tokenizer)):
        raise OptionError("--system without a chat template", fix="drop it, or write it into the prompt")
    model = load(path, device=device, dtype=dtype, backend=backend)
    if scales is not None:
        model.set_adapters(scales)
    opening = [{"role": "system", "content": system}] if system is not None else []
    if prompt is None:
        return _converse(model, tokenizer, opening, options, quiet)
    answer = _answer(model, tokenizer, [*opening, {"role": "user", "content": prompt}], options, as_json)
    if as_json:
        return console.say_json(asdict(answer) | {"tokens_per_second": answer.tokens_per_second})
    return _show_cost(answer, model, quiet)


def _converse(model: Any, tokenizer: Any, messages: list[Message], options: GenerateOptions, quiet: bool) -> None:
    """Read a line, answer it, and go on until the input ends."""
    from ..runtime.generation import has_chat_template

    if not quiet and not has_chat_template(tokenizer):
        console.err.print("The model has no chat template: each line is continued on its own.", style="yellow")
    while True:
        if sys.stdin.isatty():
            console.err.print("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        answer = _answer(model, tokenizer, messages, options, silent=False)
        messages.append({"role": "assistant", "content": answer.text})
        _show_cost(answer, model, quiet)


def _answer(model: Any, tokenizer: Any, messages: list[Message], options: GenerateOptions, silent: bool) -> Generated:
    from ..runtime.generation import generate as run

    def write(text: str) -> None:
        typer.echo(text, nl=False)
        sys.stdout.flush()

    answer = run(model, tokenizer, messages, options, (lambda text: None) if silent else write)
    if not silent:
        typer.echo()
    return answer


def _show_cost(answer: Generated, model: Any, quiet: bool) -> None:
    """Print tokens and speed on stderr, so that stdout holds the text alone; say where only the reference computes."""
    from ..runtime.benchmark import backend_of

    if not quiet:
        slow = "; the reference backend decodes every weight at each token, `salr doctor` says why it computes"
        rate = f", {answer.tokens_per_second:.1f} tokens/s after the first" if answer.tokens_per_second else ""
        console.err.print(
            f"{answer.n_prompt_tokens} tokens read, first answered in {answer.first_token_seconds:.2f} s; "
            f"{answer.n_new_tokens} written{rate}{', up to the last of its positions' if answer.is_cut else ''}"
            f"{slow if backend_of(model) == 'reference' else ''}",
            style="dim",
        )


def parse_scales(texts: list[str]) -> dict[str, float] | None:
    """Parse NAME[=SCALE]; ``none`` alone switches every adapter off, nothing leaves them as they are.

    Raises:
        OptionError: a scale is no number.
    """
    if not texts:
        return None
    scales = {}
    for text in texts:
        name, equals, scale = text.partition("=")
        try:
            scales[name] = float(scale) if equals else 1.0
        except ValueError as error:
            raise OptionError(f"--adapter {text!r}: scale {scale!r}", needed="a number") from error
    return {} if texts == ["none"] else scales
