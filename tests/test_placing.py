"""Loading onto devices: what is planned is what is built, and what does not fit is refused first.

GPUs are what the tests say is here; the CUDA layers on torch's CPU device stand for them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from models import Tiny, pack

import bloomq
from bloomq import backends, placing
from bloomq.backends.cuda.device import why_not
from bloomq.cli import commands
from bloomq.errors import BackendError, CapacityError, UsageError
from bloomq.pack import Pack
from bloomq.placement import Device, Request

TINY = Tiny(n_head=3, head_dim=20, vocab_size=131, n_layer=4, seq_length=96)
IDS = [5, 9, 100, 3, 77]

Gpus = Callable[..., None]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.getbasetemp(), TINY, "int4")


@pytest.fixture
def gpus(path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """`gpus(2, 1)`: GPUs with room for two layers and for one, each with the head beside them; for
    more than there are: with room to spare."""
    pytest.importorskip("bitsandbytes")
    opened = Pack.open(path)
    built: list[str] = []
    on_one = placing.on_one

    def here(*layers: int) -> None:
        request = Request(opened.config, opened.schemes, (Device("cuda:0", 1, None, "GPU"),), 96)
        devices = []
        for i, count in enumerate(layers):
            gpu = Device(f"cuda:{i}", 1, None, "GPU")
            share = request.share(gpu, range(min(count, 4)), is_last=True)
            room = share.nbytes * (2 if count > 4 else 1)
            devices.append(Device(f"cuda:{i}", room, None, "GPU"))
        devices.append(Device("cpu", 1 << 34, None, "CPU"))
        monkeypatch.setattr(backends, "why_not", lambda name: None)
        monkeypatch.setattr(placing, "found", lambda names: tuple(devices))

        def stand_in(device: str, opened: Pack, threads: int | None, dtype: str) -> backends.Choice:
            built.append(device)
            if device == "cpu":
                return on_one("cpu", opened, threads, dtype)
            return backends.choose("cuda", opened, threads, dtype, "cpu")

        monkeypatch.setattr(placing, "on_one", stand_in)

    here.built = built  # type: ignore[attr-defined]
    return here


# -- over several devices --------------------------------------------------------------------------


def test_a_model_lies_where_the_plan_puts_it_and_writes_what_one_device_writes(
    path: Path, gpus: Gpus
):
    alone = bloomq.load(path, backend="cuda", devices="cpu")
    text = alone.generate(IDS, max_new_tokens=12).ids
    gpus(2, 3)
    model = bloomq.load(path, devices="cuda:0,1")
    layers = [place.layers for place in model.backend.places]
    assert layers == [range(2), range(2, 4)]
    assert model.backend.name == "placed"
    assert model.backend_reason.startswith("asked for; layers 0-1 on cuda (torch ")
    assert model.generate(IDS, max_new_tokens=12).ids == text


def test_the_classes_of_transformers_lie_over_devices_too(path: Path, gpus: Gpus):
    alone = bloomq.BloomForCausalLM.from_pretrained(path, backend="cuda", devices="cpu")
    wanted = alone(np.array([IDS]), output_hidden_states=True)
    gpus(2, 3)
    model = bloomq.BloomForCausalLM.from_pretrained(path, devices="cuda:0,1")
    assert [place.layers for place in model.backend.places] == [range(2), range(2, 4)]
    found = model(np.array([IDS]), output_hidden_states=True)
    assert np.array_equal(found.logits, wanted.logits)
    for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert np.array_equal(ours, theirs)


def test_the_commands_of_tasks_take_devices(path: Path, gpus: Gpus):
    gpus(1, 1)
    given = ["embed", "some text", "-m", str(path), "--devices", "cuda:0,1"]
    refused = CliRunner().invoke(commands, given)
    assert isinstance(refused.exception, CapacityError)
    assert str(refused.exception).startswith("the model does not fit: ")


def test_auto_takes_the_gpus_that_the_model_needs(path: Path, gpus: Gpus):
    gpus(2, 2, 2)
    choice = placing.choose("auto", Pack.open(path), None)
    layers = [place.layers for place in choice.backend.places]
    assert layers == [range(2), range(2, 3), range(3, 4)]  # with some memory left on each
    assert choice.reason.startswith("auto: all GPUs that the model needs; layers 0-1 on cuda (")


def test_what_gpus_have_no_room_for_lies_on_the_cpu(path: Path, gpus: Gpus):
    gpus(1, 2)
    model = bloomq.load(path, devices="cuda:0,1,cpu", threads=1)
    assert [place.backend.name for place in model.backend.places] == ["numba", "cuda", "cuda"]
    assert gpus.built == ["cpu", "cuda:0", "cuda:1"]
    assert model.generate(IDS, max_new_tokens=4).finish_reason == "length"


def test_a_model_that_fits_on_one_gpu_has_no_seams(path: Path, gpus: Gpus):
    opened = Pack.open(path)
    gpus(40, 40)
    assert placing.choose("auto", opened, None, devices="cuda:0,1").backend.name == "cuda"
    assert gpus.built == ["cuda:0"]


def test_what_does_not_fit_is_refused_before_anything_is_built(path: Path, gpus: Gpus):
    gpus(1, 2)
    with pytest.raises(
        CapacityError, match=r"^the model does not fit: .* GB have no place on 2 de"
    ):
        bloomq.load(path, devices="cuda:0,1")
    with pytest.raises(CapacityError, match=r"what would fit: .*beside the GPUs"):
        bloomq.load(path)
    assert gpus.built == []


def test_the_memory_that_may_be_used_is_what_is_planned_with(path: Path, gpus: Gpus):
    gpus(40, 40)
    opened = Pack.open(path)
    with pytest.raises(CapacityError, match=r"^the model does not fit: "):
        placing.choose("auto", opened, None, max_memory="0:100MB,1:100MB")
    with pytest.raises(UsageError, match=r"^most memory is given for cuda:7, which is none of"):
        placing.choose("auto", opened, None, max_memory="7:100MB")


# -- on one ----------------------------------------------------------------------------------------


def test_without_a_gpu_auto_is_the_cpu(path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Pack.open(path)
    plain = backends.choose("auto", opened, 1, "auto", "cpu")
    assert placing.choose("auto", opened, 1, devices="cpu").reason == plain.reason
    if why_not() is not None:
        assert placing.choose("auto", opened, 1).reason == backends.choose("auto", opened, 1).reason


def test_a_gpu_that_cannot_be_used_is_refused_with_the_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("bloomq.backends.cuda.device.why_not", lambda: "no driver")
    with pytest.raises(BackendError, match=r"^devices is 'cuda:0', but no driver: "):
        bloomq.load(path, devices="cuda:0,1")


def test_the_cpus_memory_may_be_bounded_too(path: Path):
    assert bloomq.load(path, devices="cpu", max_memory="cpu:8GB").backend.name == "numba"
    with pytest.raises(CapacityError, match=r"^the model does not fit: .* on 1 device of 0\.0 GB"):
        bloomq.load(path, devices="cpu", max_memory="cpu:2MB")


@pytest.mark.parametrize("devices", [3, None, ["cuda:0"]], ids=str)
def test_devices_are_text(path: Path, devices):
    with pytest.raises(UsageError, match=r"^devices is .*, expected auto, cpu, cuda or cuda:0"):
        bloomq.load(path, devices=devices)


def test_the_cpu_has_the_memory_that_the_system_can_give(monkeypatch: pytest.MonkeyPatch):
    device = placing.cpu()
    assert (device.name, device.kind) == ("cpu", "cpu")
    assert 1 << 27 < device.memory_bytes < 1 << 50
    monkeypatch.setattr(placing.Path, "exists", lambda self: False)
    assert device.memory_bytes <= placing.cpu().memory_bytes
    monkeypatch.setattr(placing.os, "sysconf_names", {})
    assert placing.cpu().memory_bytes == 1 << 60


def test_gpus_are_told_with_their_free_memory(monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    free = [79 << 30, 20 << 30]
    names = ["NVIDIA H100 80GB HBM3", "Some GPU"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: names[int(name[5:])])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], 80 << 30))
    monkeypatch.setattr(backends, "why_not", lambda name: None)
    first, second, cpu = placing.found(("auto",))
    assert (first.name, first.label, first.gb_s) == ("cuda:0", names[0], 3350)
    assert first.memory_bytes - free[0] == second.memory_bytes - free[1] == 600 << 20
    assert (second.name, second.gb_s, cpu.name) == ("cuda:1", None, "cpu")
    assert np.isfinite(cpu.memory_bytes)


@pytest.mark.parametrize("options", [{"devices": "nonsense"}, {"max_memory": "much"}], ids=str)
def test_devices_that_cannot_be_are_refused_before_a_checkpoint_is_read(tmp_path, options):
    with pytest.raises(UsageError, match="expected"):
        bloomq.BloomForCausalLM.from_pretrained(tmp_path / "no such checkpoint", **options)


def test_most_memory_is_text(path: Path):
    with pytest.raises(UsageError, match=r"^max_memory is 5, expected text as in 0:70GiB"):
        bloomq.load(path, max_memory=5)
