"""The verbs `fira export` and `fira import`: the same model in other forms."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fira.command import FOLDER, OUT, InOrder

FILE = click.Path(dir_okay=False, path_type=Path)
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0")


@click.group(cls=InOrder)
def export() -> None:
    """Write a run for other programs, or smaller.

    \b
    Example: fira export hf out/quickstart/run out/hf
    """


@export.command("hf")
@click.argument("run", type=FOLDER)
@click.argument("folder", type=OUT)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Of the weights.  [default: as in the run]")
def export_hf(run: Path, folder: Path, dtype: str | None) -> None:
    """Write RUN as the Hugging Face model FOLDER.

    A FIRA2 becomes a Qwen3 that transformers 4 and 5 load without code of ours; a FIRA brings its
    own, for trust_remote_code=True.

    \b
    Example: fira export hf out/quickstart/run out/hf --dtype bfloat16
    """
    from fira.convert.hf import export_run
    from fira.runlog import console

    export_run(run, folder, dtype, console())


@export.command("gguf")
@click.argument("run", type=FOLDER)
@click.argument("file", type=FILE)
@click.option("--type", "type_name", type=click.Choice(TYPES), default="f16", show_default=True,
              help="Of the matrices; norms and routers stay f32.")
def export_gguf(run: Path, file: Path, type_name: str) -> None:
    """Write RUN as FILE for llama.cpp and Ollama.

    The tokenizer goes into the file, and a Modelfile for ollama create beside it.

    \b
    Example: fira export gguf out/quickstart/run out/fira.gguf --type q8_0
    """
    from fira.convert.gguf import export_run
    from fira.runlog import console

    export_run(run, file, type_name, console())


def _quantized(kind: str, words: str) -> None:
    @export.command(kind, help=f"""Write RUN as the run FOLDER with {words}.

    fira generate, chat and eval read FOLDER like any run. The table says what became of every
    tensor; routers, norms and biases are left alone.

    \b
    Example: fira export {kind} out/quickstart/run out/{kind} --text README.md
    """)
    @click.argument("run", type=FOLDER)
    @click.argument("folder", type=OUT)
    @click.option("--text", "texts", multiple=True, metavar="SOURCE",
                  help="Print bits per byte of this text before and after.")
    def command(run: Path, folder: Path, texts: tuple[str, ...]) -> None:
        from fira.convert.quantize import export_run
        from fira.runlog import console

        export_run(run, folder, kind, console(), _bits_per_byte(list(texts)) if texts else None)


def _bits_per_byte(sources: list[str]) -> Callable[[Any, Any], float]:
    """A function that scores a model and its tokenizer on `sources`."""
    from fira.data.sources import inputs
    from fira.data.text import items
    from fira.eval.bits_per_byte import score

    given = inputs(sources)
    return lambda model, tokenizer: score(model, tokenizer, items(given))["bits_per_byte"]


_quantized("int8", "weights of 8 bits, a quarter of the size")
_quantized("int4", "weights of 4 bits, about a sixth")


@click.group("import", cls=InOrder)
def import_() -> None:
    """Bring in a model from elsewhere.

    \b
    Example: fira import hf Qwen3-0.6B out/qwen
    """


@import_.command("hf")
@click.argument("folder", type=FOLDER)
@click.argument("run", type=OUT)
def import_hf(folder: Path, run: Path) -> None:
    """Write the Hugging Face model in FOLDER as RUN.

    Qwen3 and Qwen3-MoE checkpoints on this machine; nothing is downloaded.

    \b
    Example: fira import hf out/hf out/again
    """
    from fira.convert.hf import import_run
    from fira.runlog import console

    import_run(folder, run, console())


VERBS: tuple[Any, ...] = (export, import_)
