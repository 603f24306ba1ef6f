"""The referee: lm-eval with transformers scores an exported model as we score the run."""
from __future__ import annotations

import json

import pytest
from rich.console import Console

from fira.convert.hf import export_run
from fira.eval.score import encode_rows, score
from fira.eval.suites import open_task
from fira.infer.load import load

pytest.importorskip("accelerate")  # which lm-eval's backend imports
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

START = "<|endoftext|>"  # our text begins after it; lm-eval adds it to an empty context alone
CHOICES = {"text": ["a thin wire", "a thick blanket"], "label": ["A", "B"]}
TASKS = {  # records as published, and lm-eval's stock prompt of the set
    "arc_easy": ([{"question": f"Which keeps {thing} warm?", "choices": CHOICES, "answerKey": key}
                  for thing, key in (("milk", "B"), ("a naïve café", "A"))],
                 {"doc_to_text": START + "Question: {{question}}\nAnswer:",
                  "doc_to_choice": "{{choices.text}}",
                  "doc_to_target": "{{choices.label.index(answerKey)}}"}),
    "piqa": ([{"goal": "open a jar", "sol1": "twist the lid", "sol2": "eat it", "label": 0}],
             {"doc_to_text": START + "Question: {{goal}}\nAnswer:", "doc_to_target": "label",
              "doc_to_choice": "{{[sol1, sol2]}}"}),
    "lambada": ([{"text": "the state of the union is strong"}, {"text": "he saw `` it ''"}],
                {"doc_to_text": START + "{{text.split(' ')[:-1]|join(' ')}}",
                 "doc_to_target": "{{' '+text.split(' ')[-1]}}", "output_type": "loglikelihood"}),
    "blimp": ([{"sentence_good": "Who left?", "sentence_bad": "Who did left?"}],
              {"doc_to_text": "", "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
               "doc_to_target": 0, "target_delimiter": ""}),
    "gsm8k": ([{"context": f"Question: {n} bags of 4?\nAnswer:",
                "answer": f" {n}*4 = <<{n}*4={n * 4}>>{n * 4}.\n#### {n * 4}"} for n in (3, 12)],
              {"doc_to_text": START + "{{context}}", "doc_to_target": "{{answer}}",
               "target_delimiter": "", "output_type": "loglikelihood"}),
}


def test_lm_eval_gives_the_same_log_probability_for_every_request(trained_run, tmp_path):
    export_run(trained_run, tmp_path / "hf", None, Console(quiet=True))
    configs = []
    for name, (records, form) in TASKS.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        configs.append({"task": f"test_{name}", "dataset_path": "json", "test_split": "test",
                        "dataset_kwargs": {"data_files": {"test": str(file)}}, "num_fewshot": 0,
                        "output_type": "multiple_choice", "metric_list": [{"metric": "acc"}],
                        **form})
    peer = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", batch_size=2, dtype="float32")
    theirs = simple_evaluate(model=peer, tasks=configs, log_samples=True, bootstrap_iters=0)
    model, tokenizer, _ = load(trained_run, "cpu")
    for name in TASKS:
        task = open_task(name, str(tmp_path / f"{name}.jsonl"))
        given = encode_rows(tokenizer, task.rows, model.spec.context)
        assert given.left_out == given.cut == []
        samples = sorted(theirs["samples"][f"test_{name}"], key=lambda sample: sample["doc_id"])
        for sample, costs in zip(samples, score(model, given.rows), strict=True):
            wanted = [response[0][0] for response in sample["resps"]]
            assert [-cost_P2[:, 0].sum() for cost_P2 in costs] == pytest.approx(wanted, abs=1e-4)
