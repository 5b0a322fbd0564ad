"""What TensorBoard shows of a run, and what happens when its files cannot be written."""

from __future__ import annotations

import errno
import io
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import one_run, run_gfbs, run_train
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData


def test_tensorboard_shows_what_a_run_was_and_what_came_out(trained):
    result = run_gfbs("--p", "0.5", "--w_beta", "0.1")
    logdir = one_run("checkpoints/runs/gateresnet20_folder", "gfbs_p0.5_seed1")
    board = EventAccumulator(str(logdir), size_guidance={"histograms": 0}).Reload()
    tags = board.Tags()
    assert all(f"saliency/{name}" in tags["histograms"] for name in result["channels"])
    [drawn] = board.Images("channels")
    figure = np.asarray(Image.open(io.BytesIO(drawn.encoded_image_string))).astype(int)
    filled = (np.abs(figure - ImageColor.getrgb("steelblue")).sum(2) == 0).sum(1)
    empty = (np.abs(figure - ImageColor.getrgb("lightgrey")).sum(2) == 0).sum(1)
    rows = len(figure) // len(result["channels"])
    for middle, channels in zip(
        range(rows // 2, len(figure), rows), result["channels"].values(), strict=True
    ):
        share = filled[middle] / (filled[middle] + empty[middle])
        assert share == pytest.approx(channels["after"] / channels["before"], abs=0.01)
    assert not any(tag.startswith("channels/") for tag in tags["scalars"])
    texts = {
        tag: board.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]
    }
    assert "| w_beta | 0.1 |" in texts["configuration/text_summary"]
    last = board.Scalars("result/accuracy/last")[0].value
    assert last == pytest.approx(result["accuracy"]["last"], abs=1e-4)
    assert board.Scalars("result/macs")[0].value == pytest.approx(result["cost"]["macs"]["after"])
    assert "_hparams_/session_start_info" in board.summary_metadata
    written = board.summary_metadata["_hparams_/experiment"].plugin_data.content
    columns = HParamsPluginData.FromString(written).experiment.hparam_infos
    assert {"bs", "w_beta", "epochs"} < {column.name for column in columns}


def test_hparams_show_network_criterion_goal_and_seed_first(trained):
    """As TensorBoard's own back end makes the table, from a baseline and two pruning runs."""
    run_train("--output", "all")
    run_gfbs("--p", "0.5", "--epochs", "0", "--checkpoint", "all", "--output", "all")
    run_gfbs("--macs", "0.5", "--epochs", "0", "--checkpoint", "all", "--output", "all")
    board = EventMultiplexer().AddRunsFromDirectory("all/runs").Reload()
    provider = MultiplexerDataProvider(board, "all/runs")
    backend = Context(TBContext(logdir="all/runs", data_provider=provider))
    tags = backend.hparams_metadata(RequestContext(), "")
    assert len(tags) == 3 and all("_hparams_/session_start_info" in run for run in tags.values())
    columns = backend.experiment_from_metadata(RequestContext(), "", True, tags, [])
    names = [column.name for column in columns.hparam_infos]
    assert names[:7] == ["criterion", "latency", "macs", "net", "p", "params", "seed"]
    assert {"bs", "w_beta", "epochs"} < {*names}
    shown = [metric.name.tag for metric in columns.metric_infos]
    assert "result/accuracy/baseline" in shown and "result/macs" in shown


def test_what_cannot_be_drawn_is_no_failure_to_score(trained, monkeypatch, capsys):
    def fails(*args, **options):
        raise ValueError("The histogram is empty, please file a bug report.")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_histogram", fails)
    assert run_gfbs("--p", "0.5")["accuracy"]["last"] is not None
    assert "warning: no more TensorBoard files" in capsys.readouterr().out


@pytest.mark.parametrize("writes", [1, 8])
def test_tensorboard_without_a_disk_costs_one_line(place, monkeypatch, capfd, writes):
    count = iter(range(writes))

    def full(self, data):
        if next(count, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    threading.excepthook, usual = threading.__excepthook__, threading.excepthook
    try:
        run_train("--epochs", "1")
        assert threading.excepthook is threading.__excepthook__
    finally:
        threading.excepthook = usual
    shown = capfd.readouterr()
    assert shown.out.count("warning: no more TensorBoard files") == 1
    assert "Exception" not in shown.err and "Traceback" not in shown.err
    assert list(Path("checkpoints").glob("*/result.json"))
