"""One command goes from a folder of images to a report, however often it is interrupted."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from processes import checkpoint_arrays, cluster, command, equal_runs, finish, records, start

from vit_jax.classifier import budget, page, workflow
from vit_jax.classifier import recipe as transfer_recipe
from vit_jax.classifier.examine import score
from vit_jax.classifier.probe import VALUES
from vit_jax.classifier.recipe import TransferConfig, WorkflowConfig, complete
from vit_jax.classifier.splits import Splits
from vit_jax.classifier.start import prepare
from vit_jax.classifier.sweep import SweepConfig, run_trials, trial_name
from vit_jax.classifier.workflow import run_workflow, trial_recipe
from vit_jax.config import WORKFLOW, build, recipe
from vit_jax.data.augment import parse_preprocess
from vit_jax.data.decode import decode_image
from vit_jax.data.listing import find_images
from vit_jax.data.pipeline import DataConfig
from vit_jax.data.sources import open_source
from vit_jax.models.variants import ModelConfig, described_model
from vit_jax.parallel.lanes import make_lanes
from vit_jax.parallel.multihost import PREEMPTED
from vit_jax.recipes import recipe as named_recipe
from vit_jax.training import loop
from vit_jax.training.optimizer import OptimizerConfig, ScheduleConfig
from vit_jax.weights.trained import TrainedModel, load

COMMAND = "python -m vit_jax.transfer --config=configs/transfer/folder.py"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser's own requests go nowhere
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes 60 images each of bright and dark noise, and a file that isn't an image."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, low in (("bright", 60), ("dark", 0)):
        (root / name).mkdir()
        for i in range(60):
            pixels = rng.integers(low, low + 190, (20, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{i:02}.png")
    (root / "dark" / "broken.png").write_text("no image")
    return root


@pytest.fixture(scope="module")
def config(folder):
    return TransferConfig(
        model=ModelConfig("ViT-mu/8", dtype="float32"),
        data=DataConfig(str(folder), num_threads=1),
        image_size=16,
        batch_size=16,
        schedule=ScheduleConfig(1e-3, warmup=1),
        steps=6,
        eval_every=2,
        log_every=2,
        workflow=WorkflowConfig(sweep=SweepConfig((1e-3, 3e-3)), export=("npz", "hugging_face")),
    )


def with_rates(config, *rates):
    return dataclasses.replace(config, workflow=WorkflowConfig(sweep=SweepConfig(rates)))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Returns the workdir of a complete run."""
    workdir = tmp_path_factory.mktemp("run")
    run_workflow(config, workdir, COMMAND)
    return workdir


def test_results(finished, folder):
    """The written results agree with each other and with predict on the test images."""
    results = json.loads((finished / "results.json").read_text())
    with np.load(finished / "test.npz") as file:
        logits, labels = file["logits"], file["labels"]
    assert results["examples"] == len(labels) == 24
    assert results["accuracy"] == np.mean(logits.argmax(1) == labels) > 0.5
    low, high = results["accuracy_interval"]
    assert low < results["accuracy"] <= high
    best = max(results["trials"], key=lambda trial: (trial["accuracy"], -trial["loss"]))
    assert results["chosen"] == best["values"]
    resolved = json.loads((finished / "config.json").read_text())
    assert resolved["data"]["split"] == "train+dev"
    assert resolved["schedule"]["peak"] == best["values"]["schedule.peak"]

    trained = load(finished)
    params, description = trained.params, trained.description
    assert description["class_names"] == ["bright", "dark"]
    assert description["preprocess"] == "resize"
    assert description["temperature"] == results["temperature"] != 1.0
    table = (finished / "data" / "splits.csv").read_text().splitlines()[1:]
    files = [row.split(",")[0] for row in table if row.endswith(",test")]
    found = trained.predict(find_images(files))
    assert [p.probabilities.argmax() for p in found] == list(logits.argmax(1))
    exported = load(finished / "exported" / "hugging_face").params
    np.testing.assert_array_equal(exported["head"]["kernel"], params["head"]["kernel"])


@pytest.fixture(scope="module")
def tested(finished):
    """Returns the model's inputs for the test images, uint8 [N, 16, 16, 3], and its logits."""
    source = open_source(str(finished / "data" / "splits.csv"), "test")
    resize = parse_preprocess("resize", (16, 16))
    images = [decode_image(source[i]["image"]) for i in range(len(source))]
    resized = [resize(image, np.random.default_rng(0)) for image in images]
    with np.load(finished / "test.npz") as file:
        return np.stack(resized), file["logits"]


def test_transformers_predicts_the_same(finished, tested):
    """Uses the exported folder alone (needs torch and transformers)."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import torch

    folder = finished / "exported" / "hugging_face"
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = (tested[0].astype(np.float32) - 127.5) / 127.5
    with torch.no_grad():
        logits = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(logits, tested[1], atol=1e-4)
    assert [theirs.config.id2label[i] for i in range(2)] == ["bright", "dark"]


def test_onnxruntime_predicts_the_same(finished, tested, tmp_path):
    """Takes uint8 pixels (needs vit_jax[onnx])."""
    pytest.importorskip("jax2onnx")
    import onnxruntime

    load(finished).save(tmp_path / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(["logits"], {"images": tested[0]})
    np.testing.assert_allclose(logits, tested[1], atol=1e-4)


def test_report(finished, tmp_path):
    """The report is complete, fetches nothing, and renders without errors."""
    page = (finished / "report.html").read_text()
    card = (finished / "MODEL_CARD.md").read_text()
    for text in (COMMAND, "broken.png", "bright", "24 test images", "learning rate 0.003"):
        assert text in page, text
    assert page.count("<figure>") >= 12  # six images, and where the model looks in each
    assert "<script" not in page and "://" not in page
    assert "bright" in card and "held-out images" in card
    if BROWSER is None:
        pytest.skip("needs Chromium")
    shot = tmp_path / "report.png"
    assert "CONSOLE" not in browse(finished / "report.html", shot)
    pixels = np.asarray(Image.open(shot).convert("L"))
    assert pixels.shape[1] == 1000 and np.mean(pixels < 128) > 0.005  # text and charts
    # The page forbids itself any request; one that is made all the same is an error in the console.
    (tmp_path / "worse.html").write_text(page.replace("<h1>", '<img src="http://a.b/c.png"><h1>'))
    assert "CONSOLE" in browse(tmp_path / "worse.html", tmp_path / "worse.png")


HOSTILE = ("<script>alert(1)</script>", "$\\\\frac{", "*a* [b](javascript:1)", "=1+1", "``` c\n# d")


def test_names_are_text_wherever_they_appear():
    """Markup, maths and formulas in class names have no effect on the report and model card."""
    labels = np.arange(10) % len(HOSTILE)
    probabilities = np.eye(len(HOSTILE))[labels] * 0.9 + 0.02
    scores = score(np.log(probabilities), labels, 1.0)
    report = page.Report(
        title=HOSTILE[0],
        command="vit_jax transfer './```'",
        facts={"init": HOSTILE[2]},
        class_names=HOSTILE,
        probabilities=probabilities,
        labels=labels,
        scores=scores,
        baselines=(),
        remarks=HOSTILE,
        data=HOSTILE[0],
        findings=HOSTILE,
        trials="",
        curves={},
        mistakes=(),
        attention=(),
        files={},
    )
    shown, card = page.render(report), page.model_card(report)
    assert "<script" not in shown + card and "&lt;script&gt;" in shown
    assert "[b](" not in card and "\n# d" not in card
    assert "\n````\nvit_jax transfer" in card


def browse(page, shot):
    """Returns what Chromium logs while it takes a screenshot of the page."""
    flags = (f"--user-data-dir={shot.parent / 'profile'}", "--enable-logging=stderr")
    flags += ("--window-size=1000,3000", f"--screenshot={shot}")
    ran = subprocess.run(
        [BROWSER, *QUIET, *flags, f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ran.stderr


def test_what_is_finished_is_not_repeated(config, finished, monkeypatch):
    before = (finished / "results.json").read_text(), checkpoint_arrays(finished)
    monkeypatch.setattr(loop, "Programs", None)  # would be called to train
    run_workflow(config, finished, COMMAND)
    after = json.loads((finished / "results.json").read_text())
    assert after["trials"] == json.loads(before[0])["trials"]
    for name, array in before[1].items():
        np.testing.assert_array_equal(array, checkpoint_arrays(finished)[name])


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    """Copies the run's folder, with nothing left to train."""
    monkeypatch.setattr(loop, "Programs", None)
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_a_workdir_that_was_moved_or_copied_is_a_run_of_its_own(config, finished, copied):
    table = copied / "data" / "splits.csv"
    table.write_text(table.read_text().replace(",test\n", ",train\n", 1))
    with pytest.raises(ValueError, match="the list of files or labels changed"):
        run_workflow(config, copied, COMMAND)
    shutil.copy(finished / "data" / "splits.csv", table)
    run_workflow(config, copied, COMMAND)
    results = [json.loads((p / "results.json").read_text()) for p in (finished, copied)]
    assert results[0]["trials"] == results[1]["trials"]
    assert str(finished) not in (copied / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("config.json", "copy it back"),
        ("sweep.json", "copy it back"),
        ("data.json", "remove it if the data is as it was"),
        ("starts.json", "the run then forgets"),
        ("metrics.jsonl", "Delete the line"),
        ("data/audit.json", "it is made again"),
        ("test.npz", "it will be computed again"),
        ("trials/schedule.peak=0.001/result.json", "the trial is made again"),
        ("trials/schedule.peak=0.001/dev.npz", "the trial is made again"),
        ("trials/schedule.peak=0.003/dev.npz", "the trial is made again"),
    ],
)
@pytest.mark.parametrize("damage", [b"\0" * 20 + b"\n", b'{"half": [1, 2\n'])
def test_a_damaged_file_is_named(config, copied, name, remedy, damage):
    file = copied / name
    chosen = json.loads((copied / "results.json").read_text())["chosen"]
    if file.name == "dev.npz" and trial_name(chosen) not in name:
        pytest.skip("of another trial than the chosen one: it isn't read")
    file.write_bytes(damage)
    with pytest.raises(ValueError, match=remedy) as error:
        run_workflow(config, copied, COMMAND)
    assert str(file) in str(error.value)


@pytest.mark.long
def test_interrupted_anywhere_equals_uninterrupted(config, finished, tmp_path, monkeypatch):
    """Stops at every fifth step of the trials and of the final run; the result is the same."""
    taken, add = [], loop.Recorder.add

    def stop_now_and_then(self, step, values):
        add(self, step, values)
        taken.append(step)
        if len(taken) % 5 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Recorder, "add", stop_now_and_then)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=2))
    for _ in range(20):
        try:
            run_workflow(config, tmp_path, COMMAND)
            break
        except KeyboardInterrupt:
            continue
    assert len(taken) > 18  # so it was stopped, and went on
    expected, found = checkpoint_arrays(finished), checkpoint_arrays(tmp_path)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    results = [json.loads((p / "results.json").read_text()) for p in (finished, tmp_path)]
    for result in results:
        del result["seconds_of_last_start"], result["peak_host_memory_gib"]
    assert results[0] == results[1]


def test_trials_side_by_side_equal_one_after_another(config, finished, tmp_path):
    """Trials on one device each give bit-identical results."""
    kept = json.loads((finished / "data" / "audit.json").read_text())
    sgd = OptimizerConfig("sgd")
    config = dataclasses.replace(config, steps=2, eval_every=1, log_every=1, optimizer=sgd)
    recipe = trial_recipe(config, Splits(**kept["splits"]))
    trials, lanes = config.workflow.sweep.trials(), make_lanes(1)[:2]

    def run(config, folder, lane):
        loop.train(prepare(config, str(folder), lane=lane))

    together = run_trials(recipe, trials, tmp_path / "together", run, lanes)
    assert together == run_trials(recipe, trials, tmp_path / "one by one", run, lanes[:1])
    for name in map(trial_name, trials):
        one, other = (records(tmp_path / n / "trials" / name) for n in ("together", "one by one"))
        assert one == other and len(one) == 4
    assert together[0].loss != together[1].loss


@pytest.mark.slow
def test_early_stopping_ends_the_final_run_too(config, tmp_path):
    config = dataclasses.replace(config, steps=12, early_stopping=1, workflow=WorkflowConfig())
    run_workflow(config, tmp_path, COMMAND)
    (trial,) = json.loads((tmp_path / "results.json").read_text())["trials"]
    evaluations = [r for r in records(tmp_path / "trials/recipe") if "dev/accuracy" in r]
    best = max(evaluations, key=lambda r: (r["dev/accuracy"], -r["dev/loss"]))
    assert (trial["accuracy"], trial["step"]) == (best["dev/accuracy"], best["step"])
    assert checkpoint_arrays(tmp_path)["step"] == str(trial["step"])
    assert evaluations[-1]["step"] < 12


def test_another_recipe_is_refused(config, finished):
    other = dataclasses.replace(config, steps=8)
    with pytest.raises(ValueError, match="steps: 6 there, 8 here"):
        run_workflow(other, finished, COMMAND)
    more = with_rates(config, 1e-3, 3e-3, 1e-2, 3e-2)
    with pytest.raises(ValueError, match="12 images, too few to choose among 4 trials"):
        run_workflow(more, finished, COMMAND)


def test_splits_may_change_until_something_was_trained(config, tmp_path, monkeypatch):
    """A dev split that is too small can be enlarged in the same workdir."""
    monkeypatch.setattr(workflow, "run_trials", None)
    many = with_rates(config, 1e-4, 3e-4, 1e-3, 3e-3)
    with pytest.raises(ValueError, match="12 images, too few to choose among 4 trials"):
        run_workflow(many, tmp_path, COMMAND)
    split = dataclasses.replace(many.workflow.split, dev_share=0.3)
    larger = dataclasses.replace(many, workflow=dataclasses.replace(many.workflow, split=split))
    with pytest.raises(TypeError, match="NoneType"):  # it comes to the trials
        run_workflow(larger, tmp_path, COMMAND)


def test_what_a_recipe_leaves_open_is_the_checkpoints(config, tmp_path):
    """The checkpoint gives architecture and image size, but not the training settings."""
    fields = {"dropout": 0.1, "representation_size": 24, "pool": "gap", "dtype": "float32"}
    model = described_model(
        {"model": {"variant": "ViT-mu/8", **fields}, "num_classes": 5, "image_size": [16, 16]}
    )
    transfer_recipe.load_init.cache_clear()
    params = model.init(jax.random.key(0))
    TrainedModel.from_description(params, model.description).save(tmp_path / "up")
    values = {
        "init": str(tmp_path / "up"),
        "data": {"dataset": "digits"},
        "model": {"remat": "full"},
    }
    found = complete(values)
    assert found["image_size"] == 16
    assert found["model"]["pool"] == "gap" and found["model"]["remat"] == "full"
    assert "dropout" not in found["model"] and "representation_size" not in found["model"]
    assert complete({**values, "image_size": 32})["image_size"] == 32
    given = {**values, "image_size": 32, "model": {"variant": "ViT-B/16"}}
    assert complete(given) == given

    run = prepare(
        dataclasses.replace(
            config,
            workflow=None,
            init=values["init"],
            data=DataConfig("digits"),
            model=build(ModelConfig, found["model"]),
        ),
        str(tmp_path / "down"),
    )
    np.testing.assert_array_equal(run.loaded["embedding"]["kernel"], params["embedding"]["kernel"])


def test_a_probed_head_predicts_before_any_step(config, finished, tmp_path):
    """The head separates the training images on the checkpoint's features."""
    data = DataConfig(str(finished / "data" / "splits.csv"), num_threads=1)
    config = dataclasses.replace(config, workflow=None, data=data, init=str(finished), head="probe")
    run = prepare(config, str(tmp_path))
    source = run.source
    images = np.stack(
        [
            np.asarray(Image.fromarray(decode_image(source[i]["image"])).resize((16, 16)))
            for i in range(0, len(source), 5)
        ]
    )
    logits = jax.jit(run.model.apply)(run.loaded, images).logits
    labels = [source[i]["label"] for i in range(0, len(source), 5)]
    assert np.mean(logits.argmax(1) == np.array(labels)) > 0.9
    with pytest.raises(ValueError, match="head = 'probe' fits the features of a checkpoint"):
        dataclasses.replace(config, init="")


@pytest.fixture(scope="module")
def probed(config, finished, tmp_path_factory):
    """Returns the workdir of a run from a checkpoint, whose fine-tuning learns nothing."""
    sweep = WorkflowConfig(sweep=SweepConfig((1e-9,)), probe=True, minutes=5.0)
    config = dataclasses.replace(config, init=str(finished), workflow=sweep, steps=2)
    workdir = tmp_path_factory.mktemp("probed")
    run_workflow(config, workdir, COMMAND)
    return config, workdir


def test_the_probe_is_kept_where_fine_tuning_is_no_better(probed, finished):
    """The probe is a trial; the final model is the checkpoint with a head of train and dev."""
    _, workdir = probed
    results = json.loads((workdir / "results.json").read_text())
    assert [trial["values"] for trial in results["trials"]] == [VALUES, {"schedule.peak": 1e-9}]
    assert results["chosen"] == VALUES
    probe, tuned = results["trials"]
    assert probe["accuracy"] >= tuned["accuracy"] and probe["loss"] < tuned["loss"]
    model, start = load(workdir), load(finished)
    assert model.description["temperature"] == results["temperature"] != 1.0
    np.testing.assert_array_equal(
        model.params["embedding"]["kernel"], start.params["embedding"]["kernel"]
    )
    with np.load(workdir / "probe/test.npz") as file:
        logits = file["features"] @ model.params["head"]["kernel"] + model.params["head"]["bias"]
    with np.load(workdir / "test.npz") as file:
        np.testing.assert_allclose(logits, file["logits"], atol=1e-4)
    rows = {row["name"]: row for row in results["baselines"]}
    assert rows["linear probe"]["accuracy"] == results["accuracy"]
    assert not any("linear probe" in remark for remark in results["remarks"])


def test_what_was_settled_stays(probed, monkeypatch):
    """A restart measures and trains nothing, and refuses another `minutes`."""
    config, workdir = probed
    before = (workdir / "budget.json").read_text(), checkpoint_arrays(workdir)
    monkeypatch.setattr(loop, "measure_step", None)
    monkeypatch.setattr(loop, "Programs", None)
    run_workflow(config, workdir, COMMAND)
    assert (workdir / "budget.json").read_text() == before[0]
    for name, array in checkpoint_arrays(workdir).items():
        np.testing.assert_array_equal(array, before[1][name])
    other = dataclasses.replace(config.workflow, minutes=6.0)
    with pytest.raises(ValueError, match=r"settled for workflow.minutes = 5.0, found 6.0"):
        run_workflow(dataclasses.replace(config, workflow=other), workdir, COMMAND)


@pytest.mark.parametrize(
    ("left", "lanes", "probe", "trials", "steps"),
    [
        (1000, 1, False, 3, 100),  # all of it
        (400, 1, False, 3, 95),
        (200, 1, False, 2, 61),
        (100, 1, False, 1, 45),  # not half of the steps, and one trial nevertheless
        (200, 3, False, 3, 95),  # two rounds
        (25, 1, True, 0, 0),  # the probe alone
    ],
)
def test_what_fits_the_time(left, lanes, probe, trials, steps):
    """A step takes one second, a run five more."""
    values = [{"schedule.peak": peak} for peak in (1.0, 2.0, 3.0)]
    cost, whole = budget.Cost(1.0, 5.0, 10.0), budget.Budget(values, 100, 0.0, 1.0, "cpu")
    found = budget.fit(whole, cost, left, lanes, probe)
    assert (len(found.trials), found.steps) == (trials, steps)
    assert found.seconds <= left + cost.report
    if trials == 1:
        assert found.trials == values[1:2]
    with pytest.raises(ValueError, match=r"workflow.minutes = 1 are too few: a step takes 1 s"):
        budget.fit(whole, cost, 25, 1, False)


@pytest.mark.parametrize(("spent", "steps"), [(100, 100), (200, 62), (600, 10)])
def test_the_final_run_makes_up_for_slow_trials(tmp_path, spent, steps):
    """The final run is shortened once; a restart keeps its length."""
    values = [{"schedule.peak": 1.0}]
    settled = budget.Budget(values, 100, 220.0, 6.0, "cpu", before=20.0 + 52.0)
    settled = dataclasses.asdict(dataclasses.replace(settled, minutes=440 / 60))
    (tmp_path / "budget.json").write_text(json.dumps(settled))
    assert budget.settle_final(tmp_path, spent, 1) == steps
    assert budget.settle_final(tmp_path, 10 * spent, 1) == steps


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"minutes": 0}, "minutes = 0.0: expected more than 0"),
    ],
)
def test_workflows_that_cannot_be(workflow, message):
    with pytest.raises(ValueError, match=message):
        build(WorkflowConfig, workflow)


def test_steps_in_a_grid_leave_no_time_to_keep(config):
    sweep = SweepConfig(grid=(("batch_size", (8, 16)),))
    workflow = WorkflowConfig(sweep=sweep, minutes=1.0)
    with pytest.raises(ValueError, match=r"leave batch_size out of workflow.sweep.grid"):
        budget.check_sweep(dataclasses.replace(config, workflow=workflow))


def test_the_device_says_what_a_recipe_leaves_open():
    """The device changes only fields that the recipe leaves open."""
    values = named_recipe("transfer/folder", **{"data.dataset": "x", "steps": 7}).to_dict()
    scratch = build(TransferConfig, complete(values, "cpu"))
    assert (scratch.model.variant, scratch.steps, scratch.batch_size) == ("R26x1", 7, 32)
    given = {**values, "model": {"variant": "ViT-mu/8"}, "image_size": 16}
    cpu, gpu = (build(TransferConfig, complete(given, device)) for device in ("cpu", "gpu"))
    assert (cpu.steps, cpu.batch_size, gpu.steps, gpu.batch_size) == (7, 32, 7, 512)
    assert (cpu.schedule.warmup, cpu.eval_every, complete(given, "earlier")["eval_every"]) == (
        1,
        1,
        50,
    )
    assert len(gpu.workflow.sweep.learning_rates) == 4 and gpu.optimizer.name == "sgd"
    with pytest.raises(ValueError, match="no init, and the recipe names no model"):
        complete(values, "gpu")


def test_a_run_goes_on_with_the_defaults_that_it_began_with(finished, tmp_path):
    """The defaults are its first device's; an older run has those of none, and no probe."""
    assert workflow._first_device("") is workflow._first_device(tmp_path) is None
    shutil.copy(finished / "sweep.json", tmp_path)
    assert workflow._first_device(tmp_path) == "earlier"
    settled = json.loads((finished / "budget.json").read_text())
    (tmp_path / "budget.json").write_text(json.dumps({**settled, "device": "tpu"}))
    assert workflow._first_device(tmp_path) == "tpu"
    values = named_recipe("transfer/folder:steps=7", **{"data.dataset": "x"}).to_dict()
    values |= {"model": {"variant": "ViT-mu/8"}, "image_size": 16}
    assert complete(values, "earlier")["batch_size"] == complete(values, "tpu")["batch_size"] == 512


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {}}, "no images: say which, --config.data=FOLDER"),
        ({"data": {"dataset": "digits"}}, "no init, and the recipe names no model"),
        (
            {"data": {"dataset": "digits"}, "init": "augreg:S/61"},
            "did you mean 'augreg:S/16'",
        ),
    ],
)
def test_open_recipes_are_explained(values, message):
    with pytest.raises(ValueError, match=message):
        complete(values)


def test_command_explains_bad_input(folder, tmp_path):
    """A user sees an explanation and no traceback."""
    folder_of_one = tmp_path / "one"
    shutil.copytree(folder / "dark", folder_of_one / "dark")
    code, _, err = command(
        "transfer",
        "--config=configs/transfer/folder.py",
        f"--config.data={folder_of_one}",
        "--config.model.variant=ViT-mu/8",
        "--config.image_size=16",
        f"--workdir={tmp_path / 'run'}",
    )
    assert code == 1 and "there is one class, dark" in err and "Traceback" not in err


def test_the_workflow_by_its_earlier_names(config):
    """Fields were once outside the group; without a `sweep` they did nothing."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    old = {**values, **{name: values["workflow"][name] for name in WORKFLOW}}
    del old["workflow"]
    assert build(TransferConfig, old) == config
    assert build(TransferConfig, recipe(**old)) == config
    trial = {**old, "sweep": None}  # config.json of a trial
    assert build(TransferConfig, trial) == dataclasses.replace(config, workflow=None)
    del old["sweep"]
    with pytest.raises(ValueError, match="split, fit_memory, memory_gib, export: part of a work"):
        build(TransferConfig, old)
    assert build(TransferConfig, {**values, "workflow": {}}).workflow == WorkflowConfig()
    with pytest.raises(ValueError, match=r"workflow\.memory_gib = 2\.0 changes nothing without"):
        WorkflowConfig(memory_gib=2.0)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_at_any_moment(folder, tmp_path, devices):
    """The whole command, killed at random repeatedly, ends like an uninterrupted one.

    On two devices its trials run concurrently.
    """
    arguments = (
        "transfer",
        "--config=configs/transfer/folder.py:adamw,steps=40,batch=16",
        f"--config.data={folder}",
        "--config.model.variant=ViT-mu/8",
        "--config.model.dtype=float32",
        "--config.image_size=16",
        "--config.checkpoint.every=5",
        "--config.sweep.learning_rates=(1e-3,3e-3)",
        "--config.export=()",
    )

    def begin(name):
        workdir = f"--workdir={tmp_path / name}"
        return start(*arguments, workdir, JAX_NUM_CPU_DEVICES=str(devices))

    out, err = begin("whole").communicate()
    assert "test accuracy" in out, err
    assert ("trials go side by side, 2 at a time" in out) == (devices == 2)
    rng, killed = random.Random(devices), []
    while True:
        process, lines = begin("killed"), rng.randint(1, 30)
        for _ in zip(process.stderr, range(lines), strict=False):
            pass  # of about 60 that a whole run writes
        time.sleep(rng.uniform(0, 0.5))
        killed.append(rng.choice((signal.SIGKILL, signal.SIGTERM)))
        process.send_signal(killed[-1])
        _, err = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode in (PREEMPTED, *(-number for number in killed)), err
    assert {*killed} == {signal.SIGKILL, signal.SIGTERM}
    expected, found = (checkpoint_arrays(tmp_path / name) for name in ("whole", "killed"))
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)
    for name in ("trials/schedule.peak=0.001", "trials/schedule.peak=0.003", "."):
        assert records(tmp_path / "killed" / name) == records(tmp_path / "whole" / name)
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "killed")]
    assert results[0]["trials"] == results[1]["trials"]


@pytest.mark.slow
def test_two_processes(folder, tmp_path):
    """Trials run one after another over both processes, as in one with as many devices."""
    arguments = (
        "transfer",
        "--config=configs/transfer/folder.py:adamw,steps=4,batch=16",
        f"--config.data={folder}",
        "--config.model.variant=ViT-mu/8",
        "--config.model.dtype=float32",
        "--config.image_size=16",
        "--config.sweep.learning_rates=(1e-3,3e-3)",
        "--config.export=()",
    )
    one = start(
        *arguments,
        f"--workdir={tmp_path / 'one'}",
        "--config.sweep.devices=2",
        JAX_NUM_CPU_DEVICES="2",
    )
    _, err = one.communicate()
    assert one.returncode == 0, err
    two = cluster(2, 1, lambda i: (*arguments, f"--workdir={tmp_path / 'two'}"))
    codes, errors = finish(two, timeout=1200)
    assert codes == [0, 0], errors
    equal_runs(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "two" / "report.html").exists()
