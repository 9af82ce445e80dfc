"""A template fills in the file's own columns; special tokens that it writes are tokens, those of the
rows are text.

    python -m pytest tests/pipeline/test_templates.py
"""

import copy
import logging

import pytest
from row_files import EOS, ROWS, alpaca_row, ids, row_of
from tokenizers import processors

import data_pipeline
from data_pipeline import load_dataset

# ---------------------------------------------------------------- templates


@pytest.mark.parametrize(
    "template, prompt, response",
    [
        ("Q: {question}\nA:||{answer}", "Q: 6 x 7?\nA:", "42"),
        ("||{answer}", "", "42"),
        ("{answer}|{question}||{answer} {answer}.", "42|6 x 7?", "42 42."),
        ('{{"q": "{question}"}}||{{{answer}}}', '{"q": "6 x 7?"}', "{42}"),
        ("{my column}||{answer}", "spaced", "42"),
    ],
)
def test_templates_fill_in_the_files_own_columns(
    write, tokenizer, reference, template, prompt, response
):
    row = {"question": "6 x 7?", "answer": "42", "my column": "spaced", "unread": 17}
    tokens, labels = row_of(write([row]), tokenizer, text_format=template)
    learnt = [*reference(response), EOS] if prompt else [-100, *reference(response)[1:], EOS]
    assert tokens.tolist() == [*reference(prompt), *reference(response), EOS]
    assert labels.tolist() == [-100] * len(reference(prompt)) + learnt


def test_what_a_row_holds_is_never_read_as_a_template(write, tokenizer, reference):
    row = {"question": "{answer} {0} {nothing} || %s", "answer": "{question}||{{"}
    assert ids(load_dataset(write([row]), tokenizer, text_format="{question}||{answer}")) == [
        [*reference(row["question"]), *reference(row["answer"]), EOS]
    ]


@pytest.mark.parametrize(
    "template, said",
    [
        ("chatml", "alpaca"),
        ("", "||"),
        ("{instruction} {output}", "||"),
        ("{instruction}||{input}||{output}", "||"),
        ("{instruction}||no column", "||"),
        ("{instruction||{output}", "brace"),
        ("instruction}||{output}", "brace"),
        ("{}||{output}", "{question}"),
        ("{instruction.x}||{output}", "{question}"),
        ("{instruction[0]}||{output}", "{question}"),
        ("{instruction!r}||{output}", "{question}"),
        ("{instruction:>9}||{output}", "{question}"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_in_one_line(refused, template, said):
    error = refused("--text_format", template)
    assert "--text_format" in error and said in error and repr(template) in error


def test_a_template_over_a_column_that_the_file_lacks_is_refused(refused, write):
    error = refused("--dataset_path", write(ROWS), "--text_format", "{question}||{output}")
    assert (
        "rows.json" in error
        and "row 1" in error
        and "'question'" in error
        and "'instruction'" in error
    )


def test_columns_named_by_numbers_fill_in_or_are_refused_by_flag(
    refused, write, tokenizer, reference
):
    path = write(b"0,1\nsix,seven\n", "rows.csv")
    try:
        assert ids(load_dataset(path, tokenizer, text_format="{0}||{1}")) == [
            [*reference("six"), *reference("seven"), EOS]
        ]
    except ValueError:
        assert "--text_format" in refused("--dataset_path", path, "--text_format", "{0}||{1}")


# ---------------------------------------------------------------- special tokens of a format


@pytest.fixture
def chat(tokenizer):
    """GPT-2's tokenizer with special tokens of its own, one of which ends a text."""
    own = copy.deepcopy(tokenizer)
    tokens = ["<|user|>", "<|assistant|>", "<{x}>", "<|user|>+"]
    own.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": tokens})
    return own


def test_special_tokens_that_a_template_writes_are_the_models_own(write, chat, reference):
    end, user, assistant, braces, longer = (
        chat.convert_tokens_to_ids(t)
        for t in ("<|end|>", "<|user|>", "<|assistant|>", "<{x}>", "<|user|>+")
    )
    said = "an <|end|> of <|user|> text <|endoftext|>"
    path = write([{"q": said, "a": f"{said}!"}])
    row = load_dataset(path, chat, text_format="<|user|>{q}\n<|assistant|>||{a}")[0]
    prompt = [user, *reference(f"{said}\n"), assistant]
    assert row["input_ids"].tolist() == [*prompt, *reference(f"{said}!"), end]
    assert row["labels"].tolist() == [-100] * len(prompt) + [*reference(f"{said}!"), end]
    braced = load_dataset(path, chat, text_format="<|user|>+<{{x}}>{{||<|assistant|>{a}")
    assert ids(braced)[0][:4] == [longer, braces, *reference("{"), assistant]
    assert braced[0]["labels"][3] == assistant


def test_a_template_that_writes_the_end_of_text_itself_does_not_double_it(write, tokenizer):
    path = write([alpaca_row(output="Yes.")])
    plain = load_dataset(path, tokenizer, text_format="||{output}")
    written = load_dataset(path, tokenizer, text_format="||{output}<|endoftext|>")
    assert ids(written) == ids(plain) and written.content_hash() == plain.content_hash()


def test_rows_with_special_tokens_survive_the_round_trip(write, chat, caplog):
    with caplog.at_level(logging.INFO):
        load_dataset(write([{"q": "1", "a": "2"}]), chat, text_format="<|user|>{q}||{a}", show=True)
    assert "1 of 1 rows decode to their exact text" in caplog.text
    assert "Original Text: <|user|>12\n" in caplog.text


@pytest.mark.parametrize(
    "text_format, row",
    [
        ("alpaca", alpaca_row(input="")),
        ("alpaca", alpaca_row(input="<|endoftext|>")),
        ("<|user|>{q}<|assistant|>\n||{a}", {"q": "Why <|user|>?", "a": "So."}),
        ("||{a}", {"a": "So."}),
        ("messages", {"messages": [{"role": "user", "content": "Why?"}]}),
        ("messages", {"conversations": [{"from": "human", "value": "Why?"}]}),
    ],
)
def test_a_prompt_is_encoded_as_the_rows_of_a_dataset_are(write, chat, text_format, row):
    answered = copy.deepcopy(row)
    for name, answer in (
        ("messages", {"role": "assistant", "content": "So."}),
        ("conversations", {"from": "gpt", "value": "So."}),
    ):
        if name in row:
            answered[name].append(answer)
    dataset = load_dataset(write([answered]), chat, text_format=text_format)
    prompt = ids(dataset)[0][: dataset.prompt_lengths[0]]
    assert data_pipeline.encode_prompt(row, text_format, chat) == prompt


def test_the_output_format_goes_on_with_the_prompts_own_text(tokenizer, reference):
    prompt = data_pipeline.encode_prompt({"output": "Once <|endoftext|>"}, "output", tokenizer)
    assert prompt == reference("Once <|endoftext|>")


@pytest.mark.parametrize("blank", ["", " ", "\n", " \t\r\n"])
@pytest.mark.parametrize(
    "text_format",
    ["alpaca", "output", "Q: {instruction}\nA:|| {output}", "{instruction}||{output}."],
)
def test_a_row_without_an_answer_has_nothing_to_learn(write, tokenizer, caplog, text_format, blank):
    """The words of a template answer nothing: a model would learn to say nothing."""
    rows = [alpaca_row(output=blank), alpaca_row(output=" Yes.")]
    with caplog.at_level(logging.INFO):
        dataset = load_dataset(write(rows), tokenizer, text_format=text_format)
    assert dataset.label_counts[0] == 0 < dataset.label_counts[1]
    assert "1 with nothing to learn" in caplog.text
    assert " Yes." in tokenizer.decode(dataset[1]["input_ids"])


def test_one_of_several_columns_of_an_answer_is_an_answer(write, tokenizer):
    rows = [{"a": "", "b": "x"}, {"a": " ", "b": "\n"}]
    dataset = load_dataset(write(rows), tokenizer, text_format="Say:||{a}, {b}")
    assert dataset.label_counts[0] > 0 == dataset.label_counts[1]


@pytest.mark.parametrize(
    "typed, meant",
    [
        (r"{q}\n||{a}", "{q}\n||{a}"),
        (r"{q}\\nabla||{a}", r"{q}\nabla||{a}"),
        (r"\\{q}\t||{a}\\\n", "\\{q}\t||{a}\\\n"),
        (r"C:\dir {q}||{a}", r"C:\dir {q}||{a}"),
    ],
)
def test_a_doubled_backslash_is_one(write, tokenizer, typed, meant):
    """What the flag's type gives may be read by it again, as from a run's settings."""
    once = data_pipeline.legal_format(typed)
    assert data_pipeline.legal_format(once) == once
    path = write([{"q": "Q", "a": "A"}])
    text = tokenizer.decode(load_dataset(path, tokenizer, text_format=once)[0]["input_ids"])
    assert text == meant.replace("{q}", "Q").replace("{a}", "A").replace("||", "") + "<|endoftext|>"


def beginning_with(tokenizer, token):
    """The tokenizer, which now puts this token before each text, as LLaMA's puts <s>."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"bos_token": token})
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, own.bos_token_id)]
    )
    own.backend_tokenizer.post_processor = template
    return own


@pytest.mark.parametrize(
    "text_format, row",
    [
        ("output", alpaca_row(output="So it is.")),
        ("alpaca", alpaca_row(input="")),
        ("Q: {q}\nA:||{a}", {"q": "Why?", "a": "So."}),
        ("<s>Q: {q}\nA:||{a}", {"q": "Why?", "a": "So."}),
        ("||{a}", {"a": "So it is."}),
        ("messages", {"messages": [
            {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."},
        ]}),
    ],
)  # fmt: skip
def test_what_a_tokenizer_puts_before_a_text_stands_before_a_row_once(
    write, tokenizer, text_format, row
):
    own = beginning_with(tokenizer, "<s>")
    start = own.bos_token_id
    plain, other = (
        load_dataset(write([row]), some, text_format=text_format) for some in (tokenizer, own)
    )
    expected = ids(plain)[0]
    if text_format.startswith("<s>"):
        expected = expected[len(tokenizer.encode("<s>")) :]
    assert ids(other) == [[start, *expected]]
    assert other.label_counts[0] - plain.label_counts[0] == (plain.prompt_lengths[0] == 0)
    prompt = data_pipeline.encode_prompt(row, text_format, own)
    assert prompt[0] == start and prompt.count(start) == 1
    assert prompt == ids(other)[0][: len(prompt)]
