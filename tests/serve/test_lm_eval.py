"""lm-eval's client of a running server scores as the model in this process does."""
from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fira.eval.score import encode_rows, score
from fira.eval.task import make_row
from fira.infer.request import Release
from fira.model.generate import generate

WINDOW = 128
UNTIL = {"until": ["e", "\n"], "max_gen_toks": 12, "temperature": 0}
REQUESTS = {  # the arguments of each kind of request that lm-eval's tasks make
    "loglikelihood": [("The state of the", " Union"), ("The state of the", " naïve café"),
                      ("Größe and", " 🙂🙃"), ("café, ", " 你好"), ("", " text")],
    "loglikelihood_rolling": [("The state of the Union is strong. ",),  # the other: over one window
                              ("Größe, naïve café, 你好 and 🙂🙃 are text too. " * 9,)],
    "generate_until": [("The state of the", UNTIL), ("Größe and", UNTIL), ("café, ", UNTIL)],
}

ROWS = [  # as fira eval reads them
    {"context": "Question: Is it?\nAnswer:", "continuations": [" no", " naïve café"], "gold": 0},
    {"context": ["The café", "The 🙂"], "continuations": [" is strong."] * 2, "gold": 1},
    {"context": "The state of the Union is", "answer": " strong"},
    {"context": "Question: 12 bags of 4?\nAnswer:", "answer": " 12*4 = <<12*4=48>>48.\n#### 48"},
    {"good": "The state is strong.", "bad": "The state are strong."}]


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


@pytest.mark.parametrize("kind, backend", [*((kind, "huggingface") for kind in REQUESTS),
                                           ("loglikelihood_rolling", "remote")])
def test_scores_are_those_of_the_model_in_this_process(real, model, tokenizer, tmp_path, kind,
                                                       backend):
    tokenizer.save(tmp_path)
    server = LocalCompletionsAPI(base_url=real.address + "/v1/completions", model="tiny",
                                 tokenizer=str(tmp_path), tokenizer_backend=backend,
                                 max_length=WINDOW, batch_size=2, num_concurrent=2)
    requests = [Instance(kind, {}, arguments, number)
                for number, arguments in enumerate(REQUESTS[kind])]
    found, wanted = (getattr(scorer, kind)(requests)
                     for scorer in (server, InProcess(model, tokenizer)))
    if kind == "loglikelihood":  # a score, and whether the continuation is the greedy one
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        found, wanted = [score for score, _ in found], [score for score, _ in wanted]
    assert len(found) == len(requests)
    assert found == (wanted if kind == "generate_until" else pytest.approx(wanted, abs=1e-3))


def test_fira_eval_gives_the_log_likelihoods_that_lm_eval_gets_from_the_server(
        real, model, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    server = LocalCompletionsAPI(base_url=real.address + "/v1/completions", model="tiny",
                                 tokenizer=str(tmp_path), tokenizer_backend="huggingface",
                                 max_length=WINDOW, batch_size=3, num_concurrent=2)
    rows = [make_row(record, "row") for record in ROWS]
    pairs = [("<|endoftext|>" * bool(context) + context, end)
             for row in rows for context, end in row.options]
    theirs = server.loglikelihood([Instance("loglikelihood", {}, pair, number)
                                   for number, pair in enumerate(pairs)])
    costs = [cost_P2 for options in score(model, encode_rows(tokenizer, rows, WINDOW).rows)
             for cost_P2 in options]
    assert [-cost_P2[:, 0].sum() for cost_P2 in costs] == pytest.approx(
        [value for value, _ in theirs], abs=1e-4)
    assert [bool((cost_P2[:, 1] == 0).all()) for cost_P2 in costs] == [
        greedy for _, greedy in theirs]
