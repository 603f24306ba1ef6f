"""What a tuning reads is said before it begins, and what cannot be tuned on is refused."""
from __future__ import annotations

import json

import pytest

from fira.infer.load import load

SHORT = ("train.sequence_length=48", "train.batch_tokens=192", "train.micro_batch=2", "--device",
         "cpu")


def talk(question, answer="So."):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}


def write(folder, name, records):
    path = folder / name
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


@pytest.fixture
def chats(tmp_path):
    return write(tmp_path, "chats.train.jsonl", [talk(f"Why {n}?") for n in range(30)]
                 + [talk("Why?", "So. " * 99), {"messages": [{"role": "system", "content": "x"}]}])


def test_a_tuning_says_what_it_read_and_trains_on_no_held_out_row(trained_run, chats, tmp_path,
                                                                  fira):
    held_out = write(tmp_path, "held.jsonl", [talk(f"Why {n}?") for n in range(25, 35)])
    out = tmp_path / "out"
    words = ("tune", trained_run, "--chat", chats, "--held-out", held_out, *SHORT)
    planned = fira(*words, "--dry-run")
    assert planned.code == 0 and not out.exists(), planned.err
    done = fira(*words, "--run", out, "train.save_every=99")
    assert done.code == 0, done.err
    for line in ("chats.train.jsonl: 32 conversations (messages)",
                 "held.jsonl: 10 conversations (messages)",
                 "of these: 1 left out, too long for their first answer (chats.train.jsonl:31), "
                 "1 left out, without an answer to train on (chats.train.jsonl:32)",
                 "5 rows are equal to held-out rows and left out"):
        assert line in done.err and line in planned.out
    record = json.loads((out / "config.json").read_text())
    steps, trained = record["config"]["train"]["steps"], record["parameters"]["trained"]
    assert record["data"]["rows"] == 25 and record["data"]["rows equal to held-out rows"] == 5
    for line in ("25 to train on, 10 held out", f"{steps} steps of 4 sequences",
                 f"{trained:,} of ", "experts.gate.lora.a", "4 of 4", "[[what",
                 "[[So.<|im_end|>]]"):
        assert line in planned.out


def test_held_out_files_are_found_by_their_names(trained_run, chats, tmp_path, fira):
    write(tmp_path, "chats.dev.jsonl", [talk(f"Who {n}?") for n in range(7)])
    planned = fira("tune", trained_run, "--chat", tmp_path, "--dry-run", *SHORT)
    assert "30 to train on, 7 held out" in planned.out, planned.err


@pytest.mark.parametrize("records, rule", [
    ([talk("Why?", "So. " * 40)] * 3, "the model reads 64 tokens, the shortest needs "),
    ([talk("Why?", "So. " * 12)] * 3, "set train.sequence_length="),
    ([{"messages": [{"role": "system", "content": "x"}]}], "give rows with an answer"),
    ([talk("Why?")], "the only row is held out; give more, or --held-out FILES"),
    ([talk("Why?")] * 5, "all others are equal to held-out rows; give other rows"),
])
def test_nothing_to_train_on_is_refused_with_what_to_do(trained_run, tmp_path, refused, fira,
                                                        records, rule):
    words = ("tune", trained_run, "--chat", write(tmp_path, "a.jsonl", records), "--dry-run")
    line = refused(*words, "train.sequence_length=24", code=1)
    assert "no row is left to train on: " in line and rule in line
    if "set train" in line:
        setting = line.rpartition("set ")[2]
        more = write(tmp_path, "b.jsonl", [talk("Who?", "Me. " * 12)])
        fixed = fira(*words, "--chat", more, setting)
        assert "1 to train on" in fixed.out, fixed.err


def test_a_chat_model_learns_to_think_from_rows_with_thoughts(trained_run, tmp_path, fira):
    """The tokens around thoughts are new to it, and both rows of a question are held out together.
    """
    plain, thinks = tmp_path / "plain", tmp_path / "thinks"
    rows = [talk(f"Why {n}?") for n in range(30)]
    for row in rows:
        row["messages"][1]["reasoning_content"] = "Hm."
    words = ("--no-card", *SHORT, "train.steps=2", "--chat")
    asked = write(tmp_path, "plain.jsonl", [talk(f"Who {n}?") for n in range(9)])
    assert fira("tune", trained_run, "--method", "full", *words, asked, "--run", plain).code == 0
    assert load(plain, "cpu").model.think is False
    words = ("tune", plain, *words, write(tmp_path, "thinks.jsonl", rows), "data.direct=true")
    assert "56 to train on, 4 held out" in fira(*words, "--dry-run").out
    assert fira(*words, "--run", thinks).code == 0
    assert json.loads((thinks / "config.json").read_text())["data"]["rows with thoughts"] == 56
    (before, tokenizer, _), (after, *_) = load(plain, "cpu"), load(thinks, "cpu")
    assert after.think is True
    ids = [tokenizer.special(name) for name in ("<think>", "</think>", "<tool_call>")]
    moved = (after.head_weights()[0] - before.head_weights()[0]).norm(dim=-1)[ids]
    assert moved[0] > 1e-5 < moved[1] and (moved[0] != moved[1]) and moved[2] == 0


def test_a_tuning_is_not_resumed_with_other_data(trained_run, chats, tmp_path, fira, refused):
    out = tmp_path / "out"
    words = ("tune", trained_run, "--chat", chats, *SHORT, "train.steps=2", "--run", out)
    assert fira(*words).code == 0
    chats.write_text(chats.read_text().replace("Why 7", "Who 7"))
    line = refused("tune", "--resume", "--run", out, "train.steps=4", code=1)
    assert "this run was begun with other data" in line and "put the files back" in line


def test_without_a_run_folder_only_a_dry_run_is_done(trained_run, chats, refused):
    assert "--run" in refused("tune", trained_run, "--chat", chats, code=2)
