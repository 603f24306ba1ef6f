"""A model as files: model.safetensors and config.json in one folder, and how to find the newest."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fira.config import Config, parse
from fira.files import MANIFEST, find_damage, inside, read_json, sha256, write_json
from fira.model.adapter import attach_like, merge
from fira.model.initialize import reset_buffers
from fira.model.spec import FIRA2Spec, FIRASpec

SPECS: dict[str, Any] = {"fira": FIRASpec, "fira2": FIRA2Spec}
WEIGHTS, CONFIG = "model.safetensors", "config.json"
ADAPTER = "adapter.safetensors"  # only what was trained; the other weights are in another folder
INDEX = WEIGHTS + ".index.json"  # of models in several files, made elsewhere
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WITHDRAWN = ("z_weight", "init_std")  # settings of older files, which concern training alone
# Types of numbers in a safetensors file, by the type that a model has in their place.
FLOATS, KINDS = ("F32", "BF16", "F16", "F64"), {torch.int8: ("I8",), torch.uint8: ("U8",),
                                                     torch.int64: ("I64",)}


class Base(Config):
    path: str
    sha256: str


class Notes(Config):
    """What config.json holds besides the spec, each an attribute of the model."""

    end_of_text: int | None = Field(None, ge=0)
    trained_length: int | None = Field(None, ge=0)  # the longest length trained on
    quantization: Literal["int8", "int4"] | None = None  # of weights that are no floats
    stage: str | None = None  # what trained it
    chat: bool | None = None  # whether it was trained on chat turns
    think: bool | None = None  # whether its answers begin with thoughts, unless asked for none
    base: Base | None = None  # an adapter's: the step folder below it and its weights' checksum


NOTES = tuple(Notes.model_fields)


def save_weights(model: Any, folder: str | Path) -> None:
    """Write model.safetensors and config.json."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / CONFIG, model.config())
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})


def knows_chat(step_folder: str | Path) -> bool:
    """Whether the model in a step folder was trained on chat turns.

    A folder written before its own config.json said so has the stage in its run's config.json.
    """
    folder = Path(step_folder).resolve()
    for path in (folder / CONFIG, folder.parent / CONFIG):
        record = read_json(path, "copy it again") if path.is_file() else {}
        if "chat" in record:
            return bool(record["chat"])
        if "stage" in record:
            return record["stage"] != "pretrain"
    return False


def read_model(folder: str | Path, classes: Mapping[str, type[nn.Module]]) -> Any:
    """The model in a step folder, or in the newest complete step of a run folder, in eval mode.

    `classes` are those that it may be of, by architecture. Weights keep the dtype they were saved
    in. An adapter's tensors replace those of its base. Raises ValueError, one line, when there is
    no model, it is of another architecture, its files are damaged or do not fit each other, or its
    adapter cannot be applied.
    """
    folder = find_model(folder)
    spec, notes = read_config(folder / CONFIG)
    if spec.architecture not in classes:
        found, wanted = spec.architecture.upper(), " or ".join(classes).upper()
        raise ValueError(f"{folder} holds a {found}, not a {wanted}; "
                         f"use {found}.from_pretrained or fira.model.load_pretrained")
    if notes["quantization"]:
        raise ValueError(f"{folder} holds {notes['quantization']} weights, which cannot be trained "
                         "or converted; use the run it was made from")
    with torch.device("meta"):
        model: Any = classes[spec.architecture](**spec.model_dump())
    return merge(read_into(model, folder, notes))


def read_into(model: Any, folder: Path, notes: dict[str, Any], base: Path | None = None,
              mapped: bool = False) -> Any:
    """`model` of `build_meta` with the weights of a step folder; an adapter is attached to those of
    its base, which is in the step folder `base` if that is given, else where it was."""
    if (below := notes.pop("base")) is None:
        if base:
            raise ValueError(f"{folder} holds a whole model, not an adapter for {base}; "
                             f"use it by itself, without --adapter")
        return assemble(model, read_tensors(folder / WEIGHTS, model.state_dict(), mapped=mapped),
                        notes)
    weights = find_base(folder, below if base is None else {**below, "path": str(base)})
    with _opened(folder / ADAPTER) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{folder / ADAPTER}: {name} holds numbers that are not finite; use "
                             "another step, or tune again with a lower optim.lr")
    try:
        attach_like(model, tensors)
        wanted = model.state_dict()
        if unknown := sorted(tensors.keys() - wanted.keys()):
            raise AttributeError(f"the model has no tensor {unknown[0]}")
    except (AttributeError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} was made with an adapter that this version cannot apply: "
                         f"{error}; use the version of FIRA that made it, or its base "
                         f"{below['path']}") from None
    own = read_tensors(folder / ADAPTER, {name: wanted.pop(name) for name in tensors})
    return assemble(model, read_tensors(weights, wanted, True, mapped) | own, notes)


def assemble(model: Any, tensors: dict[str, torch.Tensor], notes: dict[str, Any]) -> Any:
    """Give a model of `build_meta` its weights and notes; buffers not in `tensors` start anew."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    reset_buffers(model)
    model.load_state_dict({**model.state_dict(), **tensors}, assign=True)
    for note, value in notes.items():
        setattr(model, note, value)
    return model.eval()


def find_model(folder: str | Path) -> Path:
    """`folder` itself if it holds weights, else the newest complete step in it."""
    folder = Path(folder)
    if not folder.is_dir():
        if folder.suffix == ".gguf":
            raise ValueError(f"{folder} is a GGUF file, which FIRA writes but does not run; use "
                             f"llama-server -m {folder} or Ollama (docs/export.md), or give the "
                             "run folder that it was exported from")
        raise ValueError(f"{folder} is not a folder; give a run folder such as out/tiny, "
                         "or a step folder in it")
    if (folder / WEIGHTS).exists() or (folder / ADAPTER).exists():
        return folder
    if (folder / INDEX).exists():
        raise ValueError(f"{folder} is a Hugging Face model in several files; bring it in with "
                         f"fira import hf {folder} RUN")
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if pickles:
        raise ValueError(f"{folder} has its weights in {pickles[0]}, a pickle, which FIRA never "
                         "reads; save them as safetensors where they come from")
    if (folder / CONFIG).exists() and (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder} has no {WEIGHTS}; copy it back, or use another step")
    return newest_step(folder)


def newest_step(run: Path) -> Path:
    """The complete step folder with the highest number. A manifest.json makes it complete."""
    steps = [(int(match[1]), path) for path in run.iterdir()
             if (match := re.fullmatch(r"step-(\d+)", path.name))]
    complete = [(step, path) for step, path in steps if (path / MANIFEST).is_file()]
    if not complete:
        reason = ("has no complete step yet" if steps
                  else "is not a run folder: no step-NNNNNN in it")
        raise ValueError(f"{run} {reason}; train with `fira train` or give another folder")
    return max(complete)[1]


def read_config(path: Path) -> tuple[Any, dict[str, Any]]:
    """The spec in a config.json, and its NOTES (None where it has none). Raises ValueError, one
    line, if the file is damaged or of another program."""
    check_damage(path.parent, (path.name,))
    config = read_json(path, "copy it from where the weights come from or use another step")
    kind = config.get("architecture")
    if kind is None and "model_type" in config:
        raise ValueError(f"{path.parent} is a Hugging Face model ({config['model_type']!s:.40}); a "
                         f"qwen3 or qwen3_moe comes in with fira import hf {path.parent} RUN")
    if not isinstance(kind, str) or kind not in SPECS:
        raise ValueError(f"{path} has architecture {kind!r:.40}, not one of "
                         f"{', '.join(SPECS)}; give a folder that FIRA wrote")
    notes = {note: config.pop(note, None) for note in NOTES}
    fields = {name: value for name, value in config.items() if name not in WITHDRAWN}
    try:
        spec = parse(SPECS[kind], fields)
        notes = parse(Notes, notes).model_dump()
        if (notes["end_of_text"] or 0) >= spec.vocab_size:
            raise ValueError(f"end_of_text={notes['end_of_text']} is not below vocab_size")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; copy the file again or use another step") from None
    return spec, notes


def check_damage(folder: Path, names: tuple[str, ...] | None = None) -> None:
    """Raise ValueError, one line, if a file (of `names`, or any) is not as the folder's manifest
    says. A folder without a manifest has nothing to compare with. Large files are read only if they
    were changed since: hashing takes longer than loading. `fira check` reads all."""
    if (folder / MANIFEST).exists() and (damage := find_damage(folder, names, only_changed=True)):
        raise ValueError(f"{folder} is damaged: {damage}; copy it again or use another step; if "
                         f"you changed it, delete its {MANIFEST} and give this very folder")


def read_tensors(path: Path, wanted: dict[str, torch.Tensor], more: bool = False,
                 mapped: bool = False) -> dict[str, torch.Tensor]:
    """The `wanted` tensors, copied out of the file so that it may change while the model lives.

    `mapped` ones are not copied: the system reads a page of the file when it is first used and may
    drop it again. A page that is written to is copied, so the file stays as it is; nobody may
    overwrite it in place meanwhile (FIRA does not: it replaces files by a rename).

    Raises ValueError, one line, if the file is damaged, lacks one, has one of another shape, or has
    others and not `more`.
    """
    with _opened(path) as file:
        _check_names(path, file, wanted, more)
        tensors = {name: file.get_tensor(name) for name in wanted}
        return tensors if mapped else {name: one.clone() for name, one in tensors.items()}


def find_base(folder: Path, base: dict[str, str]) -> Path:
    """The file of the weights that the adapter in `folder` was trained on, by its note `base`.

    Raises ValueError, one line, if the file is gone or was changed.
    """
    path = Path(base["path"]) / WEIGHTS
    found = sha256(path) if path.is_file() else "no file"
    if found != base["sha256"]:
        raise ValueError(f"{path} has checksum {found[:12]}, but the adapter {folder} was trained "
                         f"on {base['sha256'][:12]}; put those weights back there, or a link to "
                         f"their folder; fira chat RUN --adapter {folder} takes another RUN's")
    return path


def check_tensors(path: Path, wanted: dict[str, torch.Tensor]) -> None:
    """Raise ValueError as `read_tensors` would; reads only the file's table of contents."""
    with _opened(path) as file:
        _check_names(path, file, wanted)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not inside(path.parent, path.name).is_file():
        raise ValueError(f"{path} is missing; use another step or copy the file again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); use another step or copy the file again"
                         ) from None


def _check_names(path: Path, file: Any, wanted: dict[str, torch.Tensor],
                 more: bool = False) -> None:
    names = set(file.keys())
    if odd := sorted(wanted.keys() - names if more else wanted.keys() ^ names):
        raise ValueError(f"{path} and its config.json disagree on tensor {odd[0]}; "
                         "use the config.json that was written with it")
    for name, tensor in wanted.items():
        found = file.get_slice(name)
        if (shape := found.get_shape()) != list(tensor.shape):
            raise ValueError(f"{path}: {name} has shape {shape} but config.json says "
                             f"{list(tensor.shape)}; use the config.json written with it")
        if (kind := found.get_dtype()) not in (kinds := KINDS.get(tensor.dtype, FLOATS)):
            raise ValueError(f"{path}: {name} holds {kind}, not {' or '.join(kinds)}; "
                             "use another step or copy the file again")
