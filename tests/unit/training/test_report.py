"""Curves from TensorBoard, the picture and the summary line."""

from pathlib import Path

from megatron_k2.training.report import Summary, plot_losses, read_scalars


def write_events(folder: Path, values: dict[int, float], wall_time: float) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, value in values.items():
            writer.add_scalar("lm loss", value, step, walltime=wall_time + step)


def test_a_resumed_run_keeps_the_later_value_of_a_step(tmp_path):
    write_events(tmp_path, {1: 5.0, 2: 4.0, 3: 9.0}, wall_time=100.0)
    write_events(tmp_path, {3: 3.0, 4: 2.0}, wall_time=200.0)
    assert read_scalars(tmp_path, "lm loss") == {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}
    assert read_scalars(tmp_path, "no such tag") == {}


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "loss.png"
    plot_losses(path, {1: 8.0, 2: 6.0}, {0: 8.3, 2: 6.1}, 6.0, 4.5, "title")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_the_summary_is_one_line_with_every_figure():
    summary = Summary(100, 409_600, 8.37, 4.8, 6.0, 4.5, 1.9, 2345.6)
    line = summary.line(Path("out/pretrain"))
    assert "\n" not in line
    for part in (
        "8.370 -> 4.800",
        "1.20 below a unigram (6.000",
        "bigram 4.500",
        "1.900 bits/byte",
    ):
        assert part in line
    for part in ("409,600 tokens at 2,346/s", "loss.png", "tensorboard", "in out/pretrain"):
        assert part in line
