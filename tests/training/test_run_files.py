"""A run leaves exactly its files, and what it logs, reports and writes on the model card is true.

python -m pytest tests/training/test_run_files.py
"""

import io
import itertools
import json
import logging
import math
import re
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from runs import (
    EOS,
    FORMAT,
    TECHNIQUES,
    checkpoints,
    failing,
    held_out_losses,
    hidden_leftovers,
    plain_loss,
    refused,
    run,
    saved,
    script,
    small_gpt2,
    training_losses,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import data_pipeline
import modify_llm
import train_llm


def test_a_run_leaves_exactly_these_files(finished):
    directory = finished[0]
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    logs = {name for name in names if re.fullmatch(r"training_\d{8}_\d{6}\.log", name)}
    assert len(logs) == 1
    assert names - logs == {
        "run.json", "metrics.jsonl", "training_curves.png", "predictions.jsonl", "checkpoints", "best", "final"
    }  # fmt: skip
    assert not hidden_leftovers(directory)
    assert [path.name for path in checkpoints(directory)] == ["step_00000006", "step_00000012"]
    for place in ("best", "final"):
        held = {path.name for path in (directory / place).iterdir()}
        assert {
            "adapter_model.safetensors",
            "adapter_config.json",
            "modification.json",
            "tokenizer.json",
        } <= held
    assert (directory / "training_curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_checkpoints_hold_trained_tensors_and_json_alone(finished):
    for checkpoint in checkpoints(finished[0]):
        names = load_file(checkpoint).keys()
        trained = {name.removeprefix("weight.") for name in names if name.startswith("weight.")}
        assert len(trained) == 2 * 8 and all(".lora_" in name for name in trained)
        kinds = ("weight", "exp_avg", "exp_avg_sq", "step")
        expected = {f"{kind}.{name}" for kind in kinds for name in trained}
        assert names == expected | {"random.0.cpu"}
        with safe_open(checkpoint, "pt") as file:
            assert file.metadata().keys() == {"state", "sha256"}
            assert json.loads(file.metadata()["state"])["settings"]["lora_rank"] == 4


def test_a_lora_checkpoint_of_gpt2_small_stays_below_ten_megabytes(finished):
    """12 bytes a trained parameter (the weight and AdamW's two moments, fp32), and some hundreds a tensor."""
    checkpoint = checkpoints(finished[0])[-1]
    tensors = {k: v for k, v in load_file(checkpoint).items() if k.startswith("weight.")}
    rest = checkpoint.stat().st_size - 12 * sum(tensor.numel() for tensor in tensors.values())
    assert 0 < rest < 20_000 + 1000 * len(tensors)
    small = 12 * (4 * 768 + 2304 * 4 + 4 * 768 + 768 * 4 + 4 * 768 + 3072 * 4 + 4 * 3072 + 768 * 4)
    assert small == 589_824
    assert 12 * small + 20_000 + 1000 * 12 * 8 < 10e6


def test_metrics_rows_have_these_keys_and_perplexity_is_exp_of_loss(finished):
    lines = (finished[0] / "metrics.jsonl").read_text().splitlines()
    rows_ = [json.loads(line) for line in lines]
    training, held_out = [r for r in rows_ if "loss" in r], [r for r in rows_ if "loss" not in r]
    assert [row["step"] for row in training] == [2, 4, 6, 8, 10, 12]
    assert [row["epoch"] for row in training] == [0, 0, 0, 1, 1, 1]
    assert [(row["step"], row["epoch"]) for row in held_out] == [(0, 0), (6, 0), (12, 1)]
    for row in training:
        assert list(row) == [
            "step",
            "epoch",
            "loss",
            "perplexity",
            "lr",
            "grad_norm",
            "tokens_per_second",
        ]
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["grad_norm"] > 0 and row["tokens_per_second"] > 0
    for row in held_out:
        assert list(row) == [
            "step",
            "epoch",
            "eval_loss",
            "eval_perplexity",
            "eval_accuracy",
            "eval_tokens",
        ]
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))


def test_a_training_row_is_the_token_weighted_mean_since_the_row_before(
    flags, tmp_path, rows, bytes_tokenizer
):
    """With a rate too small to move a weight, an epoch's rows average to the base's own loss over the training rows."""
    argv = flags(
        tmp_path,
        max_steps=None,
        epochs=1,
        learning_rate=1e-30,
        log_interval=100,
        scheduler="constant",
    )
    assert run(argv) == 0
    dataset = data_pipeline.load_dataset(rows, bytes_tokenizer, text_format=FORMAT, max_length=96)
    expected, _ = plain_loss(small_gpt2(), dataset.split(0.2, 42)[0])
    assert training_losses(tmp_path) == [pytest.approx(expected, rel=1e-6)]


def test_run_json_records_every_setting_and_the_dataset(finished):
    record = json.loads((finished[0] / "run.json").read_text())
    assert record["settings"].keys() == train_llm.DEFAULTS.keys()
    assert record["settings"]["learning_rate"] == 0.01
    assert (
        record["versions"].keys() == {"torch", "transformers"} and record["python"] == sys.version
    )
    assert re.fullmatch(r"[0-9a-f]{64}", record["dataset_sha256"])


LOG_LINES = (
    r"INFO:__main__: *Using device: cpu",
    r"INFO:__main__: *Model Parameters:",
    r"   Total: [\d,]+",
    r"   Trainable: 4,096 \(9\.78%\)",
    r"INFO:__main__: *Training batches: 6",
    r"Epoch 0 \| Step    2/6 \| Loss: \d+\.\d{4} \| PPL: \d+\.\d\d \| LR: \d\.\d\de[+-]\d\d"
    r" \| Grad: \d+\.\d{3} \| [\d,]+ tok/s",
    r"Epoch 1 \| Step    6/6 \| Loss: .*",
)


@pytest.mark.parametrize("line", LOG_LINES)
def test_stdout_has_the_line_and_a_cp1252_terminal_gets_it_without_emoji(finished, line):
    assert re.search(rf"^{line}\r?$", finished[1], re.M)


@pytest.mark.parametrize("line", LOG_LINES)
def test_the_log_file_has_the_line_with_its_emoji(finished, line):
    log = next(finished[0].glob("training_*.log")).read_text(encoding="utf-8")
    decorated = line.replace("__main__: *", "__main__:[🔧📊🔢] ")
    assert re.search(rf"^{decorated}$", log, re.M)


def test_the_progress_bar_shows_the_loss_the_speed_and_the_time_left(
    flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(flags(tmp_path, max_steps=3)) == 0
    shown = capsys.readouterr().err
    assert re.search(r"training: .* 3/3 \[\d+:\d+<\d+:\d+, .*loss \d+\.\d+, [\d,]+ tok/s\]", shown)


def test_nothing_but_errors_and_progress_goes_to_stderr(finished):
    assert not re.search(r"Traceback|Error|Warning", finished[2])


def test_a_saved_model_with_a_flipped_byte_is_refused_but_its_card_may_be_edited(
    technique_runs, tmp_path, flags, capsys
):
    saved = shutil.copytree(technique_runs / "lora" / "final", technique_runs / "lora" / "copy")
    (saved / "README.md").write_text("a card of my own")
    modify_llm.load_trained(saved)
    weights = bytearray((saved / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "adapter_model.safetensors").write_bytes(weights)
    said = refused([*flags(tmp_path / "unused", adapter_path=saved), "--eval_only"], capsys)
    assert "adapter_model.safetensors is damaged" in said


def test_what_fails_after_final_is_a_warning_and_made_up_for_later(
    flags, tmp_path, monkeypatch, capsys
):
    argv = flags(tmp_path / "out", max_steps=2, num_samples=1)

    def failing_after_final(run):
        modify_llm.verify_directory(run.output_dir / "final")
        failing()

    with monkeypatch.context() as patch:
        patch.setitem(train_llm.EXTRAS, "predictions.jsonl", failing_after_final)
        assert run(argv) == 0
    said = capsys.readouterr().out
    assert re.search(r"^WARNING:\S+:predictions.jsonl: no such luck; the run goes on", said, re.M)
    assert "Written to" in said and "predictions.jsonl" not in said.partition("Written to")[2]
    before = saved(tmp_path / "out" / "final")
    assert run([*argv, "--resume_from=auto"]) == 0
    assert (tmp_path / "out" / "predictions.jsonl").exists()
    assert saved(tmp_path / "out" / "final") == before


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_training_takes_the_same_steps(flags, tmp_path):
    for name, compiled in (("plain", []), ("compiled", ["--compile"])):
        assert run([*flags(tmp_path / name, max_steps=3, num_samples=0), *compiled]) == 0
    losses = training_losses(tmp_path / "plain"), training_losses(tmp_path / "compiled")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    plain, compiled = (
        load_file(tmp_path / n / "final/adapter_model.safetensors") for n in ("plain", "compiled")
    )
    for name, tensor in plain.items():
        # AdamW takes steps of 1e-2 whatever a gradient's size: where one is next to nothing, rounding shows
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_the_model_card_is_the_hubs_and_its_lines_load_the_model(
    technique_runs, technique, small_base
):
    """By PEFT or transformers, and by our own function: to the same logits."""
    directory = technique_runs / technique / "final"
    card = ModelCard.load(directory / "README.md")
    library = {"adapter": None, "selective": "transformers", "full": "transformers"}
    expected = {"library_name": library.get(technique, "peft"), "pipeline_tag": "text-generation"}
    assert card.data.to_dict() == {k: v for k, v in expected.items() if v}  # a local base: no name
    before, *_, after = held_out_losses(technique_runs / technique).values()
    assert f": {math.exp(before):.2f} -> {math.exp(after):.2f}\n" in card.text
    scope = {
        "PeftModel": PeftModel,
        "AutoModelForCausalLM": GPT2LMHeadModel,
        "modify_llm": modify_llm,
    }
    ids, logits = torch.arange(40, 60)[None], []
    lines = card.text.split("```python\n")[1].split("```")[0]
    lines = lines.replace('"DIR"', repr(str(directory))).replace('"BASE"', repr(str(small_base)))
    for line in lines.splitlines():
        exec(line, scope)
        logits.append(
            scope["model"].eval()(input_ids=ids).logits[:, -20:]
        )  # PEFT keeps a prompt's own logits
    if len(logits) > 1:  # the last two lines: the library's way, and ours
        torch.testing.assert_close(logits[-1], logits[-2])


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_of_this_machines_directories_the_files_of_a_result_name_its_local_base_alone(
    technique_runs, technique, small_base, tmp_path
):
    """By PEFT's own key, where PEFT looks for it."""
    base = f'"base_model_name_or_path": "{small_base}"'.encode()
    results = [technique_runs / technique / name for name in ("best", "final")]
    if technique in ("lora", "thirds"):
        modify_llm.merge_directory(str(results[0]), str(tmp_path / "merged"), None)
        results.append(tmp_path / "merged")
        merged = ModelCard.load(tmp_path / "merged" / "README.md").data.to_dict()
        assert merged == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    for file in itertools.chain.from_iterable(path.iterdir() for path in results):
        for absolute in (technique_runs, small_base, Path.cwd()):
            quoted = f'"{absolute}'.encode()
            content = file.read_bytes()
            if file.name in ("adapter_config.json", "modification.json"):
                content = content.replace(base, b"")
            assert quoted not in content, file


@pytest.mark.parametrize("base", ["gpt2", "openai-community/gpt2-xl", "somebody/gpt2"])
def test_a_card_names_a_base_of_the_hub(base):
    metadata = ModelCard(modify_llm.card_metadata(base, "peft")).data
    assert (metadata.base_model, metadata.library_name) == (base, "peft")


def test_predictions_hold_reference_base_and_tuned_answers(
    finished, small_base, rows, bytes_tokenizer
):
    lines = (finished[0] / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    texts = [(row["q"], row["a"]) for row in json.loads(rows.read_text())]
    base = GPT2LMHeadModel.from_pretrained(small_base)
    assert len(predictions) == 2
    for row in predictions:
        assert list(row) == ["prompt", "reference", "base", "tuned", "stopped"]
        assert (row["prompt"], row["reference"]) in texts
        ids = torch.tensor([bytes_tokenizer(row["prompt"])["input_ids"]])
        answer = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=EOS,
        )[0, ids.shape[1] :]
        untuned = bytes_tokenizer.decode([token for token in answer.tolist() if token != EOS])
        assert row["base"] == (
            untuned if EOS in answer else untuned.removesuffix("\ufffd")  # cut in half
        )
        assert isinstance(row["stopped"], bool)


def test_tensorboard_gets_the_settings_and_the_numbers_of_metrics_jsonl(flags, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(flags(tmp_path, max_steps=2, report_to="tensorboard")) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        training_losses(tmp_path), rel=1e-6
    )
    assert {event.step: event.value for event in events.Scalars("eval_loss")} == pytest.approx(
        held_out_losses(tmp_path)
    )
    (settings,) = events.Tensors("settings/text_summary")[0].tensor_proto.string_val
    assert re.search(rb"^learning_rate: '?0.01'?$", settings, re.M)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_report_to_a_package_that_is_not_there_is_refused(
    name, flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    assert f"pip install {name}" in refused(flags(tmp_path / "out", report_to=name), capsys)


def test_trackers_get_settings_and_numbers_offline(flags, tmp_path):
    """In what wandb and trackio themselves write."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    places = {"WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path), "TRACKIO_PROJECT": "mine"}
    argv = flags(tmp_path / "out", report_to="wandb,trackio,tensorboard", max_steps=2)
    process = script(argv, WANDB_MODE="offline", **places)
    assert process.wait(timeout=200) == 0, process.stderr.read()
    losses = [*training_losses(tmp_path / "out"), *held_out_losses(tmp_path / "out").values()]
    written = next(tmp_path.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    assert all(json.dumps(loss).encode() in written for loss in losses)
    assert b"learning_rate" in written
    with closing(sqlite3.connect(tmp_path / "mine.db")) as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
        config = json.loads(database.execute("select config from configs").fetchone()[0])
    logged = [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]
    assert sorted(logged) == sorted(losses)
    assert config["learning_rate"] == "0.01"
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def test_a_tracker_that_fails_is_a_warning_and_is_left_out(flags, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "finish", lambda exit_code: None)
    monkeypatch.setattr(wandb, "log", failing)
    assert run(flags(tmp_path, report_to="wandb", max_steps=2)) == 0
    said = capsys.readouterr().out
    assert said.count("--report_to wandb: no such luck; the run goes on without") == 1


@pytest.mark.parametrize(
    ("encoding", "shown"), [("cp1252", "Using device: é"), ("utf-8", "🔧 Using device: é ж")]
)
def test_a_terminal_gets_the_characters_that_it_can_show(encoding, shown, monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    line = logging.LogRecord("x", logging.INFO, "", 0, "🔧 Using device: é ж", (), None)
    train_llm.Screen().handle(line)
    stream.flush()
    assert written.getvalue().decode(encoding).strip() == shown
