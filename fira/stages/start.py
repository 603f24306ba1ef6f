"""Where a run's weights come from when not from its seed: `fira train PRESET --from RUN`.

The architecture is that run's; rates, schedule and data are the preset's, and the optimizer is new.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fira.config import ConfigError, flatten
from fira.infer.load import find_whole
from fira.infer.stand_in import knows_chat
from fira.model.files import CONFIG, WEIGHTS, build_meta, check_tensors, read_config

FREE = ("balance", "balance_weight", "z_weight", "dropout")  # of use to training alone
TUNED = "tune"  # the stage of a run that goes on from a model that knows chat turns


class Start(NamedTuple):
    """A step folder to begin from, and its model's spec."""

    folder: Path
    spec: Any

    def over(self, preset: dict[str, Any]) -> dict[str, Any]:
        """The preset, its model replaced by this one."""
        return preset | {"model": self.spec.model_dump()}

    @property
    def record(self) -> dict[str, Any]:
        """For the config.json of the run that begins here."""
        chat = {"stage": TUNED} if knows_chat(self.folder) else {}
        return {"from": str(self.folder.resolve())} | chat

    def check(self, spec: Any) -> None:
        """Raises ConfigError if `spec`, which settings may have changed, computes something else.
        """
        before = flatten(self.spec)
        for key, value in flatten(spec).items():
            if value != before.get(key) and key not in FREE:
                raise ConfigError(f"model.{key}={value} does not go with --from {self.folder}, "
                                  f"whose model has {key}={before.get(key)}; leave it out, or "
                                  "train a new model without --from")


def open_start(run: Path) -> Start:
    """The newest complete step of a run folder, or a step folder. Raises ValueError, one line, if
    there is none that can be trained."""
    folder = find_whole(run)
    spec, notes = read_config(folder / CONFIG)
    if notes["quantization"]:
        raise ValueError(f"{folder} holds {notes['quantization']} weights, which cannot be "
                         "trained; use the run it was made from")
    check_tensors(folder / WEIGHTS, build_meta(spec).state_dict())
    return Start(folder, spec)


def begun_from(saved: dict[str, Any], spec: Any, run: Path, asked: Path | None) -> Start | None:
    """What a run that is resumed was started from, by its record.

    `asked` is the --from of today. Raises ConfigError if it is another one.
    """
    before = saved.get("from")
    if asked is not None and (before is None or asked.resolve() not in (
            Path(before).resolve(), Path(before).resolve().parent)):
        raise ConfigError(f"{run} was started from {before or 'new weights'}, not {asked}; leave "
                          "--from out to resume it, or choose another --run")
    if before is None:
        return None
    own = any(run.glob("step-*"))  # with steps of its own it no longer needs the other run
    return Start(Path(before), spec) if own else open_start(Path(before))


def longest_read(step: Path, sequence_length: int) -> int | None:
    """Tokens that a tuned model reads at once: what it knew at `step` or learns now. None, of a
    model made elsewhere, is its whole context."""
    known = read_config(step / CONFIG)[1]["trained_length"]
    return None if known is None else max(known, sequence_length)
