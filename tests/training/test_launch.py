"""Two processes over gloo, started in each of the ways; and what is refused before they start."""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist
from detectron2.config import LazyConfig
from omegaconf import DictConfig

from mask_rcnn_plugin.config import ConfigError, get_config
from mask_rcnn_plugin.training import launch
from mask_rcnn_plugin.training.placement import ALONE, Placement, first_host, placement_from
from mask_rcnn_plugin.training.preemption import EXIT_CODE, SIGNALS

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
PATIENCE = 120  # seconds, for what takes a few
CONFIG = ["--config-file", "table4_keypoints/keypoint_and_mask+synthetic"]
# Not the machine's name, which it may not know.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--local-addr", "localhost"]
STEP = {
    "SLURM_JOB_ID": "20123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
ELASTIC = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1234",
}


def run_together(*commands: list[str], env: list[dict[str, str]] | None = None) -> list[str]:
    """Run programs at the same time, to a good end; their standard output."""
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, more in zip(commands, env or [{}] * len(commands))
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, outputs):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


def first_images(toy_dataset: Path, folder: Path, images: int) -> list[str]:
    """Overrides that test on the first images of the toy dataset."""
    content = json.loads((toy_dataset / "person_keypoints_val.json").read_text())
    content["images"] = content["images"][:images]
    ids = [image["id"] for image in content["images"]]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    file = folder / f"first_{images}.json"
    file.write_text(json.dumps(content))
    return [f"dataset.test.json={file}", f"dataset.test.images={toy_dataset / 'val'}"]


def spawn_twice(args: list[str]) -> list[str]:
    return [sys.executable, str(HERE / "launched.py"), *args, "--num-gpus", "2"]


@pytest.fixture(scope="module")
def toy(toy_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training of two steps, tested on 3 images, which 2 processes cannot share equally."""
    return [
        *(*CONFIG, f"dataset.synthetic.root={toy_dataset}", "train.device=cpu", "train.max_iter=2"),
        *("dataset.synthetic.train=12", "dataset.synthetic.val=6", "dataset.synthetic.size=64"),
        *("dataloader.train.total_batch_size=2", "train.channels_last=false"),
        "model.roi_heads.box_predictor.test_score_thresh=0",  # after 2 iterations
        *first_images(toy_dataset, tmp_path_factory.mktemp("three"), 3),
    ]


@pytest.fixture(scope="module")
def spawned(toy: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Output folder and standard output of the training in two spawned processes."""
    folder = tmp_path_factory.mktemp("spawned")
    [output] = run_together(spawn_twice([*toy, f"train.output_dir={folder}"]))
    return folder, output


def ranks(folder: Path) -> list[list[Any]]:
    return json.loads((folder / "ranks.json").read_text())


def test_spawned_processes_end_with_equal_weights(spawned: tuple[Path, str]) -> None:
    folder, output = spawned
    (first, machine, digest), (second, other_machine, other_digest) = ranks(folder)
    assert (first, second, machine, other_machine) == (0, 1, 0, 0)
    assert digest == other_digest
    [line] = [line for line in output.splitlines() if "train.process_group_timeout" in line]
    for part in ("2 processes", f"2 on {socket.gethostname()}", "device cpu", "gloo", "30 minutes"):
        assert part in line


def test_torchrun_trains_as_spawned_processes_do(
    spawned: tuple[Path, str], toy: list[str], tmp_path: Path
) -> None:
    """Even if one of the processes is lost at first, and torchrun starts all again."""
    script = [str(HERE / "launched.py"), *toy, f"train.output_dir={tmp_path}"]
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    run_together([*torchrun, *script], env=[{"LOSE_RANK_1": "1"}])
    assert ranks(tmp_path) == ranks(spawned[0])


def test_two_nodes_train_as_spawned_processes_do(
    spawned: tuple[Path, str], toy: list[str], tmp_path: Path
) -> None:
    """Two agents of torchrun with a process each, and one rendezvous."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agent = [
        *(*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "test"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{store.port}"),
        *("--rdzv-conf", "is_host=false"),
        *(str(HERE / "launched.py"), *toy, f"train.output_dir={tmp_path}"),
    ]
    run_together(agent, agent)
    digest = ranks(spawned[0])[0][2]
    assert ranks(tmp_path) == [[0, 0, digest], [0, 1, digest]]


def test_srun_trains_as_spawned_processes_do(
    spawned: tuple[Path, str], toy: list[str], tmp_path: Path
) -> None:
    with_port = {**STEP, "MASTER_PORT": str(free_port())}
    tasks = [{**with_port, "SLURM_PROCID": n, "SLURM_LOCALID": n} for n in ("0", "1")]
    script = [sys.executable, str(HERE / "launched.py"), *toy, f"train.output_dir={tmp_path}"]
    run_together(script, script, env=tasks)
    assert ranks(tmp_path) == ranks(spawned[0])


def free_port() -> int:
    """Below those that the system gives away, and no other worker's."""
    first = 15_000 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in range(first, first + 100):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("", port))
            return port
    pytest.fail("no port is free")


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Numbers and predictions of an evaluation, but for the time that it took."""
    numbers = json.loads((folder / "results.json").read_text())
    del numbers["ms_per_image"]
    predictions = json.loads((folder / "coco_instances_results.json").read_text())
    assert predictions
    return numbers, predictions


def evaluate_alone(monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *args])
    runpy.run_path(str(REPOSITORY / "eval.py"), run_name="__main__")


def test_evaluation_while_training_is_that_of_one_process(
    spawned: tuple[Path, str], toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the weights saved: batch norm's running statistics are the first rank's for all."""
    weights = ["--weights", str(spawned[0] / "model_final.pth"), "--no-optimize"]
    evaluate_alone(monkeypatch, [*toy, *weights, "--output", str(tmp_path)])
    assert results(tmp_path) == results(spawned[0])


def test_evaluation_of_fewer_images_than_processes_is_that_of_one_process(
    spawned: tuple[Path, str],
    toy: list[str],
    toy_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = [
        *(*toy, "--weights", str(spawned[0] / "model_final.pth"), "--visualize", "1"),
        *first_images(toy_dataset, tmp_path, 1),
    ]
    script = [sys.executable, str(REPOSITORY / "eval.py")]
    [output] = run_together([*script, *args, "--num-gpus", "2", "--output", str(tmp_path / "two")])
    assert output.count("computed by ") == 1
    evaluate_alone(monkeypatch, [*args, "--output", str(tmp_path / "one")])
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert len(list((tmp_path / "two" / "pictures").iterdir())) == 1


@pytest.fixture(scope="module")
def launched() -> Iterator[ModuleType]:
    """launched.py as a module that other processes can import too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield importlib.import_module("launched")


def spawn(run: launch.Run) -> int | str | None:
    """The exit code."""
    args = argparse.Namespace(
        config=CONFIG[1], overrides=["train.device=cpu"], num_gpus=2, placement=None
    )
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as end:
            launch.run_program(args, importlib.import_module("launched").prepare_nothing, run)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return end.value.code


def test_spawned_processes_start_their_workers_as_any_other_does(launched: ModuleType) -> None:
    methods = multiprocessing.get_all_start_methods()
    expected = 10 + methods.index(multiprocessing.get_start_method())
    assert spawn(launched.end_with_the_start_method) == expected


def test_a_mistake_of_one_rank_ends_all_and_is_told_once(
    launched: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 1 waits for it in a barrier."""
    assert spawn(launched.mistake_of_rank_0) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert line.endswith(": rank 0 cannot go on")


def test_a_signal_reaches_the_spawned_processes_and_their_exit_code_comes_back(
    launched: ModuleType,
) -> None:
    """A second one, while they end, changes nothing."""
    assert spawn(launched.end_with_75_at_sigterm) == 75


class Ranks:
    """Two processes that run something together, and what they print as errors."""

    def __init__(self, folder: Path, overrides: list[str], *steps: launch.Run) -> None:
        self._folder = folder
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context: Any = multiprocessing.get_context("forkserver")
        target = importlib.import_module("launched").run_rank
        given = (self._store.port, str(folder), overrides, *steps)
        self.processes = [context.Process(target=target, args=(r, *given)) for r in range(2)]
        for rank, process in enumerate(self.processes):
            (folder / f"rank{rank}").touch()
            process.start()

    def exit_code(self, rank: int) -> int | None:
        self.processes[rank].join(PATIENCE)
        return self.processes[rank].exitcode

    def errors(self, rank: int) -> str:
        return (self._folder / f"rank{rank}").read_text()

    def lines(self) -> list[str]:
        """Of both, when they have ended with exit code 2."""
        assert [self.exit_code(rank) for rank in range(2)] == [2, 2]
        return (self.errors(0) + self.errors(1)).splitlines()


@pytest.fixture
def together(launched: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Starts `Ranks`, from a prepare and a run; they are ended with the test."""
    started: list[Ranks] = []

    def start(*steps: launch.Run, overrides: Sequence[str] = ("train.device=cpu",)) -> Ranks:
        started.append(Ranks(tmp_path, list(overrides), *steps))
        return started[-1]

    yield start
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()
        process.join()


@pytest.mark.parametrize("mistake", ["mistake_of_rank_1", "late_mistake_of_rank_1"])
def test_a_mistake_in_preparation_keeps_all_from_running(
    mistake: str, launched: ModuleType, together: Callable[..., Ranks]
) -> None:
    """Also where the other rank waits for the one that has made it, or has prepared already."""
    ranks = together(getattr(launched, mistake), launched.must_not_run)
    assert ranks.lines() == ["train.py: rank 1 cannot go on"]


def test_a_mistake_that_all_ranks_make_is_told_once(
    launched: ModuleType, together: Callable[..., Ranks]
) -> None:
    ranks = together(launched.prepare_nothing, launched.mistake_of_all)
    assert ranks.lines() == ["train.py: nobody can go on"]


def test_a_mistake_on_gpus_ends_its_rank_though_the_others_wait_for_it(
    launched: ModuleType, together: Callable[..., Ranks]
) -> None:
    """So that the launcher learns of it."""
    steps = launched.prepare_nothing, launched.mistake_that_rank_0_does_not_see
    ranks = together(*steps, overrides=["train.device=cuda", "train.amp.enabled=false"])
    assert ranks.exit_code(1) == 2
    assert ranks.errors(1).splitlines() == ["GPU 1", "train.py: rank 1 cannot go on"]


def test_a_mistake_in_the_config_is_told_once(
    launched: ModuleType, together: Callable[..., Ranks]
) -> None:
    steps = launched.prepare_nothing, launched.must_not_run
    [line] = together(*steps, overrides=["train.device=cpu", "train.nothing=1"]).lines()
    assert "train.nothing" in line


@pytest.mark.parametrize("wait", ["exchange_without_rank_1", "synchronize_without_rank_1"])
def test_no_wait_on_gpus_outlasts_the_time_out(
    wait: str, launched: ModuleType, together: Callable[..., Ranks]
) -> None:
    """detectron2's own group for the exchange of objects has 30 minutes."""
    overrides = ["train.device=cuda", "train.process_group_timeout=0.3", "train.amp.enabled=false"]
    ranks = together(launched.prepare_nothing, getattr(launched, wait), overrides=overrides)
    assert ranks.exit_code(0) == 1
    assert "longer than train.process_group_timeout, 0.3 minutes" in ranks.errors(0)
    assert [ranks.errors(rank).splitlines()[0] for rank in range(2)] == ["GPU 0", "GPU 1"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_first_rank_computes_ends_all_with_the_code(
    number: signal.Signals, launched: ModuleType, together: Callable[..., Ranks]
) -> None:
    ranks = together(launched.prepare_nothing, launched.evaluate_until_a_signal)
    for rank, process in enumerate(ranks.processes):
        for _ in range(10 * PATIENCE):
            if "evaluating" in ranks.errors(rank):
                break
            process.join(0.1)
    for process in reversed(ranks.processes):
        os.kill(process.pid, number)
    assert [ranks.exit_code(rank) for rank in range(2)] == [EXIT_CODE, EXIT_CODE]


def run_alone(run: Callable[..., None]) -> None:
    args = argparse.Namespace(config=CONFIG[1], overrides=["train.device=cpu"], num_gpus=None)
    launch._run(ALONE, lambda timeout: dist.HashStore(), args, lambda args, cfg: None, run)


def raising(error: Exception) -> Callable[..., None]:
    def run(args: argparse.Namespace, cfg: DictConfig) -> None:
        raise error

    return run


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_alone(raising(ZeroDivisionError()))


def test_a_time_out_names_the_key_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    gloo = RuntimeError("Timed out waiting 1800000ms for recv operation to complete")
    with pytest.raises(RuntimeError, match="longer than train.process_group_timeout, 30 minutes"):
        run_alone(raising(gloo))


def test_a_process_that_never_comes_is_not_waited_for_without_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = argparse.Namespace(
        config=CONFIG[1],
        overrides=["train.device=cpu", "train.process_group_timeout=0.02"],
        num_gpus=None,
        placement=Placement(0, 2, 0, 2, f"tcp://localhost:{free_port()}"),
    )
    with pytest.raises(SystemExit, match="2"):
        launch.run_program(args, lambda args, cfg: None, raising(AssertionError()))
    line = capsys.readouterr().err.splitlines()[-1]
    assert "rank 0 of 2 processes did not reach the others at tcp://localhost:" in line
    assert "within train.process_group_timeout, 0.02 minutes: " in line


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (ELASTIC, Placement(3, 4, 1, 2, "env://")),
        (STEP, Placement(1, 2, 1, 2, "tcp://localhost:10123")),
        ({**STEP, "MASTER_ADDR": "b", "MASTER_PORT": "9"}, Placement(1, 2, 1, 2, "tcp://b:9")),
        (
            {
                **STEP,
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
                "SLURM_STEP_NODELIST": "gpu[07-08]",
                "SLURM_PROCID": "9",
            },
            Placement(9, 16, 1, 8, "tcp://gpu07:10123"),
        ),
        ({**STEP, **ELASTIC}, Placement(3, 4, 1, 2, "env://")),
        # A batch script's or salloc's own shell, and one that is itself a step of one task.
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        ({**STEP, "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_placement(environment: dict[str, str], expected: Placement | None) -> None:
    assert placement_from(environment) == expected


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("localhost", "localhost"),
        ("gpu5,gpu6", "gpu5"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[2-3]n[01-04]-ib,other", "rack2n01-ib"),
        ("a-1.cluster.example", "a-1.cluster.example"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def parse(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], *args: str) -> None:
    """Parse a command line that is refused."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", *CONFIG, *args])
    with pytest.raises(SystemExit, match="2"):
        launch.parse_program_args(argparse.ArgumentParser())


@pytest.mark.parametrize(
    ("environment", "args", "message"),
    [
        (
            {"WORLD_SIZE": "8"},
            [],
            "WORLD_SIZE is set, but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, M",
        ),
        ({"RANK": "0"}, [], "RANK is set, but not WORLD_SIZE, LOCAL_RANK"),
        ({**ELASTIC, "RANK": "one"}, [], "RANK is 'one', must be a whole number"),
        ({**ELASTIC, "MASTER_PORT": ""}, [], "MASTER_PORT is '', must be a whole number"),
        ({**STEP, "SLURM_PROCID": "2"}, [], "SLURM_PROCID is 2, must be below the number of"),
        ({**ELASTIC, "RANK": "4"}, [], "RANK is 4, must be below the number of processes, 4"),
        ({**STEP, "SLURM_PROCID": "-1"}, [], "SLURM_PROCID is '-1', must be a whole number"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "8,4"}, [], "is '8,4', must be the same number"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, [], "SLURM_STEP_TASKS_PER_NODE is not set, though srun"),
        ({}, ["--num-gpus", "0"], "--num-gpus is 0, must be 1 or more"),
        (
            {**ELASTIC, "RANK": "0"},
            ["--num-gpus", "2"],
            "--num-gpus is 2, but this is one of 4 processes that torchrun or srun has started",
        ),
    ],
)
def test_wrong_starts_are_refused(
    environment: dict[str, str],
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parse(monkeypatch, environment, *args)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_of_several_processes_the_first_one_tells_of_wrong_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parse(monkeypatch, ELASTIC, "--no-such-flag")
    assert capsys.readouterr().err == ""
    parse(monkeypatch, {**ELASTIC, "RANK": "0"}, "--no-such-flag")
    assert "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "processes", "message"),
    [
        ("train.process_group_timeout=0", 1, "train.process_group_timeout is 0, must be"),
        ("train.device=cuda:0", 2, "train.device is 'cuda:0', must be 'cuda'"),
        ("train.device=cuda", 99, "99 processes on this machine.*has 1 visible GPUs"),
        ("train.seed=1", 2, "finds no GPU here: train.device=cpu|2 processes on this machine"),
    ],
)
def test_what_cannot_run_in_so_many_processes_is_refused(
    override: str, processes: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    args = argparse.Namespace(
        config=CONFIG[1], overrides=[override], num_gpus=processes, placement=None
    )
    with pytest.raises(ConfigError, match=message):
        launch._load(args, Placement(0, processes, 0, processes, ""))


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_configs_own_cpu_is_asked_for(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    file = tmp_path / "config.yaml"
    LazyConfig.save(get_config(CONFIG[1], ["train.device=cpu"]), str(file))
    args = argparse.Namespace(config=str(file), overrides=[], num_gpus=2)
    assert launch._load(args, Placement(0, 2, 0, 2, "")).train.device == "cpu"


def test_no_gpu_at_all_is_not_taken_for_two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    args = argparse.Namespace(config=CONFIG[1], overrides=[], num_gpus=2)
    with pytest.raises(ConfigError, match="--num-gpus is 2, .*train.device=cpu"):
        launch._load(args, Placement(0, 2, 0, 2, ""))


def test_a_task_of_srun_that_sees_its_own_gpu_only_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    args = argparse.Namespace(config=CONFIG[1], overrides=["train.device=cuda"], num_gpus=None)
    assert launch._load(args, Placement(9, 16, 1, 8, "tcp://a:1")).train.device == "cuda"
    # torchrun's processes see the same one.
    with pytest.raises(ConfigError, match="8 processes on this machine.*has 1 visible GPUs"):
        launch._load(args, Placement(9, 16, 1, 8, "env://"))


@pytest.mark.parametrize(
    ("device", "local_rank", "visible", "expected"),
    [
        ("cuda:1", 0, 2, [1]),
        ("cuda", 0, 2, [0]),
        ("cuda", 3, 4, [3]),
        ("cuda", 3, 1, [0]),  # srun shows each task its own
        ("cpu", 0, 0, []),
    ],
)
def test_the_gpu_of_a_process_is_the_current_one(
    device: str,
    local_rank: int,
    visible: int,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random states and synchronisation without a device are of that one."""
    current: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    cfg = get_config(CONFIG[1], [f"train.device={device}"])
    launch._set_device(Placement(local_rank, 4, local_rank, 4, ""), cfg)
    assert current == expected


@pytest.mark.parametrize("placement", [Placement(0, 1, 0, 2, ""), Placement(0, 1, 1, 1, "")])
def test_unequal_machines_are_refused(placement: Placement) -> None:
    cfg = get_config(CONFIG[1], ["train.device=cpu"])
    try:
        with pytest.raises(ConfigError, match="each machine must run the same number"):
            launch._create_process_group(placement, dist.HashStore(), cfg)
    finally:
        launch.destroy_process_group()
