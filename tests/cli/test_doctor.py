"""``doctor``: machines that nobody has here are judged, each beside one that is as it should be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vlmtune.hub import reach
from vlmtune.verbs import doctor as doctoring
from vlmtune.verbs import machine as machines
from vlmtune.verbs.doctor import judge, precision
from vlmtune.verbs.machine import Disk, Gpu, Machine

GB = 10**9
H200 = Gpu("NVIDIA H200", (9, 0), 150 * GB, 149 * GB)
T4 = Gpu("Tesla T4", (7, 5), 15 * GB, 15 * GB)
P100 = Gpu("Tesla P100", (6, 0), 16 * GB, 16 * GB)
GOOD = Machine(
    python="3.12.1",
    platform="Linux x86_64",
    packages={
        "vlmtune": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "huggingface-hub": "2.4.0",
        "rich": "15.0.0",
    },
    requires={
        "vlmtune": ("torch>=2.11", "transformers>=5.23", "ruff; extra == 'dev'"),
        "transformers": ("huggingface-hub<3.0,>=1.5.0",),
    },
    torch="2.13.0+cu130",
    cuda="13.0",
    cuda_fault="",
    driver=True,
    gpus=(H200,),
    cpus=16,
    threads=16,
    bf16=False,
    memory=128 * GB,
    free=100 * GB,
    disks=(Disk("runs", "runs", 500 * GB, True), Disk("models", "cache", 500 * GB, True)),
)


def found(machine: Machine, name: str) -> list[tuple[str, str]]:
    return [(each.state, each.found) for each in judge(machine) if each.name == name]


def without(packages, **changes):
    return {**packages, **{name.replace("_", "-"): value for name, value in changes.items()}}


def test_a_good_machine_has_nothing_to_mend():
    assert {each.state for each in judge(GOOD)} == {"ok"}


@pytest.mark.parametrize(
    ("change", "name", "state", "words"),
    [
        ({"python": "3.10.4"}, "python", "fault", "3.10.4"),
        ({"cuda_fault": "Found no NVIDIA driver"}, "torch", "fault", "no GPU can be used"),
        ({"cuda": None, "gpus": ()}, "torch", "fault", "has an NVIDIA driver"),
        ({"gpus": (H200, T4)}, "gpu", "note", "pace of the slowest"),
        ({"gpus": (replace(H200, free=GB),)}, "gpu", "note", "1.0 GB of 150.0 GB free"),
        ({"free": GB}, "memory", "note", "1.0 GB"),
        ({"disks": (Disk("runs", "r", 10 * GB, True),)}, "disk", "note", "10.0 GB"),
        ({"disks": (Disk("runs", "r", GB // 2, True),)}, "disk", "fault", "500 MB"),
        ({"disks": (Disk("runs", "r", 500 * GB, False),)}, "disk", "fault", "cannot be written"),
        ({"torchvision_fault": "operator nms"}, "torchvision", "note", "operator nms"),
        ({"stale_locks": ("x/lock",)}, "deepspeed", "fault", "x/lock"),
    ],
)
def test_each_fault_is_found(change, name, state, words):
    findings = found(replace(GOOD, **change), name)
    assert any(each == state and words in text for each, text in findings), findings
    assert not any(words in text for _, text in found(GOOD, name))  # the control


@pytest.mark.parametrize(
    ("versions", "name", "state", "words"),
    [
        # Each of these is known to break something; see the stack's page for how it was found.
        ({"transformers": "5.17.0"}, "packages", "fault", "transformers>=5.23, found 5.17.0"),
        ({"huggingface_hub": "3.0.1"}, "packages", "fault", "huggingface-hub<3.0,>=1.5.0"),
        ({"torch": "2.10.0+cpu"}, "packages", "fault", "torch>=2.11, found 2.10.0+cpu"),
        ({"torch": "2.15.0+cu130"}, "torch", "note", "newer than what the tests run with"),
        ({"swanboard": "0.1.10b2"}, "swanboard", "note", "rich<14"),
        ({"torchao": "0.18"}, "torchao", "note", "warnings"),
        ({"datasets": "4.8.4", "modelscope": "1.40.2"}, "datasets", "note", "4.8.4"),
    ],
)
def test_versions_known_to_break_are_found(versions, name, state, words):
    machine = replace(GOOD, packages=without(GOOD.packages, **versions))
    findings = found(machine, name)
    assert any(each == state and words in text for each, text in findings), findings
    assert not any(words in text for _, text in found(GOOD, name))  # the control


def test_versions_that_only_break_together_are_fine_alone():
    packages = without(GOOD.packages, swanboard="0.1.10b2", rich="13.9.4")
    assert found(replace(GOOD, packages=packages), "swanboard") == []
    packages = without(GOOD.packages, torch="2.11.0")
    assert found(replace(GOOD, packages=packages), "packages")[0][0] == "ok"
    missing = {name: version for name, version in GOOD.packages.items() if name != "torch"}
    assert found(replace(GOOD, packages=missing), "packages") == [
        ("fault", "vlmtune needs torch, which is not installed")
    ]


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({}, "bf16", "9.0 multiplies bf16 itself"),
        ({"gpus": (H200, T4)}, "fp16", "7.5 has no bf16"),
        ({"gpus": (P100,)}, "fp32", "6.0"),
        ({"gpus": (), "bf16": True}, "bf16", "processor"),
        ({"gpus": ()}, "fp32", "no bf16 of its own"),
    ],
)
def test_the_precision_that_the_weakest_device_supports(change, name, why):
    chosen, reason = precision(replace(GOOD, **change))
    assert chosen == name
    assert why in reason


def test_this_machine(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("doctor", "--json")
    result = done.json
    assert done.status == (0 if result["ok"] else 1)
    assert {"python", "torch", "cuda", "gpus", "precision", "memory", "disks"} <= result.keys()
    names = [each["name"] for each in result["findings"]]
    for name in ("python", "packages", "torch", "gpu", "precision", "memory", "disk", "network"):
        assert name in names
    assert result["packages"]["torch"] == result["torch"]
    shown = command("doctor")
    assert len(shown.out.splitlines()) <= 30  # one screen
    for name in names:
        assert name in shown.out
    assert list(tmp_path.iterdir()) == []  # it looks, and touches nothing


def test_a_fault_is_status_1(command, monkeypatch):
    monkeypatch.setattr(doctoring, "read_machine", lambda *_: replace(GOOD, python="3.9.0"))
    done = command("doctor", "--json")
    assert (done.status, done.json["ok"]) == (1, False)
    monkeypatch.setattr(doctoring, "read_machine", lambda *_: GOOD)
    assert command("doctor").status == 0


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    limit.write_text("max\n", encoding="utf-8")
    monkeypatch.setattr(machines, "LIMITS", ((limit, "taken", "inactive_file"),))
    whole = machines._memory()
    limit.write_text(f"{2**29}\n", encoding="utf-8")
    assert machines._memory() == (2**29, 2**29)
    assert whole[0] > 2**29
    # What others in it have taken is not there, but for what is given back when it is needed.
    (tmp_path / "taken").write_text(f"{2**28}\n", encoding="utf-8")
    assert machines.available_memory() == 2**28
    (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {2**27}\nslab 9\n")
    assert machines.available_memory() == 2**28 + 2**27


# The network


def test_the_network_is_left_alone_unless_asked(command, monkeypatch):
    asked = []
    monkeypatch.setattr(reach.httpx2, "head", lambda *arguments, **_: asked.append(arguments))
    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", False)
    assert "not asked" in command("doctor").out
    assert asked == []
    command("doctor", "--network")
    assert asked  # the control
    asked.clear()
    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode" in command("doctor", "--network").out
    assert asked == []


def test_neither_keys_nor_proxies_are_told(command, monkeypatch):
    """The end point of the settings is asked; of it scheme and host are told, of a proxy that."""
    end = "http://somebody:sesame@127.0.0.1:9/mirror?key=open"  # nobody listens there
    monkeypatch.setattr(reach.constants, "ENDPOINT", end)
    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reach, "getproxies", lambda: {"https": "http://user:secret@proxy:3128"})
    done = command("doctor", "--network", "--json")
    text = done.out + done.err
    (finding,) = [
        each
        for each in done.json["findings"]
        if each["name"] == "network" and "huggingface" in each["found"]
    ]
    assert finding["state"] == "note"
    assert "http://127.0.0.1, through a proxy: no answer" in finding["found"]
    for hidden in ("sesame", "somebody", "secret", "3128", "key=open"):
        assert hidden not in text
        assert hidden in json.dumps([end, reach.getproxies()])  # the control: it was there
