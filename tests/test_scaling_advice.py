"""`advise`: a model for a budget, from the data and no further than they reach."""

import pytest

from experiments.scaling.__main__ import main


def advise(capsys, budget, *options, topology="v5e:16x16"):
    main(["advise", f"--budget={budget}", f"--topology={topology}", *options])
    return capsys.readouterr().out


def test_the_papers_numbers(capsys):
    """The paper's largest budget buys a hybrid or ViT, with the accuracy of Table 6."""
    said = advise(capsys, 15_000)  # 4,260 exaFLOPs at an MFU of 40%: those of ViT-H/14
    values = dict(line.split(maxsplit=1) for line in said.splitlines() if line.startswith("  "))
    assert "ViT" in values["model"] and values["steps"].endswith("of 4,096 images")
    assert values["cost"].startswith("4,25") and "1.5e+04 chip-hours" in values["cost"]
    share = float(values["accuracy"].partition("%")[0])
    assert share == pytest.approx(88, abs=1) and "90% interval" in values["accuracy"]
    assert "Table 6 of the paper: 18 budgets of 15 models" in said


def test_what_the_data_do_not_say_is_said(capsys):
    mini = "--study=mini", "--images=6000", "--task=digits 10-shot"
    said = advise(capsys, 1e-6, *mini, topology="h100:8")
    assert "the data don't say: " in said and "  accuracy" not in said
    assert "based on sets of 5,000 images; no run tells what 6,000 add" in said


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (3, (), "below the smallest run of the data, which say nothing there; expected 176 to"),
        (1e6, (), "beyond 10 times the largest run"),
        (-1, (), "budget = -1 chip-hours, mfu = 0.4: expected more than 0"),
        (1e4, ("--mfu=2",), "mfu = 2: expected more than 0, and an mfu of at most 1"),
        (1e4, ("--images=1000",), "smallest pretraining set of the data has 303,000,000"),
        (1e4, ("--task=ImageNt",), "unknown task 'ImageNt'"),
    ],
)
def test_bad_input(budget, options, message):
    with pytest.raises(SystemExit, match=message):
        main(["advise", f"--budget={budget}", "--topology=v5e:16x16", *options])
