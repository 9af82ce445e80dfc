"""Each technique trains as many parameters as the published tables count, and the table and the picture
of all techniques say so.

    python -m pytest tests/techniques/test_counts.py
"""

import pytest
from safetensors.torch import load_file
from small_models import LENGTH, every_technique, modified

import modify_llm
from modify_llm import main, save_trained, statistics


@pytest.mark.parametrize(
    ("flags", "trainable", "total", "ratio"),
    [
        ("--modification_type full", 124_439_808, 124_439_808, "1.0000 (100.00%)"),
        ("", 589_824, 125_029_632, "0.0047 (0.47%)"),
        ("--trainable_modules wte,wpe,ln_1,ln_2,ln_f", 40_012_032, 125_029_632, "0.3200 (32.00%)"),
        ("--lora_target_modules c_attn.q,c_attn.v", 147_456, 124_587_264, "0.0012 (0.12%)"),
        (  # Hu et al., table 3, prints 0.35M; by section 5.1's formula it is 2 x d x r x 48 matrices
            "--model_name_or_path gpt2-medium --lora_target_modules c_attn.q,c_attn.v",
            393_216,
            355_216_384,
            "0.0011 (0.11%)",
        ),
        ("--lora_rank 8 --lora_target_modules c_attn", 294_912, 124_734_720, "0.0024 (0.24%)"),
        ("--modification_type adapter", 1_189_632, 125_629_440, "0.0095 (0.95%)"),
        (
            "--modification_type adapter --adapter_placement houlsby",
            2_379_264,
            126_819_072,
            "0.0188 (1.88%)",
        ),
        (
            "--modification_type adapter --adapter_placement houlsby --adapter_size 128",
            4_740_096,
            129_179_904,
            "0.0367 (3.67%)",
        ),
        ("--modification_type prefix", 38_400, 124_478_208, "0.0003 (0.03%)"),
        (
            "--modification_type prefix --prefix_type key_value",
            921_600,
            125_361_408,
            "0.0074 (0.74%)",
        ),
        (
            "--modification_type selective --freeze_layers 0-5",
            81_126_144,
            124_439_808,
            "0.6519 (65.19%)",
        ),
        ("--modification_type selective", 81_126_144, 124_439_808, "0.6519 (65.19%)"),
        # DoRA: LoRA's and a magnitude an output, 12 x (2304 + 768 + 3072 + 768)
        ("--lora_dora", 672_768, 125_112_576, "0.0054 (0.54%)"),
        ("--lora_layers 6-11", 294_912, 124_734_720, "0.0024 (0.24%)"),
        # 12 x (2304 + 3072)
        ("--modification_type ia3", 64_512, 124_504_320, "0.0005 (0.05%)"),
        # 12 x (2304 + 768 + 3072 + 768 + 2 x 768) + 768
        ("--modification_type bitfit", 102_144, 124_439_808, "0.0008 (0.08%)"),
        # (2 x 12 + 1) x 2 x 768
        ("--modification_type layernorm", 38_400, 124_439_808, "0.0003 (0.03%)"),
    ],
)
def test_flags_reproduce_the_published_counts(capsys, flags, trainable, total, ratio):
    assert main(flags.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("📊 Final Parameter Statistics:")
    assert [line.strip() for line in lines[start + 1 : start + 4]] == [
        f"Total parameters: {total:,}",
        f"Trainable parameters: {trainable:,}",
        f"Trainable ratio: {ratio}",
    ]


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "published"),
    [
        ("distilgpt2", 6, 768, 81_912_576),
        ("gpt2", 12, 768, 124_439_808),
        ("openai-community/gpt2", 12, 768, 124_439_808),
        ("gpt2-medium", 24, 1024, 354_823_168),
        ("gpt2-large", 36, 1280, 774_030_080),
        ("gpt2-xl", 48, 1600, 1_557_611_200),
    ],
)
def test_the_published_sizes_are_counted_without_their_weights(
    capsys, name, layers, hidden, published
):
    block = 12 * hidden**2 + 13 * hidden  # four projections with biases, two LayerNorms
    assert published == (50257 + 1024) * hidden + layers * block + 2 * hidden
    main(["--modification_type", "full", "--model_name_or_path", name])
    assert f"Total parameters: {published:,}\n" in capsys.readouterr().out


def test_every_parameter_has_its_line_and_the_lines_add_up(capsys):
    main([])
    out = capsys.readouterr().out
    assert "🔍 Parameter Trainability Status:\n" in out
    assert "✅ transformer.h.0.attn.c_attn.lora_A: Trainable (3,072 params)\n" in out
    assert (
        "❄️  transformer.h.0.attn.c_attn.original_layer.weight: Frozen (1,769,472 params)\n" in out
    )
    counted = {"✅": 0, "❄️": 0}
    for line in out.splitlines():
        if line.endswith(" params)"):
            counted[line.split()[0]] += int(line.rpartition("(")[2].split()[0].replace(",", ""))
    assert counted == {"✅": 589_824, "❄️": 124_439_808}


@every_technique
def test_the_script_counts_what_the_built_model_holds(capsys, base, settings):
    flags = [
        f"--{key}={','.join(map(str, v)) if isinstance(v, list) else v}"
        for key, v in settings.items()
    ]
    flags += ["--model_name_or_path", base, "--prefix_length", str(LENGTH), "--adapter_size", "8"]
    main(flags)
    assert capsys.readouterr().out.strip() == statistics(modified(base, **settings)).strip()


def test_a_model_from_scratch_takes_its_sizes_from_the_flags(capsys):
    flags = "--from_scratch --vocab_size 100 --hidden_size 24 --num_attention_heads 3"
    flags += " --num_hidden_layers 5 --max_position_embeddings 40 --modification_type full"
    main(flags.split())
    total = (100 + 40) * 24 + 5 * (12 * 24**2 + 13 * 24) + 2 * 24
    assert f"Total parameters: {total:,}\n" in capsys.readouterr().out


def test_compare_shows_every_technique_and_plot_writes_a_picture(capsys, tmp_path):
    picture = tmp_path / "compared.png"
    assert main(["--compare", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    for counted in (
        124_439_808,
        81_126_144,
        589_824,
        147_456,
        2_379_264,
        1_189_632,
        921_600,
        38_400,
    ):
        assert f" {counted:,} " in out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def test_compare_has_a_row_for_each_variant_of_the_table_the_largest_first(capsys, base):
    rows = modify_llm.compare(modify_llm.with_defaults(model_name_or_path=base))
    listed = [entry[:2] for row in modify_llm.TECHNIQUES.values() for entry in row.compared]
    assert sorted((row["label"], row["paper"]) for row in rows) == sorted(listed)
    trainable = [row["trainable"] for row in rows]
    assert trainable == sorted(trainable, reverse=True) and len(set(trainable)) > 5
    main(["--compare", "--model_name_or_path", base])
    lines = capsys.readouterr().out.splitlines()[1:]
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(row["label"]) and f" {row['trainable']:,} " in line
        assert line.endswith(row["paper"])


def test_compare_says_what_the_files_will_weigh(base, tmp_path):
    rows = modify_llm.compare(modify_llm.with_defaults(model_name_or_path=base))
    settings = {
        label: {"modification_type": technique, **changes}
        for technique, entry in modify_llm.TECHNIQUES.items()
        for label, _, changes in entry.compared
    }
    for row in rows:
        if "selective" not in row["label"]:  # whose layers follow from the model's
            model = modify_llm.final_modify(model_name_or_path=base, **settings[row["label"]])
            save_trained(model, directory := tmp_path / row["label"])
            written = sum(
                t.nbytes
                for file in directory.glob("*.safetensors")
                for t in load_file(file).values()
            )
            assert written == pytest.approx(row["saved_mb"] * 1e6), row["label"]
