"""A run in another form, and another form as a run: read, convert, say what was written."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fira.checkpoint import step_number
from fira.convert import hf
from fira.convert.quantize import quantize, stored
from fira.convert.target import check_new, write_run
from fira.data.sources import inputs
from fira.data.text import items
from fira.eval.bits_per_byte import score
from fira.infer.load import load
from fira.infer.stand_in import PRETRAIN, knows_chat

IMPORTED = "import"  # the stage of an imported model that knows chat turns


def export_hf(run: Path, folder: Path, dtype: str | None, screen: Console) -> None:
    """Write the newest step of `run` as a Hugging Face folder."""
    check_new(folder)
    loaded = load(run, "cpu")
    hf.export_hf(loaded.model, loaded.tokenizer, folder, dtype, knows_chat(loaded.folder))
    code = ", trust_remote_code=True" if loaded.model.spec.architecture == "fira" else ""
    screen.print(f'wrote {folder}; load it with AutoModelForCausalLM.from_pretrained("{folder}"'
                 f"{code})", soft_wrap=True)


def export_gguf(run: Path, file: Path, type_name: str, screen: Console) -> None:
    """Write the newest step of `run` as a GGUF file and a Modelfile. Raises ValueError without the
    package gguf."""
    try:
        from fira.convert.gguf import export_gguf as write
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ValueError("GGUF files are written by the package gguf, which is not installed; "
                         "pip install 'fira-moe[export]'") from None
    check_new(file)
    loaded = load(run, "cpu")
    written = write(loaded.model, loaded.tokenizer, file, type_name, knows_chat(loaded.folder))
    for path in written:
        screen.print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    screen.print(f"run it: llama-server -m {file}, or ollama create {file.stem} -f {written[1]}",
                 soft_wrap=True)


def export_quantized(run: Path, folder: Path, kind: str, texts: list[str],
                     screen: Console) -> None:
    """Write the newest step of `run` as a run with small integers for weights; with `texts`, print
    what that costs in bits per byte."""
    check_new(folder)
    given = inputs(texts) if texts else []
    loaded = load(run, "cpu")

    def measure() -> float:
        return score(loaded.model, loaded.tokenizer, items(given))["bits_per_byte"]

    before = measure() if given else 0.0
    quantize(loaded.model, kind)
    _print_stored(loaded.model, screen)
    if given:
        after = measure()
        screen.print(f"bits per byte: {before:.5f} before, {after:.5f} in {kind} "
                     f"({after - before:+.5f})")
    record = {"stage": IMPORTED if knows_chat(loaded.folder) else PRETRAIN, "preset": kind,
              "quantized_from": str(loaded.folder)}
    write_run(folder, loaded.model, loaded.tokenizer, step_number(loaded.folder), record)
    screen.print(f"wrote {folder}; generate, chat and eval read it like any run", soft_wrap=True)


def import_hf(folder: Path, run: Path, screen: Console) -> None:
    """Write the Qwen3 in a Hugging Face folder as the new run folder `run`."""
    check_new(run)
    model, tokenizer, chat = hf.import_hf(folder)
    record = {"stage": IMPORTED if chat else PRETRAIN, "preset": IMPORTED,
              "imported_from": str(folder)}
    write_run(run, model, tokenizer, 0, record)
    screen.print(f'wrote {run}; try fira generate {run} "...", or tune it: fira data TEXT '
                 f"--tokenizer {run / 'step-000000'} --out DATA, then fira train PRESET "
                 f"--from {run} data.folder=DATA", soft_wrap=True)


def _print_stored(model: Any, screen: Console) -> None:
    table = Table(title="weights", title_justify="left")
    table.add_column("tensor", no_wrap=True)
    table.add_column("stored")
    for name in ("float32 MB", "MB"):
        table.add_column(name, justify="right")
    rows = stored(model)
    for row in rows:
        table.add_row(row.name, row.how, f"{row.float32 / 1e6:.3f}", f"{row.now / 1e6:.3f}")
    table.add_section()
    table.add_row("all", "",
                  f"{sum(row.float32 for row in rows) / 1e6:.3f}",
                  f"{sum(row.now for row in rows) / 1e6:.3f}")
    screen.print(table)
