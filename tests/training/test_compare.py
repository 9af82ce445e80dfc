"""--compare: ordinary runs side by side, equal to the single ones, and not run again.

python -m pytest tests/training/test_compare.py
"""

import json

from runs import held_out_losses, refused, run, snapshot


def test_compared_runs_equal_the_single_ones_and_are_not_run_again(flags, tmp_path):
    compared, single = tmp_path / "compared", tmp_path / "single"
    argv = flags(compared, compare="lora,ia3", learning_rate=None, max_steps=2)
    assert run(argv) == 0
    base, lora, ia3 = json.loads((compared / "comparison.json").read_text())
    assert [row["technique"] for row in (base, lora, ia3)] == ["base", "lora", "ia3"]
    assert run(flags(single, learning_rate=None, max_steps=2)) == 0
    losses = held_out_losses(single)
    assert losses == held_out_losses(compared / "lora")
    assert (base["eval_loss"], lora["eval_loss"]) == (losses[0], losses[2])
    assert (compared / "comparison.csv").exists() and (compared / "comparison.png").exists()
    before = snapshot(compared / "ia3" / "final")
    assert run(argv) == 0
    assert snapshot(compared / "ia3" / "final") == before


def test_a_name_that_is_none_is_refused_with_those_there_are(flags, tmp_path, capsys):
    said = refused(flags(tmp_path / "out", compare="magic"), capsys)
    assert "--compare magic" in said and "dora" in said
