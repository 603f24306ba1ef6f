"""lm-eval scores a running server as it scores the model in this process."""
from __future__ import annotations

import json

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fira.infer.request import Release
from fira.model.generate import generate

WINDOW = 128
QUESTIONS = [
    {"question": "The state of the", "choices": ["Union", "naïve café", "text"], "answer": 0},
    {"question": "Größe and", "choices": ["strong", "🙂🙃", "of the Union is"], "answer": 1},
    {"question": "café, ", "choices": ["你好", "too", "state"], "answer": 2},
]
DOCUMENTS = [{"text": "The state of the Union is strong. "},
             {"text": "Größe, naïve café, 你好 and 🙂🙃 are text too. " * 9}]  # over one window
TASKS = {
    "choose": ("multiple_choice", QUESTIONS, """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""),
    "read": ("loglikelihood_rolling", DOCUMENTS, """
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""),
    "write": ("generate_until", QUESTIONS, """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]
"""),
}


class InProcess(TemplateLM):
    """The model without server, engine or cache."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.words = model, tokenizer

    @property
    def eot_token_id(self):
        return self.words.end_of_text

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.words.encode(string)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, **kwargs):
        scores = []
        for _, context, continuation in requests:
            logprobs_TV = self.model(torch.tensor([context + continuation]))[0].log_softmax(-1)
            rows_TV = logprobs_TV[len(context) - 1:-1]
            chosen_T = torch.tensor(continuation)
            scores.append((float(rows_TV.gather(-1, chosen_T[:, None]).sum()),
                           bool((rows_TV.argmax(-1) == chosen_T).all())))
        return scores

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        length = WINDOW - 2  # lm-eval leaves two places of the window unused in rolling over a text
        return [sum(score for score, _ in self._loglikelihood_tokens(
            [(None, *make_disjoint_window(window)) for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, length, 1)]))
            for request in requests]

    def generate_until(self, requests, disable_tqdm=False):
        texts = []
        for prompt, options in (request.args for request in requests):
            ids = self.tok_encode(prompt)
            new = generate(self.model, [ids], options["max_gen_toks"], temperature=0,
                           end_of_text=self.eot_token_id)[0, len(ids):].tolist()
            text = "".join(map(Release(self.words.token_bytes()).push, new))
            for stop in options["until"]:
                text = text.partition(stop)[0]
            texts.append(text)
        return texts


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, (kind, rows, lines) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(
            f"task: fira_{name}\noutput_type: {kind}\ntest_split: test\ndataset_path: json\n"
            f"dataset_kwargs: {json.dumps(options)}\n" + lines, encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(scorer, tasks, name):
    found = simple_evaluate(scorer, tasks=[f"fira_{name}"], task_manager=tasks, bootstrap_iters=0)
    return found["results"][f"fira_{name}"], [
        sample["filtered_resps"] for sample in found["samples"][f"fira_{name}"]]


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_the_model_in_this_process(real, model, tokenizer, tasks, tmp_path,
                                                       name):
    tokenizer.save(tmp_path)
    server = LocalCompletionsAPI(base_url=real.address + "/v1/completions", model="tiny",
                                 tokenizer=str(tmp_path), tokenizer_backend="huggingface",
                                 max_length=WINDOW, batch_size=2, num_concurrent=2)
    scores, answers = evaluate(server, tasks, name)
    wanted_scores, wanted_answers = evaluate(InProcess(model, tokenizer), tasks, name)
    assert [parted(answer) for answer in answers] == [
        pytest.approx(parted(answer), abs=1e-3) for answer in wanted_answers]
    numbers = {key: value for key, value in wanted_scores.items() if isinstance(value, float)}
    assert numbers and {key: scores[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)


def parted(answer):
    """A text, a number, or per choice a number and whether it was the likeliest: one flat list."""
    return [value for part in answer for value in (part if isinstance(part, tuple) else [part])]
