"""Every flag has its range: a value outside ends train.py with a line that names it, before it trains."""
import pytest

from faults.helpers import call, checkpoints, fine, refused, run, train_command
from harmonkit.training.recipes import FIELDS

NUMBERS = ("nan", "inf", "-inf", "-1")
BAD = {
    "--lr": ("llm=nan", "llm=inf", "llm=-1", "llm=0", "llm", "llm=", "=1", "", "llm=1e-3,", "llm=x",
             "llm=1=2",
             "head=1", "llm=1,llm=2", "llm=1e999"),
    "--ratio": ("text=nan", "text=inf", "text=-1", "text=0", "text", "text=", "", "texts=1", "text=1,text=2"),
    "--steps": ("0", "-1"), "--batch": ("0", "-2", "3"), "--micro-batch": ("0", "-1"),
    "--size": ("0", "-64", "63", "1"), "--save-every": ("0", "-1"), "--sample-every": ("-1",),
    "--warmup": (*NUMBERS, "1.5"), "--weight-decay": NUMBERS, "--clip": ("nan", "-1", "0", "-inf", "-1e-9"),
    "--ema": (*NUMBERS, "2", "1", "1.0000001"), "--max-length": ("0", "-5"), "--grad-scale": ("nan", "inf"),
    "--scenes": ("0", "-1"), "--kl": NUMBERS, "--free-nats": ("nan", "inf", "-inf"), "--local": NUMBERS,
    "--all-hidden": (*NUMBERS, "2"), "--seed": ("-1", str(10 ** 30)), "--workers": ("-1",),
    "--from-scratch": ("nothing",), "--after": ("nothing",), "--bf16": ("1", "", "yes"),
    "--checkpointing": ("None",), "--compile": ("2",), "--muon": ("x",), "--cosine-mask": ("-1",),
}
UNPARSED = {"--steps": ("1.5", "1e3", "x", ""), "--batch": ("2.0",), "--ema": ("x", ""), "--clip": ("one",),
            "--seed": ("1.0",), "--workers": ("two",), "--only": ("head",), "--device": ("tpu9",)}
CASES = [(flag, value) for flag, values in BAD.items() for value in values]


def try_flag(models, runs, flag, value, **options):
    """train.py with this flag, under a limit of memory: a number must not become a list of that length."""
    def plant():
        import resource
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 32,) * 2)
    start = None if flag in ("--after", "--from-scratch") else models.one
    name, *pairs = train_command(start, runs, **options)
    others = [word for pair in zip(pairs[::2], pairs[1::2]) if pair[0] != flag for word in pair]
    return call("train.py", name, *others, f"{flag}={value}", plant=plant, limit=40)


@pytest.mark.parametrize("flag, value", CASES)
def test_a_value_outside_the_range_is_named(flag, value, models, tmp_path):
    recipe = {"--kl": "tiny-vae", "--free-nats": "tiny-vae", "--local": "tiny-vae",
              "--all-hidden": "tiny-joint",
              "--grad-scale": "tiny-joint"}.get(flag, "tiny-llm")
    done = try_flag(models, tmp_path / "runs", flag, value, recipe=recipe)
    refused(done, flag[2:].replace("-", "."))
    assert not list(tmp_path.rglob("step-*.pt")), "it had begun to train"


@pytest.mark.parametrize("flag, value", [(flag, value) for flag,
                                         values in UNPARSED.items() for value in values])
def test_what_is_no_number_is_named(flag, value, models, tmp_path):
    done = try_flag(models, tmp_path / "runs", flag, value)
    assert done.status == 2 and "Traceback" not in done.err, done
    assert flag in done.err.splitlines()[-1], done


@pytest.mark.parametrize("flag, value", [
    ("--steps", 10 ** 20), ("--scenes", 10 ** 12), ("--max-length", 10 ** 12), ("--batch", 10 ** 15),
    ("--micro-batch", 10 ** 15), ("--size", 10 ** 6)])
def test_a_huge_number_is_no_traceback(flag, value, models, tmp_path):
    """Refused with its name, or it does not matter."""
    runs = tmp_path / "runs"
    if flag == "--steps":
        done = call("train.py", *train_command(models.one, runs, flag, value), "--dry-run", limit=60)
        assert done.status in (0, 2) and "Traceback" not in done.err, done
        return
    done = try_flag(models, runs, flag, value, recipe="tiny-joint" if flag == "--size" else "tiny-llm")
    assert "Traceback" not in done.err, done
    assert done.status == 0 or refused(done)


def test_every_field_has_wrong_values_here():
    tested = {flag[2:].replace("-", "_") for flag in BAD}
    assert {field.name for field in FIELDS} <= tested


@pytest.mark.parametrize("flag, value", [
    ("--ema", 0), ("--ema", 0.99999), ("--warmup", 0), ("--warmup", 1), ("--weight-decay", 0),
    ("--clip", 1e-6), ("--clip", 1e9), ("--max-length", 64), ("--sample-every", 0), ("--grad-scale", 0),
    ("--seed", 12345), ("--scenes", 1), ("--lr", "llm=1e-9")])
def test_the_ends_of_the_ranges_train(flag, value, models, tmp_path):
    fine(run(models.one, tmp_path, flag, value, steps=1))


def test_wrong_values_come_before_the_weights(tmp_path):
    refused(run(tmp_path / "no-model", tmp_path / "runs", "--clip", "nan"), "clip")


def test_wrong_values_are_refused_on_resume(models, half):
    refused(run(models.one, half, "--clip", "nan"), "clip")
    assert [path.name for path in checkpoints(half / "tiny-llm")] == ["step-000002.pt"]


def test_wrong_values_are_refused_in_a_dry_run(models, tmp_path):
    refused(call("train.py", "tiny-llm", "--runs", tmp_path, "--dry-run", "--ema", "2"), "ema")


def test_wrong_values_in_a_chain_are_refused_before_its_first_recipe(tmp_path):
    refused(call("train.py", "tiny", "--runs", tmp_path, "--warmup", "nan"), "warmup")
    assert not list(tmp_path.iterdir())


def test_a_flag_given_twice_is_told(models, tmp_path):
    """The first value would be lost without a word."""
    done = call("train.py", *train_command(models.one, tmp_path, "--clip", 1, steps=1), "--clip", 2)
    assert done.status == 0 or refused(done, "clip", "twice")


@pytest.mark.parametrize("flag", ["--max-length", "--size"])
@pytest.mark.parametrize("value", ["0", "-5"])
def test_ranges_of_the_data_commands(flag, value, models, tmp_path):
    from faults.helpers import write_mixture, write_pictures
    mixture = write_mixture(tmp_path / "mixture.json", (write_pictures(tmp_path / "data", 2), "text2image"))
    done = call("harmonkit.data", "inspect", mixture, "--json", f"{flag}={value}")
    refused(done, flag[2:].replace("-", "."))


def test_runs_in_a_file_is_one_line(models, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run(models.one, tmp_path / "file"), "file")


def test_an_unknown_recipe_is_named():
    done = call("train.py", "tiny-lm")
    assert done.status == 2 and "tiny-lm" in done.err.splitlines()[-1]
