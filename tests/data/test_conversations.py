"""Files of conversations and text become rows; what is trained on is the answers, to the token."""
from __future__ import annotations

import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fira.data.chat import render
from fira.data.conversations import (
    NO_ANSWER,
    SHORTENED,
    TOO_LONG,
    Conversation,
    Reader,
    chat_row,
    read_conversation,
)
from fira.data.sources import RECORDS, inputs
from fira.data.tokenizer import Tokenizer
from fira.stages.dryrun import example

ASK, SAY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
ANSWERED = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n[[So.<|im_end|>]]\n"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"


def shown(tokenizer, record, longest=1 << 20):
    row, *_ = chat_row(tokenizer, read_conversation(record), longest)
    return str(example(row, tokenizer))


@pytest.mark.parametrize("record, text", [
    ({"messages": [ASK, SAY]}, ANSWERED),
    ({"messages": [ASK, SAY | {"content": "\n So. "}], "tools": None}, ANSWERED),
    ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
     ANSWERED),
    ({"conversations": [{"from": "system", "value": "Be brief."},
                        {"from": "user", "value": "Why?"}, {"from": "model", "value": "So."}]},
     SYSTEM + ANSWERED),
    ({"instruction": "Why?", "input": "", "output": "So."}, ANSWERED),
    ({"instruction": "Why?", "input": "It is.", "output": "So."},
     ANSWERED.replace("Why?", "Why?\n\nIt is.")),
    ({"instruction": "Why?", "context": "", "response": "So.", "category": "qa"}, ANSWERED),
    ({"prompt": "Why?", "completion": "So."}, ANSWERED),
    ({"prompt": [ASK, SAY, ASK], "completion": [SAY]},
     ANSWERED.replace("[[", "").replace("]]", "") + ANSWERED),
    ({"question": "Why?", "answer": "So."}, ANSWERED),
    ({"system_prompt": "Be brief.", "question": "Why?", "response": "So."}, SYSTEM + ANSWERED),
    ({"messages": [ASK, SAY | {"train": False}, ASK, SAY | {"train": True}]},
     ANSWERED.replace("[[", "").replace("]]", "") + ANSWERED),
    ({"messages": [ASK, SAY | {"weight": 1}, ASK, SAY | {"weight": 0}]}, ANSWERED),
    ({"messages": [ASK, SAY | {"reasoning_content": "Hm."}]},
     ANSWERED.replace("[[", "[[<think>\nHm.\n</think>\n\n")),
    ({"messages": [ASK, SAY | {"content": "<think>\nHm.\n</think>\nSo."}]},
     ANSWERED.replace("[[", "[[<think>\nHm.\n</think>\n\n")),
    ({"messages": [ASK, CALL, {"role": "tool", "content": "2"}, {"role": "tool", "content": "3"},
                   SAY]},
     ANSWERED.replace("So.", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
     + "<|im_start|>user\n<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n"
     "</tool_response><|im_end|>\n<|im_start|>assistant\n[[So.<|im_end|>]]\n"),
    ({"messages": [ASK, SAY | {"content": "<|im_end|> \0"}]},
     ANSWERED.replace("So.", "<|im_end|> \0")),
])
def test_answers_are_trained_on_in_every_form(tokenizer, record, text):
    assert shown(tokenizer, record) == text


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_stand_in_the_system_message(tokenizer, tools):
    text = shown(tokenizer, {"messages": [ASK, SAY], "tools": tools})
    assert json.dumps(TOOL) in text and text.endswith(ANSWERED)


BAD = {
    "two in a row": ({"messages": [ASK, ASK, SAY]}, "message 1 is of the user like the one before"),
    "role": ({"messages": [ASK, {"role": "robot", "content": "x"}]}, "message 1 has role 'robot'"),
    "no role": ({"messages": [{"content": "x"}]}, "message 0 has no role"),
    "not a message": ({"messages": ["x"]}, "message 0 has no role"),
    "white space": ({"messages": [ASK, SAY | {"content": " \n"}]}, "message 1, an answer, is empt"),
    "thoughts that are no text": (
        {"messages": [ASK, SAY | {"reasoning_content": 5}]}, "no text under reasoning_content"),
    "only thoughts": ({"messages": [ASK, SAY | {"content": "<think>x</think>"}]}, "is empty"),
    "number": ({"question": "How many?", "answer": 7}, "message 1 has no text under content"),
    "numbers": ({"instruction": 1, "input": "x", "output": "y"}, "message 0 has no text under con"),
    "late system": ({"messages": [ASK, {"role": "system", "content": "x"}]}, "speaks only first"),
    "keys": ({"title": "x", "body": "y"}, "no conversation under the keys title, body; use messag"),
    "null": ({"prompt": "x", "completion": None}, "no conversation under the keys prompt, complet"),
    "list": ([1, 2], "no conversation under the keys"),
    "surrogate": ({"messages": [ASK, SAY | {"content": "a\ud800"}]}, "half of a surrogate pair"),
    "tools": ({"messages": [ASK, SAY], "tools": ["add"]}, "tools is no list of objects"),
    "call": ({"messages": [ASK, SAY | {"tool_calls": [{"name": "x"}]}]}, "'arguments' is miss"),
}


@pytest.fixture
def write(tmp_path):
    def to(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
        return str(path)
    return to


@pytest.mark.parametrize("name", BAD)
def test_a_row_at_fault_is_named_or_left_out(tokenizer, write, name):
    record, rule = BAD[name]
    path = write("rows.jsonl", [{"messages": [ASK, SAY]}, record])
    with pytest.raises(ValueError) as error:
        Reader(tokenizer, 99).chat(inputs([path]))
    line = str(error.value)
    assert line.startswith(f"{path}:2: ") and rule in line and "\n" not in line
    assert line.endswith("correct this row, leave it out, or give --skip-bad")
    reader = Reader(tokenizer, 99, skip_bad=True)
    assert len(reader.chat(inputs([path]))) == 1
    assert reader.tally["left out, at fault"] == {"count": 1, "first": ["rows.jsonl:2"]}


@pytest.mark.parametrize("line, rule", [
    (b"{", "cannot be read"), (b"[" * 100000, "cannot be read"), (b'{"messages": "\xff"}', "UTF-8"),
])
def test_a_line_that_is_no_json_is_one_row_at_fault(tokenizer, tmp_path, line, rule):
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"messages": [ASK, SAY]}).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{rule}"):
        Reader(tokenizer, 99).chat(inputs([str(path)]))
    assert len(Reader(tokenizer, 99, skip_bad=True).chat(inputs([str(path)]))) == 2


def test_every_kind_of_file_is_found_and_said(tokenizer, tmp_path):
    record = {"messages": [ASK, SAY]}
    (tmp_path / "a.json").write_text(json.dumps([record, {"prompt": "x", "completion": "y"}]))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress(json.dumps(record).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record] * 3), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("Not data.")
    reader = Reader(tokenizer, 99)
    assert len(reader.chat(inputs([str(tmp_path)], RECORDS))) == 6
    assert reader.lines == ["a.json: 2 conversations (messages, prompt/completion)",
                            "b.jsonl.xz: 1 conversations (messages)",
                            "c.parquet: 3 conversations (messages)"]


@pytest.mark.parametrize("name, content, read, rule", [
    ("book.txt", "A text.", Reader.chat, "is text, not conversations .* give it with --text"),
    ("chat.jsonl", json.dumps({"messages": [ASK, SAY]}), Reader.text,
     r"chat.jsonl:1 is a conversation \(messages\), not text; give it with --chat"),
    ("text.jsonl", '{"text": "x"}', Reader.chat, "text.jsonl:1: .*text is given with --text"),
    ("empty.jsonl", "", Reader.chat, "empty.jsonl holds no conversation; give a file with messag"),
    ("empty.txt", "", Reader.text, "empty.txt holds no text"),
])
def test_a_file_of_another_kind_is_named_with_the_option(tokenizer, tmp_path, name, content, read,
                                                         rule):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=rule):
        read(Reader(tokenizer, 99), inputs([str(path)]))


def test_a_tokenizer_without_turns_is_named_with_what_to_do(tokenizer, write):
    other = Tokenizer(tokenizer.reference)
    other.added = {"<|endoftext|>": 0}
    path = write("rows.jsonl", [{"messages": [ASK, SAY]}])
    with pytest.raises(ValueError, match="no <.im_start.> and no <.im_end.>.*tune it on --text"):
        Reader(other, 99, skip_bad=True).chat(inputs([path]))


def texts_of(tokenizer, messages, path, **options):
    path.write_text(json.dumps({"messages": messages}))
    rows = Reader(tokenizer, 999, **options).chat(inputs([str(path)]))
    assert [row.group for row in rows] == [0] * len(rows)
    return [str(example(row, tokenizer)) for row in rows]


def test_every_answer_is_trained_on_once_after_what_is_read_when_it_is_generated(tokenizer,
                                                                                 tmp_path):
    """Two thoughts, an answer without one, an empty one: four rows; their history has none."""
    thinking, direct = SAY | {"reasoning_content": "Hm."}, SAY | {"reasoning_content": ""}
    messages = [ASK, thinking, ASK, SAY, ASK, thinking, ASK, direct, ASK, SAY]
    read = ANSWERED.replace("[[", "").replace("]]", "")
    thought = ANSWERED.replace("[[", "[[<think>\nHm.\n</think>\n\n")
    empty = ANSWERED.replace("[[", "<think>\n\n</think>\n\n[[")
    rows = [thought, read + ANSWERED + thought, read * 3 + empty, read * 4 + ANSWERED]
    assert texts_of(tokenizer, messages, tmp_path / "a.json") == rows
    head = render(tokenizer, [ASK], direct=True)
    assert tokenizer.encode(empty.partition("[[")[0], allow_special=True) == head
    twice = texts_of(tokenizer, [ASK, thinking], tmp_path / "b.json", direct=True)
    assert twice == [thought, empty]
    assert texts_of(tokenizer, [ASK, SAY], tmp_path / "c.json", direct=True) == [ANSWERED]


def test_thoughts_need_the_tokens_around_them(tokenizer):
    other = Tokenizer(tokenizer.reference)
    other.added = {name: id for name, id in tokenizer.added.items() if name != "</think>"}
    thinking = read_conversation({"messages": [ASK, SAY | {"reasoning_content": "Hm."}]})
    with pytest.raises(ValueError, match="no <think> or no </think>, which thoughts need; tune a"):
        chat_row(other, thinking, 99)


def test_a_long_row_keeps_whole_answers_and_says_so(tokenizer):
    whole = Conversation([ASK, SAY] * 3, [])
    row, why, size = chat_row(tokenizer, whole, 1 << 20)
    assert (why, size) == ("", len(row.ids))
    third = size // 3
    short, why, _ = chat_row(tokenizer, whole, size - 1)
    assert why == SHORTENED and len(short.ids) == 2 * third
    assert (short.ids == row.ids[:2 * third]).all() and short.trained[third:].any()
    assert chat_row(tokenizer, whole, third - 1) == (None, TOO_LONG, third)
    assert chat_row(tokenizer, Conversation([SAY | {"role": "system"}], []), 9)[:2] == (
        None, NO_ANSWER)


def test_of_ten_thousand_turns_only_those_that_fit_are_read(tokenizer):
    row, why, _ = chat_row(tokenizer, Conversation([ASK, SAY] * 5000, []), 512)
    assert why == SHORTENED and 400 < len(row.ids) <= 512


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n"), min_size=1,
                              max_size=60), min_size=1, max_size=4), longest=st.integers(2, 20))
def test_every_id_of_a_text_is_a_target_once(tokenizer, tmp_path_factory, texts, longest):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = Reader(tokenizer, longest).text(inputs([str(path)]))
    end = tokenizer.end_of_text
    wanted = [id for text in texts for id in (*tokenizer.encode(text), end)]
    assert [int(id) for row in rows for id in row.ids[row.trained]] == wanted
    assert all(1 < len(row.ids) <= longest and not row.trained[0] for row in rows)
    before = [end, *wanted]
    starts = [0, *([sum(int(row.trained.sum()) for row in rows[:n]) for n in range(1, len(rows))])]
    assert [int(row.ids[0]) for row in rows] == [before[start] for start in starts]
