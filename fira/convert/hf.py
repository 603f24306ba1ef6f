"""A model as a Hugging Face folder, which AutoModelForCausalLM and AutoTokenizer load, and back.

FIRA2 becomes a Qwen3 (see qwen3.py) and needs no code of ours. FIRA brings its own modelling file,
so it is loaded with trust_remote_code=True.
"""
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fira.convert import qwen3
from fira.convert.files import load_run, write_run
from fira.data.chat import can_think
from fira.data.tokenizer import CHAT_TEMPLATE, DIRECT, PAD, TURN_END, TURN_START, Tokenizer
from fira.files import check_new, inside, new_target, read_json, write_json, write_manifest
from fira.model.files import CONFIG, INDEX, WEIGHTS, check_damage
from fira.model.router import routers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELLING = Path(__file__).with_name("modeling_fira.py")
SWITCH = "enable_thinking"  # in the chat template of a model that thinks unless told not to
IMPORT = "import"  # the stage of a model that was trained elsewhere
# A model that was not tuned for chat continues the text so far, as in fira chat. Every text begins
# after an end-of-text token, as in training.
BASE_TEMPLATE = (
    "{end}{{% for message in messages %}}{{{{ message['content'] }}}}"
    "{{% if message['role'] != 'user' %}}{{{{ '\n' }}}}{{% endif %}}{{% endfor %}}")


def export_run(run: Path, folder: Path, dtype: str | None, screen: Console,
               card: Callable[[Path], str] = lambda run: "") -> None:
    """Write the newest step of `run` as the new Hugging Face folder `folder`, with what `card`
    says of the run as README.md, and say how to load it. Raises ValueError, one line, if that is
    not possible."""
    check_new(folder)
    model, tokenizer, _ = load_run(run)
    write_model(model, tokenizer, folder, dtype, card(run))
    code = ", trust_remote_code=True" if model.spec.architecture == "fira" else ""
    screen.print(f'wrote {folder}; load it with AutoModelForCausalLM.from_pretrained("{folder}"'
                 f"{code})", soft_wrap=True)


def import_run(folder: Path, run: Path, chat: bool | None, screen: Console) -> None:
    """Write the Qwen3 in a Hugging Face folder as the new run folder `run` and say how to use it.
    `chat`: whether it was tuned for chat; None: its chat template decides, and a line says so.

    Raises ValueError, one line, if that is not possible.
    """
    check_new(run)
    model, tokenizer = read_model(folder)
    why = "as --chat says"
    if chat is None:
        chat = TURN_START in str(tokenizer.settings.get("chat_template"))
        why = (f"because it has {'a' if chat else 'no'} chat template with {TURN_START}; if that "
               f"is wrong, import it again with --chat {'no' if chat else 'yes'}")
    if chat and not {TURN_START, TURN_END} <= tokenizer.added.keys():
        raise ValueError(f"{folder} cannot chat in FIRA: its tokenizer lacks {TURN_START} or "
                         f"{TURN_END}; give --chat no")
    think = SWITCH in str(tokenizer.settings.get("chat_template"))
    model.chat, model.think = chat, chat and think and can_think(tokenizer)
    write_run(run, model, tokenizer, 0, {"stage": IMPORT, "preset": IMPORT,
                                         "imported_from": str(folder)})
    screen.print(f'wrote {run}; try fira generate {run} "...", or tune it: fira data TEXT '
                 f"--tokenizer {run / 'step-000000'} --out DATA, then fira train PRESET "
                 f"--from {run} data.folder=DATA", soft_wrap=True)
    thinks = f", and thinks, because that has {SWITCH}" if model.think else ""
    screen.print(f"it counts as {'' if chat else 'not '}tuned for chat, {why}{thinks}",
                 soft_wrap=True)


def write_model(model: Any, tokenizer: Tokenizer, folder: Path, dtype: str | None = None,
                card: str = "") -> None:
    """Write `model` into the new `folder`, its weights in `dtype` (as they are, if None)."""
    check_router(model)
    kept = next(model.parameters()).dtype if dtype is None else DTYPES[dtype]
    fira2 = model.spec.architecture == "fira2"
    config = qwen3.describe(model.spec) if fira2 else _describe_fira(model.spec)
    kind = str(kept).removeprefix("torch.")
    config |= _token_ids(tokenizer) | {"dtype": kind, "torch_dtype": kind, "fira": {
        "trained_length": model.trained_length,
        **{key: getattr(model.spec, key) for key in qwen3.TRAINING}}}
    named = (qwen3.tensors if fira2 else qwen3.weights)(model)  # FIRA keeps our names
    with new_target(folder) as partial:
        knows = (getattr(model, note, None) for note in ("chat", "think"))
        tokenizer.save(partial, chat_template=chat_template(tokenizer, *knows))
        save_file({name: tensor.detach().to(kept).contiguous() for name, tensor in named},
                  partial / WEIGHTS, metadata={"format": "pt"})
        write_json(partial / CONFIG, config)
        write_json(partial / "generation_config.json", _generation(tokenizer))
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if not fira2:
            shutil.copyfile(MODELLING, partial / MODELLING.name)
        write_manifest(partial)


def chat_template(tokenizer: Tokenizer, chat: Any, think: Any = False) -> str:
    """The chat template of an exported model: its own ChatML, or the text of the messages. That of
    a model that thinks takes enable_thinking=false."""
    if not chat:
        return BASE_TEMPLATE.format(end=tokenizer.decode([tokenizer.end_of_text]))
    own = str(tokenizer.settings.get("chat_template"))
    if TURN_START not in own or own.startswith(CHAT_TEMPLATE[:32]):  # or of an older version
        own = CHAT_TEMPLATE
    return own + DIRECT * bool(think and SWITCH not in own)


def check_router(model: Any) -> None:
    """Raises ValueError if the router adds a bias when it selects experts: other formats have none.

    A bias that is zero everywhere, as a finished run of `balance=handover` has, changes nothing.
    """
    if any(router.selection_bias_E is not None and bool(router.selection_bias_E.any())
           for router in routers(model)):
        raise ValueError("this model's router adds a bias to select experts, which other formats "
                         "cannot hold; export a finished run of model.balance=handover, whose bias "
                         "is 0, or use fira export int8")


def read_model(folder: Path) -> tuple[Any, Tokenizer]:
    """The model and tokenizer in a Hugging Face folder.

    Weights keep their dtype. Raises ValueError, one line, for what FIRA2 cannot hold.
    """
    check_damage(folder)
    config = read_json(folder / CONFIG, "give a Hugging Face model folder, copied as a whole")
    if "model_type" not in config and {"architecture", "preset"} & config.keys():
        raise ValueError(f"{folder} is a FIRA run already; every command reads it as it is")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json; copy it from where the weights come "
                         "from, or let AutoTokenizer.from_pretrained(...).save_pretrained write it")
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        ours = qwen3.table(config, "fira")
        model = qwen3.build_from(config, _read_tensors(folder), {
            "end_of_text": tokenizer.end_of_text, "trained_length": ours.get("trained_length"),
            "stage": IMPORT})
        if tokenizer.vocab_size > model.spec.vocab_size:
            raise ValueError(f"tokenizer.json has {tokenizer.vocab_size} tokens but the model only "
                             f"{model.spec.vocab_size}; use the tokenizer that came with it")
    except ValueError as error:
        line = str(error)
        raise ValueError(line if str(folder) in line else f"{folder}: {line}") from None
    return model, tokenizer


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of one or several safetensors files, mapped into memory."""
    files, found = {WEIGHTS}, dict[str, Tensor]()
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, "copy the file again")
        files = set(map(str, qwen3.table(index, "weight_map").values()))
    elif not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; FIRA reads safetensors, never pickles: "
                         "load it in transformers and save_pretrained it again")
    for file in files:
        try:
            found |= load_file(inside(folder, file))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} cannot be read ({error}); copy the file again"
                             ) from None
    for name, tensor in found.items():
        if not tensor.numel():
            raise ValueError(f"{name} holds no numbers; copy every file of the checkpoint again")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name} is {tensor.dtype}, not one of {', '.join(DTYPES)}; "
                             "give a checkpoint that is not quantized")
    return found


def _describe_fira(spec: Any) -> dict[str, Any]:
    module = MODELLING.stem
    return {"architectures": ["FIRAForCausalLM"], "model_type": "fira",
            "auto_map": {"AutoConfig": f"{module}.FIRAConfig",
                         "AutoModelForCausalLM": f"{module}.FIRAForCausalLM"},
            "vocab_size": spec.vocab_size, "hidden_size": spec.d_model,
            "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.n_head,
            "intermediate_size": spec.d_ff, "num_experts": spec.num_experts,
            "num_experts_per_tok": spec.top_k, "max_position_embeddings": spec.context,
            "layer_norm_eps": 1e-5, "tie_word_embeddings": False}


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"bos_token_id": None, "eos_token_id": tokenizer.end_of_text,
            "pad_token_id": tokenizer.added.get(PAD, tokenizer.end_of_text)}


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = [tokenizer.end_of_text]
    if TURN_END in tokenizer.added:
        ends.append(tokenizer.special(TURN_END))
    return _token_ids(tokenizer) | {"eos_token_id": ends, "do_sample": True, "temperature": 0.8,
                                    "top_k": 50}
