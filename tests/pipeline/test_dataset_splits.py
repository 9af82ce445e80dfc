"""Configurations and splits are those of the `datasets` library: one is read, never several mixed.

python -m pytest tests/pipeline/test_dataset_splits.py
"""

import re
import sys

import pytest
from row_files import ROWS, as_json, as_jsonl, as_parquet, ids, run_main

import data_pipeline
from data_pipeline import final_dataset_loader, load_dataset

datasets = pytest.importorskip("datasets")
FEW, MORE, REST = ROWS[:2], ROWS[2:5], ROWS[5:]


def outputs(dataset, tokenizer):
    return [tokenizer.decode(row[:-1]) for row in ids(dataset)]


def expected(rows):
    return [row["output"] for row in rows]


@pytest.mark.parametrize(
    "train, held_out, test",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("training.jsonl", "valid.jsonl", "testing.jsonl"),
        ("my-train.jsonl", "my-val.jsonl", "my-eval.jsonl"),
        ("train/rows.jsonl", "dev/rows.jsonl", "evaluation/rows.jsonl"),
        *[tuple(f"data/{name}-00000-of-00001.jsonl" for name in ("train", "validation", "test"))],
    ],
)
def test_every_name_of_a_split(directory, tokenizer, train, held_out, test):
    path = directory({train: REST, held_out: FEW, test: MORE})
    by_flag = {"flag": "eval_dataset_path"}
    for settings, rows in (
        ({}, REST),
        (by_flag, FEW),
        (by_flag | {"dataset_test_split": "test"}, MORE),
        ({"dataset_train_split": "validation"}, FEW),
    ):
        assert outputs(load_dataset(path, tokenizer, **settings), tokenizer) == expected(rows)


def test_without_a_validation_split_the_test_split_is_held_out(directory, tokenizer):
    path = directory({"train.parquet": REST, "test.parquet": MORE})
    dataset = load_dataset(path, tokenizer, flag="eval_dataset_path")
    assert outputs(dataset, tokenizer) == expected(MORE)


def test_held_out_rows_may_stand_in_a_directory_of_their_own(directory, tokenizer):
    path = directory({"part-1.jsonl": FEW, "part-2.jsonl": MORE})
    dataset = load_dataset(path, tokenizer, flag="eval_dataset_path")
    assert outputs(dataset, tokenizer) == expected(FEW + MORE)


@pytest.mark.parametrize(
    "files, said",
    [
        (["data/train_sft-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl"],
         "has no split 'train'; .* choose of train_gen, train_sft$"),
        (["train_sft.jsonl", "train_gen.jsonl"], "several sets for 'train': .*train_gen or .*train_sft$"),
        (["train-a.jsonl", "train-b.jsonl", "test.jsonl"], "several sets for 'train'"),
        (["de/train.jsonl", "en/train.jsonl"], "several sets for 'train': .*de/train or .*en/train$"),
        (["test.json"], "has no split 'train'; .* choose of test$"),
        (["README.md"], "."),
    ],
)  # fmt: skip
def test_several_sets_to_train_on_are_refused_by_their_names(refused, directory, files, said):
    path = directory({name: as_jsonl(ROWS) for name in files})
    error = refused("--dataset_path", path)
    assert error.startswith(f"--dataset_path {path}: ")
    assert re.search(said, error)


@pytest.mark.parametrize(
    "names", [["train-1", "train-2"], ["train-00000-of-00002", "train-00001-of-00002"]]
)
def test_shards_are_one_set(directory, tokenizer, names):
    path = directory({f"{name}.jsonl": rows for name, rows in zip(names, (FEW, MORE), strict=True)})
    assert outputs(load_dataset(path, tokenizer), tokenizer) == expected(FEW + MORE)


def test_one_of_several_sets_is_chosen_by_its_name(directory, tokenizer):
    sets = {"train_sft": FEW, "train_gen": MORE, "test_sft": REST}
    path = directory({f"data/{name}-00000-of-00001.jsonl": rows for name, rows in sets.items()})
    for name, rows in sets.items():
        dataset = load_dataset(path, tokenizer, dataset_train_split=name)
        assert outputs(dataset, tokenizer) == expected(rows)


def test_a_split_is_chosen_by_flags(directory, capsys, monkeypatch, tokenizer):
    monkeypatch.setattr(data_pipeline, "load_tokenizer", lambda *_, **__: tokenizer)
    readme = (
        b"---\nconfigs:\n- config_name: de\n  data_files:\n  - {split: sft, path: a.json}\n"
        b"  - {split: held, path: b.json}\n- {config_name: en, data_files: b.json}\n---"
    )
    path = directory({"a.json": as_json(REST), "b.json": as_json(FEW), "README.md": readme})
    flags = [
        "--dataset_config",
        "de",
        "--dataset_train_split",
        "sft",
        "--dataset_test_split",
        "held",
    ]
    out = run_main(capsys, "--dataset_path", path, *flags, "--num_workers", 0)
    assert f"Held out: {len(FEW)} rows; {len(REST)} to train on" in out


def test_what_a_directory_holds_besides_is_left_out_and_said(directory, caplog, tokenizer):
    path = directory({"train.jsonl": FEW, "rows.csv": REST, "test.jsonl": MORE, "README.md": b""})
    with caplog.at_level("INFO"):
        assert len(load_dataset(path, tokenizer)) == len(FEW)
    assert f"Files of {path}: train.jsonl\n" in caplog.text
    assert f"Left out of {path}: README.md, rows.csv, test.jsonl\n" in caplog.text


@pytest.mark.parametrize("split", [None, "train", "eval"])
def test_the_loader_takes_the_datasets_own_splits(directory, tokenizer, split):
    path = directory({"train.jsonl": REST, "validation.jsonl": FEW, "test.jsonl": MORE})
    loader = final_dataset_loader(
        path, tokenizer=tokenizer, split=split, dataset_test_split="test", num_workers=0
    )
    assert len(loader.dataset) == len(MORE if split == "eval" else REST)
    some = final_dataset_loader(path, tokenizer=tokenizer, max_samples=3, num_workers=0)
    assert ids(some.dataset) == ids(loader.dataset)[:3] or split == "eval"


@pytest.mark.parametrize("flags", [["--dataset_train_split", "sft"], ["--dataset_test_split", "x"]])
def test_a_file_has_no_splits(refused, write, flags):
    assert "a file has no splits, such as" in refused("--dataset_path", write(ROWS), *flags)


@pytest.fixture
def saved(tmp_path):
    """saved(rows by split) -> the directory in which the `datasets` library saved them."""

    def save(splits):
        made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        found = datasets.DatasetDict(made) if len(made) > 1 else made.popitem()[1]
        found.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"

    return save


def test_what_the_datasets_library_saved_is_read(saved, tokenizer):
    path = saved({"train": REST, "test": FEW})
    assert outputs(load_dataset(path, tokenizer), tokenizer) == expected(REST)
    held_out = load_dataset(path, tokenizer, flag="eval_dataset_path")
    assert outputs(held_out, tokenizer) == expected(FEW)
    with pytest.raises(ValueError, match=r"has no split 'sft'; .* choose of test, train"):
        load_dataset(path, tokenizer, dataset_train_split="sft")


def test_a_saved_set_without_splits_is_read_and_columns_besides_are_not(saved, tokenizer):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = saved({"train": [{"messages": turns, "unread": [1.0] * 9, "id": 7}] * 3})
    dataset = load_dataset(path, tokenizer, text_format="messages")
    assert dataset.label_counts.tolist() == [2] * 3
    with pytest.raises(
        ValueError, match=r"no 'instruction'; it has \['messages', 'unread', 'id'\]"
    ):
        load_dataset(path, tokenizer)


@pytest.mark.parametrize("name", ["someone/alpaca", "{path}"])
def test_the_package_that_splits_need_is_named(refused, directory, monkeypatch, name):
    path = directory({"train.jsonl": FEW})
    monkeypatch.setattr(data_pipeline, "hub_snapshot", lambda *_: str(path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    name = name.format(path=path)
    error = refused("--dataset_path", name)
    assert error.startswith(f"--dataset_path {name}: ") and error.endswith("pip install datasets")


def test_parquet_shards_are_one_set(directory, tokenizer):
    parts = {f"data/train-0000{i}-of-00002.parquet": as_parquet(ROWS[i::2]) for i in range(2)}
    dataset = load_dataset(directory(parts), tokenizer)
    assert outputs(dataset, tokenizer) == expected(ROWS[::2] + ROWS[1::2])
