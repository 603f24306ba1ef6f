"""Tuning: a trained or imported model learns from conversations and text.

Every weight is trained (full), or a low-rank adapter of each linear (lora), or adapters of those
experts only that the data uses most (experts). A share of general text may be mixed in (replay), so
that the model forgets less.
"""
from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field
from rich.console import Console
from torch import Tensor

from fira.config import Config, ConfigError, parse
from fira.convert.quantize import quantize
from fira.data.batches import Folder, Shards
from fira.data.conversations import Reader, Row, without
from fira.data.packs import PackedBatches, Packs, Part, Sequences, Windows, in_order
from fira.data.shards import MANIFEST
from fira.data.sources import RECORDS, TEXT, find, inputs, listed
from fira.data.tokenizer import END_OF_TEXT, PAD, SPECIAL, TURN_END, Tokenizer
from fira.eval.suites import open_suite
from fira.eval.tuning import compare_tuning
from fira.files import read_json, sha256, write_text
from fira.infer.load import load
from fira.loss.head import next_token_loss
from fira.model.adapter import attach
from fira.model.files import CONFIG, knows_chat, read_config
from fira.model.generate import window_length
from fira.model.router import routers
from fira.parallel.layout import Layout, first_row, gathered, local
from fira.runlog import ProgressLine, console
from fira.runtime import launch
from fira.stages.choice import choose_experts, parse_experts, prepare_router
from fira.stages.config import Opened, RunConfig, Stage, configure, modernize, open_start
from fira.stages.run import train_run
from fira.train.loop import LoopState, Recipe, Score
from fira.train.validate import validate

OWN_TEXT, OWN_ROWS, OWN_BATCH = "self", 256, 32  # text that the model writes itself
HELD_OUT = 20  # every HELD_OUT-th row is held out where no file is
EVALUATIONS = 4  # in a tuning; each also saves
# Of adapters at a width of 128: in a few hundred steps 1e-3 learned less there, 3e-3 and 6e-3 more.
# Above, it falls as 1 over the width, like Adam's best rate (Yang et al. 2021, 2203.03466).
ADAPTER_RATE = 2e-3


# A file, so that a run resumes from anywhere, or another source by its name.
Files = list[Annotated[str, AfterValidator(
    lambda name: os.path.abspath(name) if os.path.exists(name) else name)]]


class TuneData(Config):
    start: Folder = Field(description="step folder of the model that is tuned")
    chat: Files = Field([], description="files or folders of conversations")
    text: Files = Field([], description="files or folders of text")
    held_out: Files = Field([], description="conversations or text to evaluate on; without "
                                   "them a twentieth of the rows")
    general: Files = Field([], description="general text, prepared by `fira data` or files: "
                                  "for replay, and to see what is forgotten")
    skip_bad: bool = Field(False, description="leave out rows at fault, and count them")
    replay: float = Field(0.0, ge=0, lt=1, description="share of general text in what is read")


class TuneOptions(Config):
    method: Literal["full", "lora", "experts"] = Field("lora", description="what is trained")
    rank: int = Field(16, ge=1, description="rank of adapters; of an expert's divided by top_k")
    router: Literal["freeze", "train"] = Field("freeze", description="whether routers are trained")
    experts: str = Field("0.25", description="method experts: the share of each layer's experts "
                         "that get adapters, or random:SHARE")
    chosen: list[list[int]] | None = Field(None, description="these experts, of each layer")


class TuneConfig(RunConfig):
    """Everything that decides a tuning."""

    data: TuneData
    tune: TuneOptions = TuneOptions()


class Data(NamedTuple):
    """What a tuning reads, as sequences: to train on, to evaluate on, general text likewise."""

    train: Sequences
    held_out: Sequences
    general: Sequences | None
    general_held_out: Sequences | None


def open_data(config: TuneConfig) -> Opened:
    """Read and pack everything. Raises ValueError, one line with the place, for what is wrong."""
    data, length = config.data, config.train.sequence_length
    tokenizer, rows, held_out = Tokenizer.load(data.start), list[Row](), list[Row]()
    reader, given = Reader(tokenizer, length + 1, data.skip_bad), data.held_out
    lines = reader.lines
    for read, sources, kinds in ((reader.chat, data.chat, RECORDS), (reader.text, data.text, TEXT)):
        if sources:
            train, validation, passed_over = find(sources, given, kinds)
            rows += read(train)
            held_out += read(validation)
            lines += [f"passed over: {listed(passed_over)}"] if passed_over else []
            given = []  # what is given to evaluate on is of the first kind
    if split := not held_out:
        held_out, rows = rows[::HELD_OUT], [row for number, row in enumerate(rows)
                                            if number % HELD_OUT]
    kept = without(rows, held_out)
    if not kept:
        raise ValueError(_nothing_left(
            reader, len(rows), split and bool(held_out), config))
    lines += [f"of these: {listed(reader.tally)}"] if reader.tally else []
    if len(rows) > len(kept):
        lines.append(f"{len(rows) - len(kept):,} rows are equal to held-out rows and left out")
    counts = {"rows": len(kept), "rows equal to held-out rows": len(rows) - len(kept),
              "tokens": sum(len(row.ids) for row in kept),
              "tokens trained on": sum(int(row.trained.sum()) for row in kept),
              **{f"rows {why}": entry["count"] for why, entry in reader.tally.items()}}
    general = _general(tokenizer, data.general, length)
    found = Data(Packs(kept, length), Packs(held_out, length), *general)
    about = {"sources": [Path(name).name for name in (*data.chat, *data.text)], **counts,
             "sha256": [found.train.key]}
    return Opened(Path(data.start), found, about, lines)


def _nothing_left(reader: Reader, rows: int, split: bool, config: TuneConfig) -> str:
    """Why there is nothing to train on, and what to do; `split`: the first row was held out."""
    context, needed = config.model.context, reader.needed
    remedy = ("all others are equal to held-out rows; give other rows" if rows else
              "the only row is held out; give more, or --held-out FILES" if split else
              "give rows with an answer" if not needed else
              f"set train.sequence_length={needed - 1}" if needed <= context else
              f"shorten them: the model reads {context} tokens, the shortest needs {needed}")
    return f"no row is left to train on: {listed(reader.tally) or 'none'}; {remedy}"


def _general(tokenizer: Tokenizer, sources: Sequence[str],
             length: int) -> tuple[Sequences | None, Sequences | None]:
    """General text to train on and to evaluate on."""
    if not sources:
        return None, None
    if (Path(sources[0]) / MANIFEST).is_file():
        train, held_out = (Windows(tokens, length, key) for tokens, key in (
            (Shards(sources[0], split), sha256(Path(sources[0]) / MANIFEST)[:15] + split[0])
            for split in ("train", "validation")))
        return train, held_out
    rows = Reader(tokenizer, length + 1).text(inputs(sources))
    return (Packs([row for number, row in enumerate(rows) if number % HELD_OUT], length),
            Packs(rows[::HELD_OUT], length))


def adapt(config: TuneConfig, model: Any, tokenizer: Tokenizer) -> None:
    """Freeze what is not trained, and add adapters. Raises ConfigError if that cannot be."""
    kind = read_config(Path(config.data.start) / CONFIG)[1]["quantization"]
    parallel = config.parallel
    if parallel.pipeline > 1:
        raise ConfigError(f"parallel.pipeline={parallel.pipeline} cannot mask rows from each "
                          "other; set it to 1, and parallel.shard or parallel.expert instead")
    if parallel.expert > 1 and config.tune.method == "experts":
        raise ConfigError(f"parallel.expert={parallel.expert} divides all experts, not those of "
                          "--method experts; set it to 1, and parallel.data or parallel.shard")
    if kind:
        quantize(model, kind)
    if kind and config.tune.method == "full":
        raise ConfigError(f"--method full cannot change {kind} weights; use --method lora, or tune "
                          "the run that they were made from")
    if config.tune.method != "full":
        attach(model, config.tune.rank, config.tune.chosen, _new_tokens(config, tokenizer))
    for router in routers(model):
        prepare_router(router, config.tune.router == "train")


def learn_turns(config: Any, model: Any, tokenizer: Tokenizer) -> None:
    """Give tokens that were never trained the embedding and head of the end of text: it too stands
    where something ends and something else begins."""
    model.chat = True
    tokens = list(_new_tokens(config, tokenizer))
    for name in {"token_embedding", model.after[-1]} if tokens else ():
        part = getattr(model, name)
        weight, changed = gathered(part.weight.detach()).clone(), part.weight
        rows = weight[[tokenizer.end_of_text] * len(tokens)]
        if hasattr(part, "lora"):
            changed, weight = part.lora.delta, rows - weight[tokens]
        else:
            weight[tokens] = rows
        own = local(changed.detach())
        own.copy_(weight[first_row(changed):][:len(own)])


def _new_tokens(config: TuneConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens of conversations, if the model was never trained on any."""
    if not config.data.chat or knows_chat(config.data.start):
        return ()
    tokenizer.special(TURN_END)
    names = tokenizer.added.keys() & set(SPECIAL) - {END_OF_TEXT, PAD}
    return tuple(sorted(tokenizer.added[name] for name in names))


def recipe(config: TuneConfig, data: Data, tokenizer: Tokenizer, layout: Layout) -> Recipe:
    """Packed rows, cross-entropy of what is trained on, bits per byte of held-out rows."""
    parts = [Part("target", data.train, 1 - config.data.replay)]
    if config.data.replay and data.general is not None:
        parts.append(Part("general", data.general, config.data.replay))
    token_bytes_V = torch.zeros(config.model.vocab_size, dtype=torch.long)
    sizes = torch.tensor([len(text) for text in tokenizer.token_bytes()])
    token_bytes_V[:len(sizes)] = sizes
    micro, most = config.train.micro_batch, config.train.validation_tokens

    def probe() -> tuple[dict[str, float], Score]:
        row = _validate(layout, data.held_out, micro, most, token_bytes_V)
        if data.general_held_out is not None:
            row |= {f"{name}/general": value for name, value in _validate(
                layout, data.general_held_out, micro, most, token_bytes_V).items()}
        return row, Score("bits_per_byte", row["bits_per_byte"])

    def begin(run: Path, fresh: bool) -> None:
        if fresh and config.data.chat:
            learn_turns(config, layout.model, tokenizer)

    return Recipe(PackedBatches(parts, config.train, layout.rows), next_token_loss, probe, begin)


def _validate(layout: Layout, sequences: Sequences, micro: int, most: int,
              token_bytes_V: Tensor) -> dict[str, float]:
    count = max(1, most // sequences.length)
    return validate(layout, in_order(sequences, micro, count), token_bytes_V)


TUNE = Stage("tune", TuneConfig, open_data, recipe, adapt,
             {"optim": {}, "train": {"steps": 1}}, 0.0, quantized=True)


def settings_for(run: Path, start: Path, method: str, given: Sequence[str]) -> list[str]:
    """What the method and the tuned run suggest: its sequences, unless `given` settings have a
    length, and a tenth of its rates for full tuning, if it was not tuned so itself."""
    spec, config = open_start(start, quantized=True).spec, record_of(run, start)
    asked = dict(one.partition("=")[::2] for one in given).get("train.sequence_length", "")
    length = int(asked) if asked.isdigit() else min(
        spec.context, config.get("train", {}).get("sequence_length", 1024))
    found = [f"train.sequence_length={length}", f"train.batch_tokens={16 * length}",
             "train.micro_batch=4", "schedule.kind=cosine", "schedule.warmup=0.05"]
    if method != "full":
        return [*found, f"optim.lr={min(ADAPTER_RATE, ADAPTER_RATE * 128 / spec.d_model):.3g}"]
    optim = config.get("optim", {"lr": 5e-4})
    part = 1 if config.get("tune", {}).get("method") == "full" else 10
    rates = {key: value / part for key, value in optim.items() if key.endswith("lr") and value}
    kept = {key: optim[key] for key in ("rule", "expert_interval", "head_follows") if key in optim}
    return found + [f"optim.{key}={value}" for key, value in {**rates, **kept}.items()]


def _find_general(data: dict[str, Any], source: Path, start: Path,
                  run: Path | None) -> list[str]:
    """General text as asked for, or what the run was trained on, if it is still there. Raises
    ConfigError if there is none to replay."""
    before = record_of(source, start).get("data", {})
    given = data.get("general") or [one for one in before.get("general", ()) if Path(one).exists()]
    if given == [OWN_TEXT]:
        return [str(_write_own_text(start, run / "own_text.jsonl"))] if run else []
    folder = before.get("folder")
    if not given and folder and (Path(folder) / MANIFEST).is_file():
        given = [folder]
    if data.get("replay") and not given:
        raise ConfigError(f"--replay {data['replay']:g} needs general text; give --general FILES, "
                          f"or --general {OWN_TEXT} for text that the model writes itself")
    return list(given)


def _write_own_text(start: Path, path: Path) -> Path:
    """Let the model write OWN_ROWS texts, each from the end-of-text token, at temperature 1."""
    if not path.is_file():
        model, tokenizer, _ = load(start)
        length, rows, began = window_length(model), list[list[int]](), time.monotonic()
        with ProgressLine("own text", console()) as line:
            for seed in range(0, OWN_ROWS, OWN_BATCH):
                rows += model.generate([[tokenizer.end_of_text]] * OWN_BATCH, length - 1,
                                       seed=seed).tolist()
                line.update(len(rows) / OWN_ROWS, f"{len(rows)} texts", time.monotonic() - began)
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = (tokenizer.decode(row[1:]).partition(END_OF_TEXT)[0] for row in rows)
        write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    return path


def record_of(run: Path, start: Path) -> dict[str, Any]:
    """The settings with which a run was trained, in today's terms; none of an import."""
    for record in (run / CONFIG, start.parent / CONFIG):
        if record.is_file() and (config := read_json(record, "restore the file").get("config")):
            return modernize(config)
    return {}


def tune(source: Path | None, sections: dict[str, dict[str, Any]], epochs: float,
         settings: Iterable[str], run: Path, device: str, resume: bool, screen: Console,
         stage: Stage = TUNE, card: dict[str, Any] | None = None) -> LoopState:
    """`fira tune`: see `fira.stages.run.train_run`. `sections` are the settings of data and of what
    the stage adds; the length of the run follows from `epochs`, unless settings give one. With
    `card`, the suites to measure, the models before and after are compared at the end."""
    if card:
        for name in card["suites"]:
            open_suite(name, card["data"], card["limit"])  # refuses one that is not there
    settings = list(settings)
    if not (run / CONFIG).exists() and source is not None:
        stage, *_ = open_tuning(source, sections, epochs, settings, run, device, stage)
        settings = [one for one in settings if one.startswith("model.")]  # over the start's
    state = train_run(stage, stage.name, settings, run, device, resume, screen, source)
    if card and launch().rank == 0:
        config = parse(stage.config, modernize(read_json(run / CONFIG, "restore it")["config"]))
        data = stage.open(config).data
        held_out = {"target": data.held_out, "general": getattr(data, "general_held_out", None)}
        compare_tuning(Path(config.data.start), run, {name: one for name, one in held_out.items()
                                                      if one}, device, screen, **card)
    return state


def open_tuning(source: Path, sections: dict[str, dict[str, Any]], epochs: float,
                settings: Iterable[str], run: Path | None, device: str,
                stage: Stage) -> tuple[Stage, Any, Opened]:
    """What a tuning into the folder `run` is: the stage, its configuration, its data. Nothing is
    written if `run` is None, so there is no text that the model writes itself."""
    start = open_start(source, quantized=True)
    data = sections["data"]
    data["start"] = str(start.folder)
    if stage is TUNE:
        data["general"] = _find_general(data, source, start.folder, run)
    stage = stage._replace(preset=stage.load(stage.name) | sections | {
        "model": start.spec.model_dump()})
    settings = list(settings)
    settings = [*settings_for(source, start.folder, sections["tune"]["method"], settings),
                *settings]
    config = configure(stage, stage.load(stage.name), settings, start)
    if config.tune.method == "experts":
        parse_experts(config)  # before the long reading
    opened = stage.open(config)
    if config.tune.method == "experts":
        train = opened.data.train if stage.name == TUNE.name else opened.data.train.packs
        sections["tune"]["chosen"] = choose_experts(config, train, device, console())
        config = configure(stage, stage.load(stage.name), settings, start)
    if not {"train.steps", "train.minutes"} & {one.partition("=")[0] for one in settings}:
        read = config.train.batch_size * (1 - data.get("replay", 0.0))  # in a step
        steps = math.ceil(epochs * len(opened.data.train) / read)
        settings = [f"train.save_every={math.ceil(steps / EVALUATIONS)}", *settings,
                    f"train.steps={steps}"]
        config = configure(stage, stage.load(stage.name), settings, start)
    return stage._replace(open=lambda _: opened, preset=config.model_dump()), config, opened
