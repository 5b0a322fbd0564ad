"""Damaged and hostile checkpoints end in a clear error or in the exact network; nothing else."""

from __future__ import annotations

import copy
import io
import os
import random
import subprocess

import pytest
import torch
from helpers import random_model, random_plan

from utils.checkpoint import checksum, load_checkpoint, save_checkpoint
from utils.errors import InputError
from utils.surgery import prune


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A real checkpoint of a pruned network: its bytes, its content, and the network."""
    path = tmp_path_factory.mktemp("fuzz") / "real.pth"
    model = prune(random_model("gateresnet20"), random_plan(random_model("gateresnet20"), 1, 0.2))
    save_checkpoint(path, model, classes=list("abcdefghij"), accuracy=12.5, training={"epoch": 3})
    return path.read_bytes(), torch.load(path, weights_only=True), model


def ends_well(path, model) -> bool:
    """Whether loading refuses in one line that names the file (True) or is exact (False)."""
    try:
        loaded = load_checkpoint(path).model
    except InputError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return True
    assert loaded.kept == model.kept and loaded.num_classes == model.num_classes
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    return False


def test_truncations_are_refused(tmp_path, original):
    data, _, model = original
    stream, path = random.Random(0), tmp_path / "cut.pth"
    for length in [0, 1, 10, len(data) - 1] + [stream.randrange(len(data)) for _ in range(96)]:
        path.write_bytes(data[:length])
        assert ends_well(path, model), length


def test_flipped_bits_are_refused_or_harmless(tmp_path, original):
    data, _, model = original
    stream, path, refused = random.Random(1), tmp_path / "flipped.pth", 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(stream.choice([1, 1, 1, 2, 8])):
            damaged[stream.randrange(len(data))] ^= 1 << stream.randrange(8)
        path.write_bytes(damaged)
        refused += ends_well(path, model)
    assert refused > 150


def mutations(content, stream):
    """Changed contents, each with what a careless or hostile writer may do."""
    state = content["state_dict"]
    for name in stream.sample(sorted(state), 30):
        yield {**content, "state_dict": {k: v for k, v in state.items() if k != name}}
        yield {
            **content,
            "state_dict": {(k + "x" if k == name else k): v for k, v in state.items()},
        }
        wrong = state[name].new_zeros((*state[name].shape, 2))
        yield {**content, "state_dict": {**state, name: wrong}}
    for key in ("format", "network", "state_dict", "sha256"):
        yield {k: v for k, v in content.items() if k != key}
        for value in (None, 3, "x", [], {}):
            yield {**content, key: value}
    for key, values in {
        "net": [None, "gatevgg16", "gateresnet56", "magic", 3, []],
        "num_classes": [None, 0, -1, 11, 10**12, "ten", 2.5],
        "kept": [None, [], {"gate1": []}, {"gate1": [0, 99]}, {"gate1": [1, 0]}, {"gate9": [0]}],
    }.items():
        yield {**content, "network": {k: v for k, v in content["network"].items() if k != key}}
        for value in values:
            yield {**content, "network": {**content["network"], key: value}}


@pytest.mark.parametrize("signed", [False, True])
def test_changed_contents_are_refused(tmp_path, original, signed):
    """Also where the checksum was made to fit."""
    _, content, model = original
    path, count = tmp_path / "changed.pth", 0
    for changed in mutations(copy.deepcopy(content), random.Random(2)):
        if signed and "sha256" in changed:
            body = {key: value for key, value in changed.items() if key != "sha256"}
            changed = {**body, "sha256": checksum(body)}
        torch.save(changed, path)
        if not ends_well(path, model):
            assert signed or checksum(changed) == checksum(content), changed.keys()
        count += 1
    assert count > 120


class Hostile:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


def test_pickles_that_would_run_code_do_not(tmp_path, original, monkeypatch):
    _, content, model = original
    monkeypatch.chdir(tmp_path)
    calls = [
        Hostile(os.mkdir, "ran"),
        Hostile(os.system, "mkdir ran"),
        Hostile(eval, "open('ran', 'w')"),
        Hostile(exec, "import os; os.mkdir('ran')"),
        Hostile(subprocess.call, ["mkdir", "ran"]),
    ]
    for call in calls:
        for legacy in (False, True):
            for place in ("training", "network", "state_dict", "new"):
                file = io.BytesIO()
                torch.save(
                    {**content, place: call}, file, _use_new_zipfile_serialization=not legacy
                )
                (tmp_path / "hostile.pth").write_bytes(file.getvalue())
                assert ends_well(tmp_path / "hostile.pth", model)
    assert not (tmp_path / "ran").exists()
