"""The card is read by the hub's own parser and says what the records say, or that they do not."""
import json
import shutil

import pytest
from huggingface_hub import ModelCard

from fira.report.card import _base


def test_the_hub_reads_the_card_beside_the_exported_weights(run, fira, tmp_path):
    rows = [{"good": "The state of the Union", "bad": f"The state {n}"} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fira("eval", run, "--task", tmp_path / "pairs.jsonl", "--json", run / "eval.json")
    other = json.loads((run / "eval.json").read_text()) | {"model_sha256": "of other weights"}
    (run / "eval-other.json").write_text(json.dumps(other).replace("pairs", "others"))
    assert fira("card", run, "--license", "apache-2.0").out.strip() == str(run / "README.md")
    assert fira("export", "hf", run, tmp_path / "hf").code == 0
    ours, exported = (ModelCard.load(folder / "README.md") for folder in (run, tmp_path / "hf"))
    assert (ours.data.library_name, exported.data.library_name) == ("fira", "transformers")
    assert exported.data.license == "apache-2.0"  # once chosen it stays
    assert exported.data.tags == ["fira", "fira2", "mixture-of-experts"]
    scores = {(one.dataset_name, one.metric_type): one.metric_value
              for one in exported.data.eval_results}
    row = next(row for row in map(json.loads, (run / "metrics.jsonl").open())
               if row["kind"] == "validation" and row["step"] == 10)
    assert scores["held-out text", "bits_per_byte"] == round(row["bits_per_byte"], 4)
    assert {name for name, _ in scores} == {"held-out text", "pairs.jsonl"}
    about = json.loads((run / "config.json").read_text())
    for fact in (about["data"]["sha256"][0], about["machine"], f"{about['parameters']['active']:,}",
                 "speech-000.txt; ", "| licenses of the sources | not recorded |",
                 f"{row['bits_per_byte'] - 1.96 * row['bits_per_byte_error']:.4f} to"):
        assert fact in exported.content, fact
    assert str(run.parent) not in exported.content
    assert (tmp_path / "hf" / "generation_config.json").is_file()


def test_a_step_without_its_run_has_a_card_and_another_readme_stays(run, fira, refused, tmp_path):
    step = shutil.copytree(run / "step-000010", tmp_path / "alone")
    assert fira("card", step).code == 0
    text = (step / "README.md").read_text()
    assert "| parameters | not recorded |" in text and ModelCard(text).data.license == "unknown"
    (step / "README.md").write_text("# My own page")
    assert "was not written by fira card; move it away" in refused("card", step)


@pytest.mark.parametrize("about, expected", [
    ({"from": "/a/tuned/step-000010"}, ("tuned", "finetune")),
    ({"quantized_from": "/a/run/step-000010"}, ("run", "quantized")),
    ({"imported_from": "/c/models--Qwen--Qwen3-0.6B/snapshots/abc"}, ("Qwen/Qwen3-0.6B",)),
    ({"from": None}, ())])
def test_the_model_below_is_named_with_its_relation(about, expected):
    assert tuple(_base(about).values()) == expected
