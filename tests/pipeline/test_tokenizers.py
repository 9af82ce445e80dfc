"""Any text has GPT-2's ids, any other tokenizer the ids of its library, and a model its own tokenizer,
or one line says why not.

    python -m pytest tests/pipeline/test_tokenizers.py
"""

import itertools
import json
import logging

import numpy as np
import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from row_files import EOS, alpaca_row, ids
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import data_pipeline
from data_pipeline import (
    encoder_for,
    final_dataset_loader,
    load_dataset,
    load_tokenizer,
    model_tokenizer,
)

# ---------------------------------------------------------------- GPT-2's ids through tiktoken

ASCII = [chr(i) for i in range(128)]
# Blanks, letters, digits and signs at which regular expressions, or the versions of Unicode that
# they know, might differ.
CURIOUS = [
    *"\x1c\x1d\x1e\x1f\x85\xa0\xad\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f",
    *"\u2060\u3000\ufeff\ufffd\ufffe\U0010ffff\ue000\u0301\u0345\u20dd\ufe0f\u200d",
    *"\u05d0\u0e33\u0939\u1100\uac00\xaa\xb2\xbc\u0661\u0969\u2167\u2460\u3007\u4e09",
    *"\U0001d7ce\U00012400\u1c89\ua7da\U0001e5d0\u2019\u017f\u212a\ufb03\u0130\u01c5",
    *"\u02b0\u30fc\U0001f600\U0001f1e9\U0001f3fd\U000e0061",
]


def assert_gpt2s_ids(tokenizer, reference, texts):
    encoder = encoder_for(tokenizer)
    assert isinstance(encoder.gpt2, tiktoken.Encoding)
    encoded = encoder.encode(texts)
    assert encoded == reference(texts)
    assert [encoder.decode(tokens) for tokens in encoded] == texts


@pytest.mark.parametrize(
    "alphabet, length", [(ASCII, 2), (" \n\x1c'stx7.", 5), ("a \t\n\r\f\v\0", 5)]
)
def test_every_short_text_of_an_alphabet_has_gpt2s_ids(tokenizer, reference, alphabet, length):
    texts = ["".join(letters) for letters in itertools.product(alphabet, repeat=length)]
    assert_gpt2s_ids(tokenizer, reference, texts)


@given(
    st.lists(
        st.text(
            st.sampled_from(ASCII + CURIOUS) | st.characters(exclude_categories=["Cs"]), max_size=60
        ),
        min_size=1,
        max_size=5,
    )
)
@example(["we'll, I'D don't 'S they've 'rE", "  3.14  \n\n x\t\t"])
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
def test_any_text_has_gpt2s_ids(tokenizer, reference, texts):
    assert_gpt2s_ids(tokenizer, reference, texts)


def test_code_points_of_all_planes_have_gpt2s_ids(tokenizer, reference):
    draw = np.random.default_rng(0)
    planes = [
        plane + draw.choice(65_536, 40, replace=False) for plane in range(0, 0x110000, 65_536)
    ]
    drawn_ones = [chr(c) for c in np.concatenate(planes) if not 0xD800 <= c < 0xE000]
    assert len(drawn_ones) > 600
    forms = ["a{c}b", " {c}{c}", "! {c} \n{c}!", "{c}", "1{c} {c}'s  {c}"]
    texts = [form.replace("{c}", c) for c in CURIOUS + drawn_ones for form in forms]
    assert_gpt2s_ids(tokenizer, reference, texts)


@pytest.mark.parametrize(
    "text",
    [" " * 1_000_000, "\n" * 1_000_000 + "x", "x" * 1_000_000],
    ids=["blanks", "line breaks", "letters"],
)
def test_a_text_of_one_endless_word_has_gpt2s_ids(write, tokenizer, reference, text):
    dataset = load_dataset(write([alpaca_row(output=text)]), tokenizer, max_length=2_000_000)
    assert ids(dataset) == [[*reference(text), EOS]]


# ---------------------------------------------------------------- tokenizers that are not GPT-2's


def stripped(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()


def with_prefix_space(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def without_words(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )


def by_blanks(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def with_a_word_more(tokenizer):
    tokenizer.add_tokens(["d Hel"])


def with_full_dropout(tokenizer):
    tokenizer.backend_tokenizer.model.dropout = 1.0


@pytest.mark.parametrize(
    "change",
    [stripped, with_prefix_space, without_words, by_blanks, with_a_word_more, with_full_dropout],
)
def test_a_tokenizer_that_splits_otherwise_gives_the_librarys_ids(write, change):
    own, text = load_tokenizer(), "'stock: Old Hello  world<|endoftext|> "
    plainly = own.backend_tokenizer.encode(text, add_special_tokens=False).ids
    change(own)
    expected = own.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert expected != plainly and EOS not in expected
    assert encoder_for(own).gpt2 is None
    # What load_dataset must put right itself.
    own.backend_tokenizer.encode_special_tokens = False
    own.backend_tokenizer.enable_padding(length=99)
    own.backend_tokenizer.enable_truncation(5)
    assert ids(load_dataset(write([alpaca_row(output=text)]), own)) == [[*expected, EOS]]


def test_a_decoder_that_changes_the_text_is_found_out(write, caplog):
    own = load_tokenizer()
    own.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("  ", " ")]
    )
    assert encoder_for(own).gpt2 is None
    with caplog.at_level(logging.INFO):
        load_dataset(write([alpaca_row(output="a  b"), alpaca_row(output="a b")]), own)
    assert any("1 of 2 rows" in record.getMessage() for record in caplog.records)


def test_a_word_that_the_vocabulary_lacks_is_found_out_wherever_it_stands(write, caplog):
    from transformers import GPT2Tokenizer

    full = json.loads(load_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    lacking = GPT2Tokenizer(vocab={word: i for word, i in full.items() if word != "Z"}, merges=[])
    outputs = ["fine", "Zero", "ZZ", "fine too", "zero", "é"]
    with caplog.at_level(logging.INFO):
        load_dataset(write([alpaca_row(output=output) for output in outputs]), lacking)
    assert any("4 of 6 rows decode" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------- which tokenizer is this model's?


def word_tokenizer(*words, eos="<end>", **specials):
    """A tokenizer of whole words, numbered in their order; the special tokens come last."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **specials)


@pytest.fixture
def directory_of(tmp_path):
    """directory_of(name, file=content) -> a directory with these files; a dict becomes JSON."""

    def make(name, files):
        directory = tmp_path / name
        directory.mkdir()
        for file, content in files.items():
            text = json.dumps(content) if isinstance(content, dict) else content
            (directory / file).write_text(text)
        return str(directory)

    return make


def gpt2_config(size):
    return {"config.json": {"model_type": "gpt2", "vocab_size": size}}


BERT_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] hello world ##s ."


@pytest.mark.parametrize(
    "named", [{}, {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer"}}]
)
@pytest.mark.parametrize("config", [{}, gpt2_config(9)])
def test_a_bert_vocabulary_is_read_and_its_sep_ends_a_text(write, directory_of, config, named):
    files = {"vocab.txt": BERT_WORDS.replace(" ", "\n")}
    bert = load_tokenizer(directory_of("bert", files | config | named))
    path = write([alpaca_row(output="hello worlds .")])
    assert ids(load_dataset(path, bert)) == [[2, 5, 6, 7, 8, 3]]


def byte_level_tokenizer(*special):
    """A byte-level BPE as the tokenizers library trains it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": list(special), "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, **settings)
    backend.train_from_iterator(["Une phrase, puis 1 autre."] * 9, trainer)
    return backend


def lower_case(backend):
    backend.normalizer = normalizers.Lowercase()


def single_digits(backend):
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])


def whole_words(backend):
    backend.model = models.WordLevel({"<|endoftext|>": 0, "phrase": 1, "?": 2}, unk_token="?")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("change", [lambda _: None, lower_case, single_digits, whole_words])
def test_a_tokenizer_json_is_read_to_the_letter_whatever_class_is_named(
    directory_of, change, named
):
    """transformers' GPT2Tokenizer takes the vocabulary alone."""
    backend = byte_level_tokenizer("<|endoftext|>")
    change(backend)
    config = {"tokenizer_config.json": {"tokenizer_class": named}} if named else {}
    directory = directory_of("model", config | gpt2_config(300))
    backend.save(f"{directory}/tokenizer.json")
    text = "Une PHRASE puis 12 phrase"
    encoder = encoder_for(read := load_tokenizer(directory))
    assert encoder.encode([text]) == [backend.encode(text).ids]
    assert read.eos_token_id == 0 and len(read) == backend.get_vocab_size()


@pytest.mark.parametrize("named", [{}, {"special_tokens_map.json": {"eos_token": "</s>"}}])
@pytest.mark.parametrize("whole_file", [True, False])
def test_a_vocabulary_of_its_own_gets_none_of_gpt2s_tokens_added(directory_of, named, whole_file):
    backend = byte_level_tokenizer("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    directory = directory_of("model", named | gpt2_config(300))
    if whole_file:
        backend.save(f"{directory}/tokenizer.json")
    else:
        backend.model.save(directory)  # vocab.json and merges.txt
    read = load_tokenizer(directory)
    assert (read.eos_token_id, len(read)) == (2, backend.get_vocab_size())
    text = "Une phrase."
    assert encoder_for(read).encode([text]) == [backend.encode(text).ids]


def test_an_adapters_tokenizer_comes_before_its_bases(directory_of):
    word_tokenizer("a", "b").save_pretrained(base := directory_of("base", {}))
    with_own = directory_of("with_own", {})
    word_tokenizer("a", "b", "c").save_pretrained(with_own)
    without = directory_of("without", {"adapter_config.json": {"base_model_name_or_path": base}})
    sizes = {
        (base, None): 3, (base, with_own): 4, (base, without): 3, (None, with_own): 4,
        ("gpt2", without): 50257, (None, None): 50257,
    }  # fmt: skip
    for (model, adapter), size in sizes.items():
        assert len(model_tokenizer(model, adapter)) == size


@pytest.mark.parametrize("size", [50256, 50257, 50304, 50305, None])
def test_gpt2s_tokenizer_is_taken_for_a_directory_without_one_if_the_sizes_agree(
    directory_of, caplog, size
):
    model = directory_of("model", gpt2_config(size))
    if size in (50257, 50304):
        with caplog.at_level(logging.INFO):
            assert len(model_tokenizer(model)) == 50257
        assert f"{model} brings no tokenizer: GPT-2's is taken" in caplog.text
    else:
        said = rf"brings no tokenizer \(vocab_size: {size}\); give --tokenizer_name_or_path"
        with pytest.raises(ValueError, match=said):
            model_tokenizer(model)


def test_an_adapter_that_lies_in_its_base_is_no_other_model(directory_of, tmp_path):
    adapter = {"adapter_config.json": {"base_model_name_or_path": str(tmp_path / "model")}}
    assert len(load_tokenizer(directory_of("model", adapter | gpt2_config(50257)))) == 50257


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2-xl", "distilgpt2"])
def test_gpt2s_names_are_gpt2s_tokenizer_but_for_a_directory_of_that_name(
    directory_of, tmp_path, monkeypatch, name
):
    assert encoder_for(load_tokenizer(name)).gpt2
    monkeypatch.chdir(tmp_path)
    word_tokenizer("a", "b").save_pretrained(name)
    assert len(load_tokenizer(name)) == 3


@pytest.mark.parametrize("size", [9, 50257])
def test_a_repository_without_a_tokenizer_is_refused(directory_of, monkeypatch, size):
    """What is cached of it may lack the tokenizer, whatever the size of its vocabulary."""
    snapshot = directory_of("snapshot", gpt2_config(size))
    monkeypatch.setattr(data_pipeline, "snapshot_download", lambda *_, **__: snapshot)
    with pytest.raises(
        ValueError, match="brings no tokenizer, nor what is cached of the repository"
    ):
        load_tokenizer("someone/french-gpt2")


@pytest.mark.parametrize(
    "files, said",
    [
        ({"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, "holds no vocabulary"),
        ({"vocab.txt": "[UNK]\na\nb"}, "needs an end-of-text token"),
        ({"tokenizer_config.json": {}, **gpt2_config(50257)}, "holds no vocabulary"),
        ({"special_tokens_map.json": {}, **gpt2_config(50257)}, "holds no vocabulary"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"}},
            "holds no vocabulary",
        ),
        ({"vocab.json": {"a": 0, "b": 1}, "merges.txt": "#version"}, "needs an end-of-text token"),
        ({"spiece.model": "x", **gpt2_config(9)}, "must name the tokenizer_class that reads"),
        (
            {"spiece.model": "x", "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}},
            "needs the package sentencepiece",
        ),
        ({"tokenizer.model": "\n\x0e", **gpt2_config(50257)}, "needs the package sentencepiece"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer"}},
            "ByT5Tokenizer is a slow tokenizer",
        ),
        (
            {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["own.Own", None]}}},
            "custom code which must be executed",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_by_the_true_reason(
    directory_of, monkeypatch, files, said
):
    monkeypatch.setattr(data_pipeline, "find_spec", lambda *_: None)  # no sentencepiece
    directory = directory_of("model", files)
    with pytest.raises(ValueError, match=said) as error:
        load_tokenizer(directory)
    assert str(error.value).startswith(f"--tokenizer_name_or_path {directory}: ")


@pytest.mark.parametrize(
    "words, specials", [(["[UNK]"], {}), (["[UNK]", "[PAD]"], {"pad_token": "[PAD]"})]
)
def test_a_tokenizer_without_a_vocabulary_is_refused(words, specials):
    with pytest.raises(ValueError, match="holds no vocabulary"):
        load_dataset(tokenizer=word_tokenizer(*words, **specials))


def test_a_tokenizer_with_a_part_in_python_is_refused_in_one_line():
    class Words:
        def pre_tokenize(self, text):
            text.split(lambda _, part: [part])

    own = word_tokenizer("a", "b")
    own.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Words())
    for use in (load_dataset, final_dataset_loader):
        with pytest.raises(ValueError, match="the tokenizer cannot be copied"):
            use(tokenizer=own)


def test_a_tokenizer_that_changes_between_two_datasets_is_followed(write):
    own = word_tokenizer("a", "b", "c")
    path = write([alpaca_row(output="a b c")])
    assert ids(load_dataset(path, own)) == [[0, 1, 2, 3]]
    own.backend_tokenizer.normalizer = normalizers.Replace("b", "c")
    assert ids(load_dataset(path, own)) == [[0, 2, 2, 3]]


def test_a_tokenizer_that_is_not_there_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        data_pipeline.main(["--tokenizer_name_or_path", str(tmp_path)])
    error = capsys.readouterr().err
    assert left.value.code == 2 and len(error.splitlines()) == 1
    assert error.startswith(f"data_pipeline.py: error: --tokenizer_name_or_path {tmp_path}: ")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"added_tokens": 1}', "[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_refused(tokenizer, tmp_path, content):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"--tokenizer_name_or_path .* holds no tokenizer that loads: ."
    ) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
