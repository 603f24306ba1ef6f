"""Servers in this process, on free ports, with a real engine or a fake one."""
from __future__ import annotations

import threading
import time

import httpx
import pytest

from fira.data.tokenizer import train_tokenizer
from fira.infer.engine import Engine
from fira.infer.request import End, QueueFull, Release, Token, TokenScore
from fira.model.spec import FIRA2Spec
from fira.serve.api import ServedModel
from fira.serve.connection import HTTPServer
from fira.serve.guard import Keys
from fira.serve.process import architecture, listen
from fira.serve.server import Server
from tests.models import build

TEXT = ["The state of the Union is strong. Größe, naïve café, 你好 and 🙂🙃 are text too. " * 80]


class FakeEngine:
    """Repeats one sentence, and sleeps `pause` seconds before each token, a thread per request."""

    def __init__(self, tokenizer, capacity=1000, pause=0.0):
        self.tokenizer, self.capacity, self.pause = tokenizer, capacity, pause
        self.said = tokenizer.encode("Größe 🙂 of the Union. ")
        self.cancelled, self.running, self.fault = set(), {}, ""
        self.stats = {"running": 0, "waiting": 0, "generated_tokens": 7, "prompt_tokens": 5,
                      "cached_tokens": 1}
        self.loads = [[3, 1, 0, 0], [1, 1, 1, 1]]
        self.asked, self.thought = [], []  # the texts of a thought before it
        self.after_tokens = bool

    def add(self, ids, params, listener):
        if len(self.running) >= self.capacity:
            raise QueueFull(f"{self.capacity} requests wait")
        self.asked.append((list(ids), params))
        number = len(self.asked)
        self.running[number] = params

        def tell(event):
            listener(event)
            self.after_tokens()
        threading.Thread(target=self._generate, args=(number, ids, params, tell),
                         daemon=True).start()
        return number

    def cancel(self, number):
        self.cancelled.add(number)

    def close(self):
        self.cancelled |= set(self.running)
        while self.running:
            time.sleep(0.01)

    def _generate(self, number, ids, params, listener):
        text, count, reason = Release(self.tokenizer.token_bytes(), params.stop), 0, "length"
        thought = self.thought if params.max_thinking_tokens is not None else []
        for word in thought:
            listener(Token(6, word, self._score(6, params.logprobs), thought=True))
        while count < params.max_new_tokens and reason == "length":
            time.sleep(self.pause)
            if number in self.cancelled or self.fault:
                reason = "error" if self.fault else "cancelled"
                break
            new = self.said[count % len(self.said)]
            count += 1
            listener(Token(new, text.push(new), self._score(new, params.logprobs),
                           ((0, 1), (2, 3)) if params.experts else None))
            reason = "stop" if text.stopped else reason
        del self.running[number]
        prompt = []
        if params.prompt_logprobs is not None:
            prompt = [self._score(id, params.prompt_logprobs) for id in ids]
            prompt[0] = TokenScore(ids[0], None)
        listener(End(reason, text.finish(), len(ids), 0, count, prompt=prompt, error=self.fault,
                     thinking_tokens=len(thought)))

    def _score(self, id, others):
        if others is None:
            return None
        ranked = ((id, -0.5), *((other, -2.0 - other) for other in range(others)))
        return TokenScore(id, -0.5, ranked[:others])


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXT, vocab_size=310)


@pytest.fixture
def served(tokenizer):
    return ServedModel("tiny", tokenizer, window=200, vocab_size=320, chat_tuned=True)


@pytest.fixture
def engine(tokenizer):
    return FakeEngine(tokenizer)


class RunningServer:
    """A server in a thread; `http` is a client of it; `chat` and `text` ask for 17 tokens."""

    def __init__(self, load, keys=None, loopback=True, **options):
        self.server = Server(load, self.fail, keys and Keys(keys), loopback, **options)
        self.socket = listen("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.process = HTTPServer(self.server.app(), limit=50)
        self.thread = threading.Thread(target=self.process.run,
                                       kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.http = httpx.Client(base_url=self.address, timeout=20)

    def chat(self, headers=None, **changes):
        messages = [{"role": "user", "content": "Hi"}]
        return self.http.post("/v1/chat/completions", headers=headers,
                              json={"messages": messages, "max_tokens": 17, **changes})

    def text(self, headers=None, **changes):
        return self.http.post("/v1/completions", headers=headers,
                              json={"prompt": "The state", "max_tokens": 17, **changes})

    def wait(self):
        """Wait until the model is loaded."""
        while self.http.get("/health").status_code != 200:
            time.sleep(0.01)
        return self

    def fail(self, error):
        raise error

    def stop(self):
        self.http.close()
        self.process.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def start():
    """Start a server over a loading function; stopped when the test ends."""
    started = []

    def begin(load, **options):
        started.append(RunningServer(load, **options))
        return started[-1]
    yield begin
    for running in started:
        running.stop()


@pytest.fixture
def running(start, served, engine):
    return start(lambda: (served, engine)).wait()


@pytest.fixture
def http(running):
    return running.http


@pytest.fixture(scope="module")
def window():
    return 128


@pytest.fixture(scope="module")
def model(tokenizer, window):
    spec = FIRA2Spec(vocab_size=320, d_model=32, n_head=2, n_kv_head=1, head_dim=16, num_layers=2,
                     d_ff=32, num_experts=4, top_k=2, context=window)
    return build(spec, seed=1).eval()


@pytest.fixture(scope="module")
def real(model, tokenizer):
    """A server over a real engine."""
    engine = Engine(model, tokenizer, slots=8)
    engine.start()
    served = ServedModel("tiny", tokenizer, model.spec.context, 320, chat_tuned=True,
                         architecture=architecture(model), width=32)
    running = RunningServer(lambda: (served, engine)).wait()
    yield running
    running.stop()
