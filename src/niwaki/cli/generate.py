"""The command `niwaki generate`: a continuation of one prompt."""

from typing import Annotated, Any

import typer

from niwaki.cli.options import Device, Model, check_inputs, print_line


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Max tokens of the continuation.")] = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of the sampling. 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    verify: Annotated[
        int,
        typer.Option(help="Contextual models: the full model checks and corrects every N tokens. 0: never."),
    ] = 0,
    device: Device = "auto",
) -> None:
    """Continue PROMPT with MODEL."""
    check_inputs(model, device=device)
    from niwaki.runtime.load import generate as run

    settings: dict[str, Any] = {"temperature": temperature, "seed": seed, "verify": verify, "device": device}
    print_line(run(model, prompt, max_new_tokens=max_new_tokens, **settings))
