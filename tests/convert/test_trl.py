"""TRL, on the exported model and its chat template, trains on the same tokens at the same loss."""
from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from rich.console import Console

from fira.convert.hf import export_run
from fira.data.addresses import conversations
from fira.data.batches import PackedBatch
from fira.data.conversations import chat_row, read_conversation
from fira.data.packs import Packs
from fira.infer.load import load
from fira.loss.head import next_token_loss
from fira.parallel.layout import read
from tests.convert.conftest import KINDS

pytest.importorskip("trl")


def marked(template):
    """The exported template with the marks of transformers around what is generated."""
    head, middle, rest = template.partition("{% set content")
    body, end, tail = (middle + rest).rpartition("<|im_end|>\n")
    return (f"{head}{{% if message['role'] == 'assistant' %}}{{% generation %}}{body}<|im_end|>"
            f"{{% endgeneration %}}{{% else %}}{body}<|im_end|>{{% endif %}}{{{{ '\\n' }}}}{tail}")


def test_labels_and_first_loss_are_those_of_trl(chat_run, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    export_run(chat_run, tmp_path / "hf", "float32", Console(quiet=True))
    auto = AutoTokenizer.from_pretrained(tmp_path / "hf")
    auto.chat_template = marked(auto.chat_template)
    records = [*KINDS, *({"messages": one} for one in islice(conversations(), 20))]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32),
        SFTConfig(str(tmp_path / "trl"), use_cpu=True, bf16=False, assistant_only_loss=True,
                  router_aux_loss_coef=0.0, max_length=None, report_to=[], disable_tqdm=True),
        train_dataset=Dataset.from_list(records), processing_class=auto)
    batch = trainer.data_collator(list(trainer.train_dataset))
    model, tokenizer, _ = load(chat_run, "cpu")
    rows = [chat_row(tokenizer, read_conversation(one), 1 << 20)[0] for one in records]
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        # theirs end with the newline after the last turn, ours with that too, untrained
        assert ids[:len(row.ids)].tolist() == row.ids.tolist()
        assert (labels != -100)[:len(row.ids)].tolist() == row.trained.tolist()
        assert (labels[len(row.ids):] == -100).all()
    fit = [number for number, row in enumerate(rows) if len(row.ids) <= model.spec.context]
    packs = Packs([rows[number] for number in fit], model.spec.context)
    ours = PackedBatch(*map(torch.from_numpy, packs.read(np.arange(len(packs)))))
    with torch.no_grad():
        loss, _ = next_token_loss(read(model, ours), ours)
        theirs = trainer.model(**{key: batch[key][fit] for key in (
            "input_ids", "attention_mask", "labels")}).loss
    assert len(fit) >= 3 and abs(loss.item() - theirs.item()) < 1e-4
