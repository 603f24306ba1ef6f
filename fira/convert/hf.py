"""A model as a Hugging Face folder, which AutoModelForCausalLM and AutoTokenizer load, and back.

FIRA2 becomes a Qwen3 (see qwen3.py) and needs no code of ours. FIRA brings its own modelling file,
so it is loaded with trust_remote_code=True.
"""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fira.convert import qwen3
from fira.convert.files import load_run, write_run
from fira.data.tokenizer import PAD, TURN_END, TURN_START, Tokenizer
from fira.files import check_new, new_target, write_json
from fira.model.files import CONFIG, INDEX, WEIGHTS
from fira.model.router import routers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELLING = Path(__file__).with_name("modeling_fira.py")
IMPORT = "import"  # the stage of a model that was trained elsewhere


def export_run(run: Path, folder: Path, dtype: str | None, screen: Console) -> None:
    """Write the newest step of `run` as the new Hugging Face folder `folder` and say how to load
    it. Raises ValueError, one line, if that is not possible."""
    check_new(folder)
    model, tokenizer, _ = load_run(run)
    write_model(model, tokenizer, folder, dtype)
    code = ", trust_remote_code=True" if model.spec.architecture == "fira" else ""
    screen.print(f'wrote {folder}; load it with AutoModelForCausalLM.from_pretrained("{folder}"'
                 f"{code})", soft_wrap=True)


def import_run(folder: Path, run: Path, screen: Console) -> None:
    """Write the Qwen3 in a Hugging Face folder as the new run folder `run` and say how to use it.

    Raises ValueError, one line, if that is not possible.
    """
    check_new(run)
    model, tokenizer = read_model(folder)
    write_run(run, model, tokenizer, 0, {"stage": IMPORT, "preset": IMPORT,
                                         "imported_from": str(folder)})
    screen.print(f'wrote {run}; try fira generate {run} "...", or tune it: fira data TEXT '
                 f"--tokenizer {run / 'step-000000'} --out DATA, then fira train PRESET "
                 f"--from {run} data.folder=DATA", soft_wrap=True)


def write_model(model: Any, tokenizer: Tokenizer, folder: Path, dtype: str | None = None) -> None:
    """Write `model` into the new `folder`, its weights in `dtype` (as they are, if None)."""
    check_router(model)
    kept = next(model.parameters()).dtype if dtype is None else DTYPES[dtype]
    fira2 = model.spec.architecture == "fira2"
    config = qwen3.describe(model.spec) if fira2 else _describe_fira(model.spec)
    kind = str(kept).removeprefix("torch.")
    config |= _token_ids(tokenizer) | {"dtype": kind, "torch_dtype": kind, "fira": {
        "chat": bool(getattr(model, "chat", False)), "trained_length": model.trained_length,
        **{key: getattr(model.spec, key) for key in qwen3.TRAINING}}}
    named = qwen3.tensors(model) if fira2 else _fira_tensors(model)
    with new_target(folder) as partial:
        tokenizer.save(partial)
        save_file({name: tensor.detach().to(kept).contiguous() for name, tensor in named},
                  partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / CONFIG, config)
        write_json(partial / "generation_config.json", _generation(tokenizer))
        if not fira2:
            shutil.copyfile(MODELLING, partial / MODELLING.name)


def check_router(model: Any) -> None:
    """Raises ValueError if the choice of experts depends on a bias, which the other formats lack.

    A bias that is zero everywhere, as `balance=handover` leaves it, changes nothing.
    """
    if any(router.selection_bias_E is not None and bool(router.selection_bias_E.any())
           for router in routers(model)):
        raise ValueError("this model chooses experts with a bias that only selects, and other "
                         "formats have no place for it; export a finished run of "
                         "model.balance=handover, or use fira export int8")


def read_model(folder: Path) -> tuple[Any, Tokenizer]:
    """The model and tokenizer in a Hugging Face folder.

    Weights keep their dtype. Raises ValueError, one line, for what FIRA2 cannot hold.
    """
    config = _read_json(folder / CONFIG)
    if "model_type" not in config and {"architecture", "preset"} & config.keys():
        raise ValueError(f"{folder} is FIRA's own; every verb reads it as it is")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; copy it from where the weights come "
                         "from, or let AutoTokenizer.from_pretrained(...).save_pretrained write it")
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        model = _build(folder, config, tokenizer)
        if tokenizer.vocab_size > model.spec.vocab_size:
            raise ValueError(f"tokenizer.json has {tokenizer.vocab_size} tokens but the model only "
                             f"{model.spec.vocab_size}; use the tokenizer that came with it")
    except ValueError as error:
        line = str(error)
        raise ValueError(line if str(folder) in line else f"{folder}: {line}") from None
    return model, tokenizer


def _build(folder: Path, config: dict[str, Any], tokenizer: Tokenizer) -> Any:
    ours, template = qwen3.table(config, "fira"), tokenizer.settings.get("chat_template") or ""
    notes = {"end_of_text": tokenizer.end_of_text, "trained_length": ours.get("trained_length"),
             "quantization": None, "stage": IMPORT,
             "chat": bool(ours.get("chat", TURN_START in template))}
    weights = _Weights(folder)
    return qwen3.build_from(config, set(weights.files), weights.read, notes)


class _Weights:
    """The tensors of one or several safetensors files; `files` says which file holds each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self.files: dict[str, str] = qwen3.table(_read_json(folder / INDEX), "weight_map")
        elif (folder / WEIGHTS).is_file():
            self.files = dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)
        else:
            raise ValueError(f"{folder} has no {WEIGHTS}; FIRA reads safetensors, never pickles: "
                             "load it in transformers and save_pretrained it again")

    def read(self, name: str) -> Tensor:
        file = self._open(self.files[name])
        try:
            tensor = file.get_tensor(name).clone()
        except SafetensorError as error:
            raise ValueError(f"{self.files[name]} lacks tensor {name} ({error}); copy every file "
                             "of the checkpoint again") from None
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name} is {tensor.dtype}, not one of {', '.join(DTYPES)}; "
                             "give a checkpoint that is not quantized")
        return tensor

    def _open(self, name: str) -> Any:
        if name not in self.opened:
            try:
                self.opened[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / name} cannot be read ({error}); copy the file "
                                 "again") from None
        return self.opened[name]


def _describe_fira(spec: Any) -> dict[str, Any]:
    module = MODELLING.stem
    return {"architectures": ["FIRAForCausalLM"], "model_type": "fira",
            "auto_map": {"AutoConfig": f"{module}.FIRAConfig",
                         "AutoModelForCausalLM": f"{module}.FIRAForCausalLM"},
            "vocab_size": spec.vocab_size, "hidden_size": spec.d_model,
            "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.n_head,
            "intermediate_size": spec.d_ff, "num_experts": spec.num_experts,
            "num_experts_per_tok": spec.top_k, "max_position_embeddings": spec.context,
            "layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_cache": True}


def _fira_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Every tensor under our own name, which the modelling file uses."""
    return [(name, tensor) for name, tensor in model.state_dict().items()
            if not name.endswith(qwen3.ROUTER_STATE)]


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    names = tokenizer.added_names()
    return {"bos_token_id": None, "eos_token_id": tokenizer.end_of_text,
            "pad_token_id": tokenizer.special(PAD) if PAD in names else tokenizer.end_of_text}


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = [tokenizer.end_of_text]
    if TURN_END in tokenizer.added_names():
        ends.append(tokenizer.special(TURN_END))
    return _token_ids(tokenizer) | {"eos_token_id": ends, "do_sample": True, "temperature": 0.8,
                                    "top_k": 50}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path.parent} has no {path.name}; give a Hugging Face model folder"
                         ) from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; copy the file again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no object; copy the file again")
    return found
