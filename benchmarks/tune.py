"""Tuning with adapters: FIRA beside TRL with PEFT, on the same exported model and the same rows.

    python benchmarks/tune.py --shape small --chat chats.jsonl --tokenizer out/quickstart/tokenizer

Both train adapters of the same rank on every linear of attention and on every expert, from the same
weights and the same conversations, in fp32 on a CPU. TRL packs rows by best fit as FIRA does; where
its attention cannot keep packed rows apart (everything but flash attention), it gets one row in
each line of a padded batch. The sides take turns, each in a process of its own. Tokens are those of
the rows, without padding. The loss of the first step is compared on the same rows.
"""
from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from record import append, machine, new_parser, peak_memory, reset_peak

from fira.convert.files import load_run, write_run
from fira.convert.hf import export_run
from fira.data.conversations import Conversation, chat_row, read_conversation
from fira.data.packs import Packs, in_order
from fira.data.records import records
from fira.data.sources import inputs
from fira.data.tokenizer import Tokenizer
from fira.loss.head import next_token_loss
from fira.model import build
from fira.model.adapter import SCALE, attach
from fira.model.initialize import initialize, whole
from fira.model.spec import FIRA2Spec
from fira.parallel.layout import read
from fira.runlog import console
from fira.runtime import keep_large_blocks
from fira.train.optim import OptimConfig, make_optimizer

SHAPES = {
    "small": {"d_model": 128, "n_head": 4, "n_kv_head": 2, "head_dim": 32, "num_layers": 4,
              "d_ff": 64, "num_experts": 32, "top_k": 2, "context": 512},
    "large": {"d_model": 768, "n_head": 12, "n_kv_head": 4, "num_layers": 12, "d_ff": 3072,
              "num_experts": 4, "top_k": 1, "context": 512},
}
RANK, RATE, ROWS = 16, 1e-3, 8  # of an adapter; learning rate; conversations in a step
# The template of the exported model, with marks around what is trained on, which TRL needs.
TEMPLATE = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
            "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
            "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
            "{% endif %}{% endfor %}")


def read_rows(path: str, tokenizer: Tokenizer, longest: int, count: int) -> list[list[Any]]:
    """The first conversations that fit."""
    given = (read_conversation(record) for _, record in records(inputs([path])))
    fit = (one.messages for one in given if not chat_row(tokenizer, one, longest)[1])
    return list(islice(fit, count))


def fira_side(folder: Path, rows: list[list[Any]], rank: int) -> Any:
    model, tokenizer, _ = load_run(folder / "run")
    keep_large_blocks()
    attach(model, rank)
    initialize(model, 0, (one for one in whole(model.named_parameters()) if ".lora." in one.name))
    optimizer = make_optimizer(model, OptimConfig(lr=RATE), 0.0)
    model.train()
    found = [chat_row(tokenizer, Conversation(messages, []), 1 << 20)[0] for messages in rows]
    length = max(len(row.ids) for row in found if row) - 1
    steps = []
    for first in range(0, len(found), ROWS):
        given = [row for row in found[first:first + ROWS] if row]
        batch = next(in_order(Packs(given, length), ROWS))
        steps.append((batch, sum(len(row.ids) for row in given)))

    def step(number: int) -> tuple[float, int]:
        batch, tokens = steps[number]
        loss, _ = next_token_loss(read(model, batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), tokens
    return step


def trl_side(folder: Path, rows: list[list[Any]], rank: int) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    tokenizer.chat_template = TEMPLATE
    spec = load_run(folder / "run").model.spec
    experts = max(1, rank // spec.top_k)
    lora = LoraConfig(
        r=rank, lora_alpha=SCALE * rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"mlp.experts": experts}, alpha_pattern={"mlp.experts": SCALE * experts})
    trainer = SFTTrainer(
        model, SFTConfig(str(folder / "trl"), use_cpu=True, bf16=False, learning_rate=RATE,
                         per_device_train_batch_size=ROWS, assistant_only_loss=True,
                         router_aux_loss_coef=0.0,  # routers are frozen on both sides
                         max_length=None, packing=False, report_to=[], disable_tqdm=True,
                         gradient_checkpointing=False, seed=0),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in rows]),
        processing_class=tokenizer, peft_config=lora)
    trainer.create_optimizer_and_scheduler(len(rows))
    columns = list(trainer.train_dataset)
    batches = [trainer.data_collator(columns[first:first + ROWS])
               for first in range(0, len(rows), ROWS)]

    def step(number: int) -> tuple[float, int]:
        batch = {key: value for key, value in batches[number].items()}
        tokens = int(batch["attention_mask"].sum())
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), tokens
    return step


def run_side(name: str, folder: Path, steps: int, rank: int) -> dict[str, Any]:
    """One process: the loss of the first step, tokens per second of the others, memory."""
    rows = json.loads((folder / "rows.json").read_text())
    step = {"fira": fira_side, "trl": trl_side}[name](folder, rows, rank)
    reset_peak(torch.device("cpu"))
    losses = [step(0)[0]]
    began, tokens = time.perf_counter(), 0
    processor = time.process_time()
    for number in range(1, steps + 1):
        loss, size = step(number)
        losses.append(loss)
        tokens += size
    return {"losses": losses, "tokens_per_second": tokens / (time.perf_counter() - began),
            "tokens_per_processor_second": tokens / (time.process_time() - processor),
            "memory": peak_memory(torch.device("cpu"))}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--chat", required=True, help="conversations")
    parser.add_argument("--tokenizer", help="its folder")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--side", nargs=2, metavar=("NAME", "FOLDER"), help=parser.format_help)
    a = parser.parse_args()
    if a.side:
        print(json.dumps(run_side(a.side[0], Path(a.side[1]), a.steps, a.rank)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, tokenizer = Path(scratch), Tokenizer.load(a.tokenizer)
        rows = -(-tokenizer.vocab_size // 64) * 64
        spec = FIRA2Spec(vocab_size=rows, tied=False, **SHAPES[a.shape])
        model = build(spec, seed=1)
        model.end_of_text = tokenizer.end_of_text
        model.chat = True
        write_run(folder / "run", model, tokenizer, 0, {"preset": "benchmark", "stage": "tune"})
        export_run(folder / "run", folder / "hf", None, console())
        found = read_rows(a.chat, tokenizer, spec.context, ROWS * (a.steps + 1))
        (folder / "rows.json").write_text(json.dumps(found))
        results: dict[str, list[dict[str, Any]]] = {"fira": [], "trl": []}
        for _ in range(a.rounds):
            for name, runs in results.items():
                out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", name,
                                      str(folder)], stdout=subprocess.PIPE, text=True, check=True)
                runs.append(json.loads(out.stdout.strip().split("\n")[-1]))
    table: dict[str, Any] = {name: {key: statistics.median(run[key] for run in runs) for key in (
        "tokens_per_second", "tokens_per_processor_second", "memory")} | {
            "first_loss": runs[0]["losses"][0]} for name, runs in results.items()}
    print(f"{'':6}{'tokens/s':>10}{'per processor s':>17}{'MB':>8}{'first loss':>12}")
    for name, row in table.items():
        print(f"{name:6}{row['tokens_per_second']:10,.0f}"
              f"{row['tokens_per_processor_second']:17,.0f}{row['memory'] / 1e6:8,.0f}"
              f"{row['first_loss']:12.6f}")
    append(a.json, {"shape": a.shape, "rank": a.rank, **table, "machine": machine()})


if __name__ == "__main__":
    main()
