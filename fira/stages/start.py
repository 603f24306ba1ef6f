"""How a tuning starts from another run: its settings, the general text, the length."""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fira.config import ConfigError, parse
from fira.data.shards import MANIFEST
from fira.data.tokenizer import END_OF_TEXT
from fira.eval.suites import open_suite
from fira.eval.tuning import compare_tuning
from fira.files import read_json, write_text
from fira.infer.load import load
from fira.model.files import CONFIG
from fira.model.generate import window_length
from fira.runlog import ProgressLine, console
from fira.runtime import launch
from fira.stages.choice import choose_experts, parse_experts
from fira.stages.config import Opened, Stage, configure, modernize, open_start
from fira.stages.run import train_run
from fira.stages.tune import TUNE
from fira.train.loop import LoopState

OWN_TEXT, OWN_ROWS, OWN_BATCH = "self", 256, 32  # text that the model writes itself
EVALUATIONS = 4  # in a tuning; each also saves
# Of adapters at a width of 128: in a few hundred steps 1e-3 learned less there, 3e-3 and 6e-3 more.
# Above, it falls as 1 over the width, like Adam's best rate (Yang et al. 2021, 2203.03466).
ADAPTER_RATE = 2e-3


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
    if not (run / CONFIG).exists():
        if source is None:
            raise ConfigError(f"{run.absolute()} holds no run to resume; give RUN and its data to "
                              "begin one, or the --run folder of one that exists")
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
    preset, given = stage.load(stage.name) | sections, list(settings)
    settings = [*settings_for(source, start.folder, sections["tune"]["method"], given), *given]
    config = configure(stage, preset, settings, start)
    if config.tune.method == "experts":
        parse_experts(config)  # before the long reading
    opened = stage.open(config)
    train = opened.data.train
    sections["tune"]["thoughts"] = bool(opened.about.get("rows with thoughts"))
    if config.tune.method == "experts":
        packs = train if stage.name == TUNE.name else train.packs
        sections["tune"]["chosen"] = choose_experts(config, packs, device, console())
    if not any(one.startswith(("train.steps=", "train.minutes=")) for one in settings):
        read = config.train.batch_size * (1 - data.get("replay", 0.0))  # in a step
        steps = math.ceil(epochs * len(train) / read)
        settings = [f"train.save_every={math.ceil(steps / EVALUATIONS)}", *settings,
                    f"train.steps={steps}"]
    config = configure(stage, preset, settings, start)
    return stage._replace(open=lambda _: opened, preset=config.model_dump()), config, opened
