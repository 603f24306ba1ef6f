"""The verbs `fira export` and `fira import`: models in the formats of other programs."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fira.cli.command import EXISTING, NEW_FOLDER, example

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0")


@click.group(epilog=example("fira export hf out/quickstart/run out/hf"))
def export() -> None:
    """Write a run in another format or with smaller weights."""


@export.command("hf", epilog=example("fira export hf out/quickstart/run out/hf --dtype bfloat16"))
@click.argument("run", type=EXISTING)
@click.argument("folder", type=NEW_FOLDER)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              show_default="as in the run", help="Data type of the weights.")
def export_hf(run: Path, folder: Path, dtype: str | None) -> None:
    """Write RUN as a Hugging Face model.

    FOLDER is created. A FIRA2 model becomes a Qwen3 model, which transformers 4 and 5 load without
    other code. A FIRA model is written together with its code, for trust_remote_code=True. The
    model card, README.md, is that of fira card.
    """
    from fira.convert.hf import export_run
    from fira.report.card import make_card
    from fira.runlog import console

    export_run(run, folder, dtype, console(), make_card)


@export.command("gguf", epilog=example(
    "fira export gguf out/quickstart/run out/fira.gguf --type q8_0"))
@click.argument("run", type=EXISTING)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--type", "type_name", type=click.Choice(GGUF_TYPES), default="f16",
              show_default=True, help="Type of the matrices; norms and routers stay f32.")
def export_gguf(run: Path, file: Path, type_name: str) -> None:
    """Write RUN as a GGUF file for llama.cpp and Ollama.

    The file contains the tokenizer. A Modelfile for ollama create is written beside it.
    """
    from fira.convert.gguf import export_run
    from fira.runlog import console

    export_run(run, file, type_name, console())


@export.command("peft", epilog=example("fira export peft out/chat out/chat-peft"))
@click.argument("run", type=EXISTING)
@click.argument("folder", type=NEW_FOLDER)
def export_peft(run: Path, folder: Path) -> None:
    """Write the adapter in RUN as PEFT's files.

    PEFT loads FOLDER onto the Hugging Face model that fira export hf makes of the adapter's base.
    """
    from fira.convert.lora import export_peft as write_adapter
    from fira.runlog import console

    write_adapter(run, folder, console())


def _quantized(kind: str, weights: str) -> click.Command:
    """The command `fira export int8` or `fira export int4`."""
    @click.command(kind, help=f"""Write RUN with {weights} of the size.

    FOLDER is created as a run folder, for fira generate, chat, serve and eval. The command prints
    how each tensor is stored; routers, norms and biases keep their precision.
    """, epilog=example(f"fira export {kind} out/quickstart/run out/{kind} --text README.md"))
    @click.argument("run", type=EXISTING)
    @click.argument("folder", type=NEW_FOLDER)
    @click.option("--text", "texts", multiple=True, metavar="SOURCE",
                  help="Print bits per byte of this text before and after; may be repeated.")
    def export_quantized(run: Path, folder: Path, texts: tuple[str, ...]) -> None:
        from fira.convert.quantize import export_run
        from fira.runlog import console

        export_run(run, folder, kind, console(), _bits_per_byte(list(texts)) if texts else None)
    return export_quantized


def _bits_per_byte(sources: list[str]) -> Callable[[Any, Any], float]:
    """A function that scores a model and its tokenizer on `sources`."""
    from fira.data.sources import inputs
    from fira.data.text import items
    from fira.eval.bits_per_byte import score

    given = inputs(sources)
    return lambda model, tokenizer: score(model, tokenizer, items(given))["bits_per_byte"]


export.add_command(_quantized("int8", "8-bit weights, a quarter"))
export.add_command(_quantized("int4", "4-bit weights, about a sixth"))


@click.group("import", epilog=example("fira import hf Qwen3-0.6B out/qwen"))
def import_() -> None:
    """Convert a model of another program into a run."""


@import_.command("hf", epilog=example("fira import hf out/hf out/again"))
@click.argument("folder", type=EXISTING)
@click.argument("run", type=NEW_FOLDER)
@click.option("--chat", type=click.Choice(["yes", "no"]), show_default="by its chat template",
              help="Whether the model was tuned for chat.")
def import_hf(folder: Path, run: Path, chat: str | None) -> None:
    """Convert the Hugging Face model in FOLDER into RUN.

    FOLDER contains a Qwen3 or Qwen3-MoE checkpoint. Nothing is downloaded.
    """
    from fira.convert.hf import import_run
    from fira.runlog import console

    import_run(folder, run, None if chat is None else chat == "yes", console())
