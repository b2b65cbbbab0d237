"""Starting vLLM and ending it, and what is refused before it is started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

import fake_vllm
from live_server import POLICY, PROMPT, shown, user
from tiny_rows import encoder_of, lively, picture
from vlmtune.cli.main import app
from vlmtune.errors import ModelError, UsageError
from vlmtune.models.save import save_model
from vlmtune.serving.vllm import keeper
from vlmtune.serving.vllm.open import OURS
from vlmtune.serving.vllm.process import Launch, Process, check_config, find_program
from vlmtune.testing import tiny
from vlmtune.tuning.apply import ADAPTER_CONFIG

ROOT = Path(__file__).parents[2]


def program(folder: Path, text: str) -> str:
    """A program that stands where vLLM would."""
    path = folder / "vllm"
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def refused(*arguments: object, status: int = 2) -> str:
    done = CliRunner().invoke(app, ["serve", *map(str, arguments), "--json", "--port", "0"])
    assert done.exit_code == status, done.output
    return str(json.loads(done.stdout)["error"]["message"])


def test_the_command(tmp_path):
    launch = Launch(folder=tmp_path, rows=8, images=4, dtype="bfloat16", config=tmp_path / "o.yaml")
    words = launch.command(Path("/s"))
    assert words[:3] == ["vllm", "serve", str(tmp_path)]
    options = dict(zip(words[3::2], words[4::2], strict=False))
    assert options["--uds"] == "/s"
    for pair in (
        ["--generation-config", "vllm"],
        ["--allowed-media-domains", "none.invalid"],
        ["--limit-mm-per-prompt", '{"image": 4}'],
        ["--max-num-seqs", "8"],
        ["--dtype", "bfloat16"],
        ["--config", str(tmp_path / "o.yaml")],
    ):
        place = words.index(pair[0])
        assert words[place : place + 2] == pair
    assert "--enable-scale-out" in words
    assert "--trust-remote-code" not in words


def test_without_vllm(folder):
    message = refused(folder, "--engine", "vllm", "--vllm", "no-such-vllm")
    assert "environment of its own" in message
    assert "--vllm vllm-env/bin/vllm" in message
    with pytest.raises(UsageError):
        find_program("no-such-vllm")


def test_what_vllm_cannot_serve(folder, tmp_path):
    there = ("--engine", "vllm", "--vllm", program(tmp_path, ""))
    assert "expected own or vllm" in refused(folder, "--engine", "sglang")
    assert "for --engine vllm" in refused(folder, "--vllm", "vllm")
    assert "--adapter, --base" in refused(folder, *there, "--adapter", "a=b")
    assert "places the weights itself" in refused(folder, *there, "--device", "cpu")
    assert "places the weights itself" in refused(folder, *there, "--quantization", "nf4")
    assert "expected one of fp32" in refused(folder, *there, "--dtype", "fp8")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_CONFIG).write_text("{}", encoding="utf-8")
    contract = encoder_of(folder).contract
    moved = contract.base.model_copy(update={"id": str(folder)})
    contract.model_copy(update={"base": moved}).write(adapter)
    assert "vlmtune merge" in refused(adapter, *there)


def test_options_that_would_change_what_is_seen(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("gpu-memory-utilization: 0.8\ntensor_parallel_size: 2\n", encoding="utf-8")
    check_config(path, OURS)
    for line in ("mm_processor_kwargs: {}", "trust-remote-code: true", "port: 1"):
        path.write_text(line, encoding="utf-8")
        with pytest.raises(UsageError, match=line.partition(":")[0]):
            check_config(path, OURS)
    path.write_text("- a", encoding="utf-8")
    with pytest.raises(UsageError, match="no table"):
        check_config(path, OURS)
    with pytest.raises(UsageError, match="cannot be read"):
        check_config(tmp_path / "none", OURS)


def test_a_vllm_that_ends_at_once_is_told_with_its_log(tmp_path):
    text = "import sys\nprint('no CUDA here')\nsys.exit(3)\n"
    process = Process(Launch(program=program(tmp_path, text), folder=tmp_path, rows=1, images=1))
    try:
        with pytest.raises(ModelError, match=r"(?s)status 3.*no CUDA here"):
            process.wait(lambda: True)
    finally:
        process.stop()
    assert not process.socket.parent.exists()


def test_it_is_ended_with_what_it_started(tmp_path):
    text = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    launch = Launch(program=program(tmp_path, text), folder=tmp_path, rows=1, images=1, seconds=0.2)
    process = Process(launch)
    with pytest.raises(ModelError, match="did not answer within"):
        process.wait(lambda: True)
    pids = _pids(tmp_path / "pids")
    assert process.alive
    process.stop()
    assert not any(map(_runs, pids))


def test_it_does_not_outlive_whoever_started_it(tmp_path):
    """Not even one that is killed; else a GPU would stay taken."""
    text = f"import os, time\nopen({str(tmp_path / 'pids')!r}, 'w').write(str(os.getpid()))\n"
    command = [sys.executable, keeper.__file__, program(tmp_path, text + "time.sleep(600)\n")]
    starter = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen({command!r}, stdin=subprocess.PIPE)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", starter]) as started:
        (pid,) = _pids(tmp_path / "pids")
        assert _runs(pid)
        started.kill()
    end = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(pid)


def _pids(path: Path) -> list[int]:
    end = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_the_command_line_from_start_to_end(tmp_path):
    """``vlmtune serve --engine vllm`` starts it, serves, and ends it; a dead one is told."""
    base = tiny("qwen2_vl", tmp_path / "base", seed=3)
    encoder = encoder_of(base, POLICY, prompt=PROMPT)
    merged = tmp_path / "merged"
    merged.mkdir()
    save_model(lively(base), merged, family=encoder.family, contract=encoder.contract, base=base)
    text = f"import runpy, sys\nrunpy.run_path({fake_vllm.__file__!r}, run_name='__main__')\n"
    command = [sys.executable, "-m", "vlmtune", "serve", str(merged), "--port", "0", "--json"]
    command += ["--engine", "vllm", "--vllm", program(tmp_path, text), "--dtype", "fp32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as server:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        assert told["models"] == ["merged"]
        client = openai.OpenAI(base_url=f"{told['url']}/v1", api_key="none", max_retries=0)
        messages = user(shown(picture((90, 60), seed=1).data))

        def ask() -> str:
            done = client.chat.completions.create(model="merged", messages=messages, max_tokens=5)
            return str(done.choices[0].message.content)

        assert ask() == ask()
        (vllm,) = _children(server.pid)
        (worker,) = _children(vllm)
        os.kill(worker, signal.SIGKILL)
        time.sleep(1.0)
        with pytest.raises(openai.InternalServerError) as caught:
            ask()
        assert caught.value.status_code == 503
        with pytest.raises(openai.APIStatusError):
            client.get("/../health", cast_to=object)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        client.close()
    assert not _runs(vllm)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]
