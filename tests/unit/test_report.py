"""The report of a run: what is read, what follows from it, and what is written."""

import base64
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from made_runs import (
    CARD,
    UTC,
    Made,
    fit,
    fit_line,
    metrics_line,
    records,
    run_folder,
    sample,
    start,
    write_lines,
)
from PIL import Image
from typer.testing import CliRunner

from fedhpc import files, report
from fedhpc.federation import grid_pb2
from fedhpc.federation.recorder import Recorder
from fedhpc.federation.transport import Response
from fedhpc.paths import RunPaths
from fedhpc.report import evidence, figures, page, summary, tables, tracks
from fedhpc.report.tracks import Track


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(report.app, [str(value) for value in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def as_json(*arguments: object) -> dict[str, Any]:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    value: dict[str, Any] = json.loads(result.stdout, parse_constant=refuse)
    return value


def put(paths: RunPaths, *made: Made, rounds: int = 3) -> RunPaths:
    """Write records, of one array task after the other, into a run folder."""
    by_file: dict[int, list[dict[str, Any]]] = {}
    for one in made:
        by_file.setdefault(one.memory[0]["array_task"], []).extend(one.memory)
    for array_task, lines in by_file.items():
        write_lines(paths.memory_of(array_task), lines)
    write_lines(paths.fits, [line for one in made for line in one.fits])
    losses = [metrics_line(number, 0.3 * number, 2.0 / number) for number in range(1, rounds + 1)]
    write_lines(paths.metrics, losses)
    return paths


def built(paths: RunPaths) -> list[Track]:
    return tracks.build(evidence.read(paths))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def empty(runs: Path) -> RunPaths:
    return run_folder(runs)


# --- reading ---


def test_a_requeued_array_task_is_two_segments_on_one_axis_of_time(empty: RunPaths) -> None:
    write_lines(
        empty.memory_of(0),
        [start(host="n1"), sample(1.0, 5.0), start(host="n2", utc=UTC + 60), sample(1.0, 6.0)],
    )
    segments = evidence.read(empty).segments
    assert [(one.host, one.samples[0].time_s - UTC) for one in segments] == [("n1", 1), ("n2", 61)]
    (track,) = built(empty)
    assert track.name == "array task 0 on n1, n2"
    assert [list(piece.mb) for piece in track.pieces] == [[5.0], [6.0]]


def test_a_last_line_that_was_cut_off_is_passed_over_in_silence(empty: RunPaths) -> None:
    write_lines(empty.memory_of(0), [start(), sample(1.0, 5.0)])
    with empty.memory_of(0).open("a") as file:
        file.write('{"kind": "sample", "time_s": 1.')
    seen = evidence.read(empty)
    assert len(seen.segments[0].samples) == 1
    assert seen.unreadable == {}


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
def test_the_start_line_behind_a_line_that_was_cut_off_is_found(
    empty: RunPaths, separators: tuple[str, str]
) -> None:
    lines = [start(), sample(1.0, 5.0), start(utc=UTC + 9), sample(2.0, 6.0)]
    first, cut, second, last = (json.dumps(line, separators=separators) for line in lines)
    empty.memory.mkdir()
    empty.memory_of(0).write_text(f"{first}\n{cut[:25]}{second}\n{last}\n")
    seen = evidence.read(empty)
    assert [one.utc_s - UTC for one in seen.segments] == [0, 9]
    assert [len(one.samples) for one in seen.segments] == [0, 1]
    assert seen.unreadable == {"memory/0.jsonl": 1}


def test_garbage_is_counted_and_unknown_keys_and_kinds_are_not(empty: RunPaths) -> None:
    lines = [
        sample(0.5, 1.0),  # before any start: at which time was this?
        start(novelty=1),
        {**sample(1.0, 5.0), "novelty": [1]},
        {"kind": "sample", "time_s": "soon", "running": 0},
        {"kind": "sample", "time_s": None, "running": 0},
        {"kind": "something new"},
        {"kind": "fit", "client": 1},
    ]
    write_lines(empty.memory_of(0), lines)
    with empty.memory_of(0).open("a") as file:
        file.write("[1]\nnull\nnonsense\n\x00\n")
    seen = evidence.read(empty)
    assert len(seen.segments[0].samples) == 1
    assert seen.unreadable["memory/0.jsonl"] == 8
    assert any("8 lines could not be read" in note for note in as_json(empty.root)["notes"])


def test_values_that_are_not_known_are_left_out(empty: RunPaths) -> None:
    bare = fit(1.0, 2.0, peak=None) | {"before_mb": None, "after_mb": None, "gpu": None}
    lines = [start(), sample(0.5, None), sample(1.5, 7.0, running=1), bare, fit(2, 3, peak=9.0)]
    write_lines(empty.memory_of(0), lines)
    (track,) = built(empty)
    assert list(track.pieces[0].mb) == [7.0]
    found = tracks.figures_of(track)
    assert (found["fits"], found["peak_mb"], found["fit_peak_mb"]) == (2, 7.0, 9.0)
    assert found["idle_mb"] is None
    assert found["slope_mb_per_100_fits"] is None
    assert call(empty.root).exit_code == 0


# --- what follows from it ---


def series(paths: RunPaths, *, left_mb: float, fits: int = 10, gpu: str | None = None) -> Track:
    """Write a run that is idle after each of its fits, which leave ``left_mb`` each."""
    lines = [start(gpus=1 if gpu else 0), sample(0.5, 100.0, gpu=gpu)]
    for number in range(fits):
        began = 10.0 * number + 1
        lines += [
            sample(began + 1, 900.0, running=1, gpu=gpu),
            fit(began, began + 5, client=number, gpu=gpu),
            *(sample(began + 5 + k, 110.0 + left_mb * number, gpu=gpu) for k in range(4)),
        ]
    write_lines(paths.memory_of(0), lines)
    (track,) = built(paths)
    return track


@pytest.mark.parametrize("gpu", [None, "GPU-n1-0"])
def test_the_slope_of_a_known_series_is_found(empty: RunPaths, gpu: str | None) -> None:
    found = tracks.figures_of(series(empty, left_mb=2.5, gpu=gpu))
    assert found["slope_mb_per_100_fits"] == pytest.approx(250.0)
    assert found["idle_moments"] == 11
    assert found["idle_before_mb"] == 100.0
    assert found["idle_after_first_mb"] == 110.0
    assert found["idle_after_last_mb"] == 132.5
    assert found["idle_mb"] == pytest.approx(np.median([100, *(110 + 2.5 * np.arange(10))]))
    assert found["fit_s"] == pytest.approx(5.0)
    assert found["peak_mb"] == 900.0


def test_memory_that_comes_back_has_no_slope(empty: RunPaths) -> None:
    found = tracks.figures_of(series(empty, left_mb=0.0))
    assert found["slope_mb_per_100_fits"] == 0.0
    assert tables.slope(found) == "0.0"
    assert tables.slope({"slope_mb_per_100_fits": -0.001}) == "0.0"


def test_a_slope_is_not_invented_from_two_moments(empty: RunPaths) -> None:
    found = tracks.figures_of(series(empty, left_mb=50.0, fits=2))
    assert found["slope_mb_per_100_fits"] is None
    assert tables.slope(found) == tables.NOT_ENOUGH
    assert tables.NOT_ENOUGH in call(empty.root).stdout
    assert tables.NOT_ENOUGH in empty.report.read_text()


def test_an_idle_moment_counts_once_however_long_it_was(empty: RunPaths) -> None:
    waiting = [sample(0.1 * k, 500.0) for k in range(1000)]
    lines = [start(), *waiting]
    for number in range(3):
        at = 200.0 + 10 * number
        lines += [fit(at, at + 5), sample(at + 2, 900.0, running=1), sample(at + 6, 20.0)]
    write_lines(empty.memory_of(0), lines)
    (track,) = built(empty)
    assert tracks.figures_of(track)["idle_mb"] == 20.0


def test_a_fit_that_ends_a_moment_after_the_idle_sample_has_ended(empty: RunPaths) -> None:
    lines = [start(), fit(1.0, 2.001), sample(2.0, 8.0), sample(2.5, 9.0)]
    write_lines(empty.memory_of(0), lines)
    (track,) = built(empty)
    moments = tracks.idle_moments(track)
    assert (list(moments.fits), list(moments.mb)) == ([1], [8.5])


def test_a_gpu_of_two_array_tasks_is_idle_only_when_both_are(empty: RunPaths) -> None:
    gpu = "GPU-n1-0"
    for array_task, (began, ended) in enumerate([(1.0, 4.0), (3.0, 8.0)]):
        moments = [sample(t, 10.0 * t, running=int(began <= t < ended), gpu=gpu)
                   for t in np.arange(0.5, 10.0)]  # fmt: skip
        lines = [start(array_task, gpus=1), *moments, fit(began, ended, gpu=gpu)]
        write_lines(empty.memory_of(array_task), lines)
    (track,) = built(empty)
    assert track.array_tasks == [0, 1]
    assert [list(piece.mb[piece.idle]) for piece in track.pieces] == [[5, 85, 95], [5, 85, 95]]


def test_each_gpu_has_its_own_fits_and_memory(empty: RunPaths) -> None:
    put(empty, records(0, gpus=2, slots=4, rounds=2), records(1, gpus=1, host="n2", rounds=2))
    rows = as_json(empty.root)["memory"]
    assert [row["name"] for row in rows] == [
        "GPU-n1-0 on n1", "GPU-n1-1 on n1", "GPU-n2-0 on n2",
    ]  # fmt: skip
    assert {row["card"] for row in rows} == {CARD}
    assert rows[0]["fits"] + rows[1]["fits"] == rows[2]["fits"] == 2 * 2 * 6
    assert [row["wait_s"] for row in rows] == [0.25] * 3


def test_an_array_task_that_moved_has_a_track_a_gpu(empty: RunPaths) -> None:
    put(
        empty,
        records(0, gpus=1, host="n1", rounds=2),
        records(0, gpus=1, host="n2", rounds=2, first_round=3, utc=UTC + 100),
    )
    first, second = as_json(empty.root)["memory"]
    assert (first["name"], second["name"]) == ("GPU-n1-0 on n1", "GPU-n2-0 on n2")
    assert first["fits"] == second["fits"] == 24


def test_thinning_keeps_every_extreme_and_both_ends() -> None:
    random = np.random.default_rng(1)
    times = np.sort(random.uniform(0, 100, 100_000))
    values = random.normal(size=100_000)
    values[[777, 54_321]] = [50.0, -50.0]
    kept = tracks.thin(times, values, 500)
    assert len(kept) <= 2000
    assert {0, 777, 54_321, 99_999} <= set(kept)
    assert (np.diff(kept) > 0).all()
    bucket = np.minimum((times - times[0]) / (times[-1] - times[0]) * 500, 499).astype(int)
    for number in (0, 250, 499):
        inside = values[bucket == number]
        drawn = values[kept][bucket[kept] == number]
        assert (drawn.min(), drawn.max()) == (inside.min(), inside.max())
    assert list(tracks.thin(times[:5], values[:5], 500)) == [0, 1, 2, 3, 4]
    assert len(tracks.thin(np.zeros(5000), np.zeros(5000), 10)) == 5000


def test_metrics_of_a_server_that_began_again_are_those_of_the_last_time(empty: RunPaths) -> None:
    first = [metrics_line(number, 0.1, 9.0) for number in range(1, 6)]
    again = [metrics_line(number, 0.2 * number, 1.0) for number in range(1, 4)]
    write_lines(empty.metrics, first + again)
    found = summary.collect(empty)
    assert [line["round"] for line in found.rounds] == [1, 2, 3]
    assert {value for _, value in summary.curves(found.rounds)["loss"]["server, evaluation"]} == {1}


def test_an_apps_own_metrics_are_drawn_too() -> None:
    known = {"eval_acc": 0.5, "eval_loss": 1.0, "balanced_accuracy": 0.4, "num-examples": 9,
             "ok": True, "per_class": [0.1]}  # fmt: skip
    lines = [{"round": 1, "evaluate_clients": known}]
    assert summary.curves(lines) == {
        "accuracy": {
            "clients, evaluation": [(1, 0.5)],
            "clients, evaluation: balanced_accuracy": [(1, 0.4)],
        },
        "loss": {"clients, evaluation": [(1, 1.0)]},
    }
    lines = [{"round": 1, "evaluate": {"perplexity": 7.5, "num_examples": 3}}]
    assert summary.curves(lines) == {"perplexity": {"server, evaluation": [(1, 7.5)]}}


def test_the_reasons_why_processes_were_replaced_are_a_table(empty: RunPaths) -> None:
    fit = grid_pb2.Fit(replaced="threads 1 -> 3")
    response = Response("1-0-train-0", payload=grid_pb2.Payload(), fit=fit)
    recorder = Recorder(empty)
    recorder.fit_ended(response, 1, 0, "train")
    recorder.fit_ended(
        replace(response, fit=grid_pb2.Fit(replaced="threads 1 -> 4")), 1, 1, "train"
    )
    recorder.fit_ended(replace(response, fit=grid_pb2.Fit()), 1, 2, "train")
    recorder.write_fits()
    assert [line.get("replaced") for line in files.read_lines(empty.fits)] == [
        "threads 1 -> 3", "threads 1 -> 4", None,
    ]  # fmt: skip
    known = as_json(empty.root)
    assert known["replaced"] == [
        {"reason": "threads 1 -> 3", "count": 2, "clients": [0, 1], "rounds": [1]}
    ]
    assert "threads 1 -&gt; 3" in empty.report.read_text()
    shown = call(empty.root).stdout
    assert "replaced because" in shown
    assert "threads 1 -> 3" in shown


def test_failures_that_differ_in_numbers_only_are_one_group(empty: RunPaths) -> None:
    lines = [
        fit_line(0, k, 1 + k % 2, ok=False, reason=f"killed by SIGKILL, pid {k}") for k in range(9)
    ]
    write_lines(empty.fits, [*lines, fit_line(0, 9, 1), fit_line(0, 3, 3, ok=False, reason="<b>")])
    known = as_json(empty.root)
    assert [(one["count"], one["reason"]) for one in known["failures"]] == [
        (9, "killed by SIGKILL, pid 0"), (1, "<b>"),
    ]  # fmt: skip
    assert known["failures"][0]["clients"] == list(range(9))
    assert known["fits_failed"] == 10
    assert "&lt;b&gt;" in empty.report.read_text()
    assert "0 to 8" in call(empty.root).stdout


# --- what is written ---


def images(html: str) -> list[Image.Image]:
    coded = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in coded]


def test_the_page_needs_nothing_else_and_says_what_matters(runs: Path) -> None:
    paths = put(run_folder(runs, state="failed", reason="the server was <lost>"), records(fails=5))
    versions = {"torch": "2.15.0", "flwr": "1.41.0"}
    files.write_json(
        paths.manifest,
        {"fedhpc": "0.1.0", "python": "3.11.7", "packages": versions, "git": "1c77-dirty"},
    )
    result = call(paths.root)
    assert result.exit_code == 0, result.stderr
    html = paths.report.read_text()
    without = re.sub(r'"data:image/png;base64,[^"]+"', '"here"', html)
    assert re.findall(r"https?:|<script|<link|@import|url\(", without) == []
    assert set(re.findall(r'src="([^"]*)"', without)) == {"here"}
    for said in ("isolation: failed", paths.run_id, "the server was &lt;lost&gt;", "3 of 10",
                 "accuracy 0.9000", "cifar10, split by dirichlet (alpha 0.5)", "FedAvg",
                 "ValueError: batch 5 is empty", "2.15.0", "1c77-dirty", "MB per 100 fits",
                 figures.CPU_RUN[1:]):  # fmt: skip
        assert said in html, said
    assert [image.format for image in images(html)] == ["PNG", "PNG"]
    for text in re.findall(r'alt="([^"]*)"', html):
        assert len(text) > 20


def test_the_figures_are_files_too(empty: RunPaths) -> None:
    put(empty, records())
    known = as_json(empty.root)
    names = ["memory.png", "memory.svg", "learning.png", "learning.svg"]
    assert [Path(name).name for name in known["figures"]] == names
    assert known["report"] == str(empty.report)
    for name in names:
        path = empty.figures / name
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 1000
                image.verify()
        else:
            assert "<svg" in path.read_text()
    assert [path.name for path in empty.root.glob(".*")] == []


def test_json_has_all_figures_and_no_nan(empty: RunPaths) -> None:
    put(empty, records(kept_mb=10.0))
    write_lines(empty.metrics, [metrics_line(1, 0.5, float("nan"))])
    known = as_json(empty.root)
    assert (known["run"], known["state"], known["name"]) == (empty.run_id, "finished", "isolation")
    assert (known["rounds"], known["num_rounds"], known["fits"]) == (1, 10, 96)
    assert known["metrics"] == {"loss": None, "accuracy": 0.5}
    (row,) = known["memory"]
    assert row["slope_mb_per_100_fits"] == pytest.approx(1000.0, rel=0.01)
    assert row["idle_after_last_mb"] == pytest.approx(3.0 + 960)
    assert known["notes"] == []


def test_a_cpu_run_is_not_called_a_gpu_run(runs: Path) -> None:
    cpu, gpu = put(run_folder(runs), records()), put(run_folder(runs), records(gpus=1))
    assert "no GPU was used" in call(cpu.root).stdout
    said = call(gpu.root).stdout
    assert "no GPU was used" not in said
    assert "GPU memory in use on the device" in said


def test_a_gpu_run_without_samples_of_its_gpu_says_so(empty: RunPaths) -> None:
    lines = [start(gpus=0, device="cuda"), sample(1.0, 5.0), fit(1, 2)]
    write_lines(empty.memory_of(0), lines)
    known = as_json(empty.root)
    assert any("no samples of its memory" in note for note in known["notes"])
    assert known["memory"][0]["kind"] == "children"
    assert "no GPU was used" not in empty.report.read_text()


def test_an_old_run_folder_has_a_report_of_the_rest(empty: RunPaths) -> None:
    write_lines(empty.fits, [fit_line(1, 0, 1, run_s=2.0), fit_line(0, 1, 1, ok=False)])
    write_lines(empty.metrics, [metrics_line(1, 0.5, 1.0)])
    result = call(empty.root)
    assert result.exit_code == 0
    assert "there is no memory/ in the run folder" in result.stdout
    known = as_json(empty.root)
    assert [Path(name).name for name in known["figures"]] == ["learning.png", "learning.svg"]
    first, second = known["memory"]
    assert (first["name"], first["failed"], first["peak_mb"]) == ("array task 0 on n1", 1, None)
    assert (second["fit_s"], second["run_s"]) == (pytest.approx(2.06), 2.0)
    html = empty.report.read_text()
    assert "there is no memory/" in html
    assert "Memory in numbers" not in html
    assert "Seconds of a fit" in html


def test_a_run_without_anything_has_a_page(runs: Path) -> None:
    paths = run_folder(runs, state="cancelled")
    result = call(paths.root)
    assert result.exit_code == 0
    assert "there is no fit in fits.jsonl yet" in result.stdout
    assert "No fits are known" in paths.report.read_text()
    (paths.memory).mkdir()
    paths.manifest.write_text("half a man")
    paths.config.write_text("name: [")
    assert any("no samples" in note for note in as_json(paths.root)["notes"])


def test_a_run_that_goes_on_has_a_report_so_far(runs: Path) -> None:
    paths = put(run_folder(runs, state="running", round=3, num_rounds=10), records(rounds=3))
    assert call(paths.root).exit_code == 0
    assert "The run had not ended then." in paths.report.read_text()


def test_an_array_task_without_samples_still_has_its_fits(empty: RunPaths) -> None:
    put(empty, records(0, rounds=2), records(1, rounds=2))
    empty.memory_of(1).unlink()
    first, second = as_json(empty.root)["memory"]
    assert (first["kind"], second["kind"]) == ("children", "unknown")
    assert first["fits"] == second["fits"] == 24


def test_with_many_array_tasks_the_highest_are_drawn_and_the_rest_is_named(
    empty: RunPaths,
) -> None:
    made = [records(k, rounds=1, fits_a_round=2, fit_mb=400.0 - 10 * k) for k in range(20)]
    put(empty, *made)
    found = summary.collect(empty)
    assert [track.array_tasks for track in figures.chosen(found.tracks)] == [[k] for k in range(8)]
    said = "Drawn are the 8 with the highest peaks; 12 more are left out (array tasks 8 to 19)"
    result = call(empty.root)
    assert said in result.stdout
    assert "and 4 rows more" in result.stdout
    assert said in empty.report.read_text()
    assert "array task 19 on n1" in empty.report.read_text()


def test_a_hundred_thousand_samples_and_ten_thousand_fits_are_drawn(empty: RunPaths) -> None:
    lines = [start()]
    lines += [sample(0.1 * k, 50.0 * (k % 9), running=int(k % 9 > 0)) for k in range(100_000)]
    lines += [fit(k, k + 0.9, client=k % 50, round=k // 50, slot=k % 2) for k in range(10_000)]
    write_lines(empty.memory_of(0), lines)
    (row,) = as_json(empty.root)["memory"]
    assert (row["fits"], row["peak_mb"]) == (10_000, 400.0)
    assert empty.report.stat().st_size < 2_000_000
    assert (empty.figures / "memory.svg").stat().st_size < 2_000_000


def test_no_line_is_drawn_over_a_restart_or_a_pause(empty: RunPaths) -> None:
    times = [0.0, 0.5, 1.0, 30.0, 30.5]
    lines = [start(), *(sample(t, 5.0) for t in times), start(utc=UTC + 31), sample(0.5, 6.0)]
    write_lines(empty.memory_of(0), lines)
    figure = figures.memory(summary.collect(empty))
    assert figure is not None
    drawn = [line for line in figure.axes[1].lines if line.get_color() == figures._MEMORY]
    assert [list(line.get_xdata()) for line in drawn] == [[0, 0.5, 1.0], [30.0, 30.5], [31.5]]


def test_drawing_leaves_matplotlibs_global_state_alone(empty: RunPaths) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    sys.modules.pop("matplotlib.pyplot", None)
    put(empty, records(rounds=1))
    assert call(empty.root).exit_code == 0
    assert "matplotlib.pyplot" not in sys.modules
    assert dict(matplotlib.rcParams) == before


# --- the command ---


def test_the_newest_run_is_the_default(runs: Path) -> None:
    run_folder(runs)
    (runs / "other").mkdir()
    assert call("--runs-dir", runs).exit_code == 0
    assert len(list(runs.glob("*/report.html"))) == 1


def test_out_is_another_folder_and_leaves_the_run_folder_alone(
    empty: RunPaths, tmp_path: Path
) -> None:
    put(empty, records(rounds=1))
    before = sorted(empty.root.rglob("*"))
    known = as_json(empty.root, "--out", tmp_path / "deep" / "er")
    assert known["report"] == str(tmp_path / "deep" / "er" / "report.html")
    assert (tmp_path / "deep" / "er" / "figures" / "memory.png").is_file()
    assert sorted(empty.root.rglob("*")) == before


def test_out_that_is_a_file_is_an_error(empty: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = call(empty.root, "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "--out: expected a folder, found the file" in result.stderr


def test_a_folder_that_cannot_be_written_is_an_error_with_a_hint(
    empty: RunPaths, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = call(empty.root, "--out", tmp_path / "file" / "below")
    assert result.exit_code == 75
    assert "wanted to write a report into" in result.stderr
    assert "Hint: name a folder of your own with --out" in result.stderr


# --- two runs ---


def test_two_runs_beside_each_other_have_the_same_axes(runs: Path) -> None:
    kept = put(run_folder(runs, "kept"), records(gpus=1, kept_mb=100.0))
    ours = put(run_folder(runs, "isolation"), records(gpus=1, rounds=4))
    result = call(ours.root, "--beside", kept.root)
    assert result.exit_code == 0, result.stderr
    with Image.open(ours.figures / "beside.png") as image:
        image.verify()
    assert len(images(ours.report.read_text())) == 3
    assert not kept.report.exists()
    figure = figures.beside([summary.collect(ours), summary.collect(kept)])
    _, left, _, right = figure.axes
    del _
    assert left.get_ylim() == right.get_ylim()
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim()[1] > 96 * 100
    assert (left.get_title("left"), right.get_title("left")) == ("isolation", "kept")


def test_two_runs_of_one_name_are_told_apart(runs: Path) -> None:
    pair = [put(run_folder(runs), records(rounds=1)) for _ in range(2)]
    figure = figures.beside([summary.collect(paths) for paths in pair])
    titles = [axes.get_title("left") for axes in figure.axes[1::2]]
    assert titles == [paths.run_id for paths in pair]


def test_runs_that_cannot_be_compared_are_an_error_and_nothing_is_written(runs: Path) -> None:
    cpu = put(run_folder(runs), records(rounds=1))
    gpu = put(run_folder(runs), records(rounds=1, gpus=1))
    old = run_folder(runs)
    result = call(cpu.root, "--beside", gpu.root)
    assert result.exit_code == 2
    assert "found memory of processes and GPU memory" in result.stderr
    result = call(cpu.root, "--beside", old.root)
    assert result.exit_code == 2
    assert f"expected two runs with samples in memory/, found none in {old.root}" in result.stderr
    assert call(cpu.root, "--beside", runs / "nowhere").exit_code == 2
    assert not cpu.report.exists()
    assert not cpu.figures.exists()


def test_the_page_of_a_run_can_be_made_without_any_figure(empty: RunPaths) -> None:
    html = page.build(summary.collect(empty), [])
    assert html.startswith("<!DOCTYPE html>")
    assert "<img" not in html
