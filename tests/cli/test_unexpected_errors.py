"""An unexpected error gives one line, an exit code, and a log without credentials."""

import importlib.util
import io
import os
import pickle
import subprocess
import sys

import pytest
from conftest import tiny_model

from rgsd import models
from rgsd.cli import DEBUG, UNEXPECTED, main
from rgsd.cli.parsing import quieten
from rgsd.errors import DataError, ModelError
from rgsd.runs import create_run

KEY = "key-00112233445566"


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """Make `rgsd data` raise an error of the test's choice, with its log in tmp_path."""
    import rgsd.cli.data

    monkeypatch.setenv("RGSD_CACHE", str(tmp_path))
    monkeypatch.setenv("ANY_API_KEY", KEY)

    def raises(error):
        def command(argv):
            print(f"working with {KEY} on {argv}")
            raise error

        monkeypatch.setattr(rgsd.cli.data, "main", command)

    return raises


def test_an_unexpected_error_is_one_line_a_log_and_70(broken, tmp_path, capsys):
    broken(KeyError(f"lost {KEY}\nand more"))
    assert main(["data", "x", "--hub_token", KEY]) == UNEXPECTED
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1
    assert "KeyError" in shown.err
    assert KEY not in shown.err + shown.out
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in shown.err
    text = log.read_text()
    assert "Traceback" in text
    assert "rgsd data x --hub_token ***" in text
    assert KEY not in text


@pytest.mark.parametrize(("stop", "code"), [("no such device", 1), (3, 3), (0, 0), (None, 0)])
def test_a_library_that_exits_is_no_success(broken, capsys, stop, code):
    broken(SystemExit(stop))
    assert main(["data", "x"]) == code
    assert ("no such device" in capsys.readouterr().err) == (stop == "no such device")


def test_streams_of_a_notebook_are_streams(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    quieten()
    assert main(["data", "bundled"]) == 0
    assert "medicine" in sys.stdout.getvalue()


def test_a_setting_that_needs_a_missing_package_is_a_usage_error(capsys):
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed")
    assert main(["train", "--output_dir", "none", "--deepspeed", "none.json"]) == 2
    assert "deepspeed" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "sft"])
@pytest.mark.parametrize("setting", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_a_step_without_a_prompt_is_a_config_error(command, setting, tmp_path, capsys):
    argv = ["--model_name_or_path", "nano", "--data", "bundled", "--use_cpu", "--report_to", "none"]
    assert main([command, *argv, "--output_dir", str(tmp_path / "run"), f"--{setting}", "0"]) == 1
    assert f"{setting} must be at least 1, got 0" in capsys.readouterr().err


def test_a_broken_pipe_elsewhere_is_no_success(broken, capsys):
    broken(BrokenPipeError(32, "Broken pipe"))  # of a socket or a worker: standard output is whole
    assert main(["data", "x"]) == UNEXPECTED
    assert "BrokenPipeError" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_prints_the_traceback(broken, capsys, place):
    broken(KeyError("lost"))
    argv = ["data", "x"]
    argv.insert(place, "--debug")
    assert main(argv) == UNEXPECTED
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert "on ['x']" in shown.out
    assert DEBUG not in os.environ
    broken(DataError("bad row"))
    assert main(argv) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_trainers_own_debug_setting_is_left_alone(broken, capsys):
    broken(KeyError("lost"))
    assert main(["data", "--debug", "underflow_overflow"]) == UNEXPECTED
    shown = capsys.readouterr()
    assert "['--debug', 'underflow_overflow']" in shown.out
    assert "Traceback" not in shown.err


def test_without_a_place_for_the_log_it_says_so(broken, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RGSD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    broken(KeyError("lost"))
    assert main(["data"]) == UNEXPECTED
    assert "--debug" in capsys.readouterr().err


def test_the_streams_are_given_back(broken):
    out, err = sys.stdout, sys.stderr
    broken(KeyError("lost"))
    main(["data"])
    assert (sys.stdout, sys.stderr) == (out, err)


def test_a_closed_pipe_is_no_error(tmp_path):
    code = "import sys; from rgsd.cli import main; sys.exit(main(['data', 'bundled']))"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -1', shell=True, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "header", "pickle", "config", "tokenizer"])
def test_a_damaged_model_is_an_error_of_ours(tmp_path, tokenizer, damage):
    tiny_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "zeroed":
        weights.write_bytes(bytes(len(data)))
    elif damage == "header":
        weights.write_bytes(data[:8] + b"\xff" * 64 + data[72:])
    elif damage == "pickle":
        weights.unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": subprocess.Popen}))
    elif damage == "config":
        (tmp_path / "config.json").write_text("[]")
    else:
        (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    load = models.load_tokenizer if damage == "tokenizer" else models.load_model
    with pytest.raises(ModelError, match=tmp_path.name):
        load(str(tmp_path))


def test_a_damaged_adapter_is_an_error_of_ours(tmp_path, tokenizer):
    from peft import LoraConfig, get_peft_model

    tiny_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = create_run(tmp_path / "run", {"model_name_or_path": str(tmp_path / "base")})
    get_peft_model(tiny_model(tokenizer), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        run.folder / "adapter"
    )
    tokenizer.save_pretrained(run.folder / "adapter")
    models.load_trained(run.folder)
    weights = run.folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="adapter"):
        models.load_trained(run.folder)
