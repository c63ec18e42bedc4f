"""python -m freeio_jax.launch, with real processes."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from freeio_jax.launch.__main__ import parse
from freeio_jax.launch.pod import around_proxies, member_environment, visible_gpus


def command(tmp_path, source, *options, processes=2, arguments=()):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(source))
    return [
        *(sys.executable, "-m", "freeio_jax.launch", "-n", str(processes), *options),
        *(str(script), *arguments),
    ]


def launch(*args, stdin=None, **kwargs):
    return subprocess.run(
        command(*args, **kwargs), capture_output=True, text=True, timeout=120, input=stdin
    )


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_initialize_without_arguments(tmp_path):
    done = launch(
        tmp_path,
        """
        import os, sys
        os.environ["JAX_ENABLE_X64"] = "1"  # read when jax is imported, which is not before now
        import jax
        jax.distributed.initialize()
        x = jax.numpy.zeros(1, float)
        print(jax.process_index(), jax.process_count(), jax.local_device_count(), x.dtype)
        print(*sys.argv[1:], __name__, file=sys.stderr)
        """,
        "--devices-per-process=3",
        "--platform=cpu",
        arguments=("-x", "--flag", "word"),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] 0 2 3 float64", "[1] 1 2 3 float64"]
    for rank in range(2):
        assert f"[{rank}] -x --flag word __main__" in done.stderr.splitlines()


def test_a_module(tmp_path):
    (tmp_path / "here.py").write_text("import sys; print(sys.argv[1:], __name__)")
    done = subprocess.run(
        [sys.executable, "-m", "freeio_jax.launch", "-n", "2", "-m", "here", "-m", "word"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
    )
    assert done.returncode == 0, done.stderr
    expected = ["[0] ['-m', 'word'] __main__", "[1] ['-m', 'word'] __main__"]
    assert sorted(done.stdout.splitlines()) == expected


@pytest.mark.parametrize(
    "end, status, how",
    [
        ("sys.exit(7)", 7, "ended with status 7"),
        ("raise KeyError('lost')", 1, "ended with status 1"),
        ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL"),
    ],
)
def test_a_failure_stops_the_others_and_is_the_status(end, status, how, tmp_path):
    start = time.monotonic()
    done = launch(
        tmp_path,
        f"""
        import os, pathlib, sys, time
        print("pid", os.getpid(), flush=True)
        if os.environ["JAX_PROCESS_ID"] == "1":
            while len(list(pathlib.Path({str(tmp_path)!r}).glob("*.asleep"))) < 2:
                time.sleep(0.01)
            time.sleep(0.2)  # from the file to the sleep
            {end}
        pathlib.Path({str(tmp_path)!r}, os.environ["JAX_PROCESS_ID"] + ".asleep").touch()
        time.sleep(100)
        """,
        "--grace=0.2",
        processes=3,
    )
    assert done.returncode == status, done.stderr
    assert time.monotonic() - start < 60
    assert re.search(rf"\[launch\] process 1 \(pid \d+\) {how}", done.stderr)
    # Where the others were is shown before they are stopped.
    assert re.search(r"\[0\] .*program.py.* line 10", done.stderr)
    assert re.search(r"\[2\] .*program.py.* line 10", done.stderr)
    pids = [int(pid) for pid in re.findall(r"pid (\d+)", done.stdout)]
    assert len(pids) == 3 and not any(map(is_running, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(number, tmp_path):
    source = """
        import os, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))
        try:
            print("ready", flush=True)
            time.sleep(100)
        except KeyboardInterrupt:
            print("SIGINT")
        """
    with subprocess.Popen(
        command(tmp_path, source), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        ready = [process.stdout.readline() for _ in range(2)]
        assert sorted(ready) == ["[0] ready\n", "[1] ready\n"]
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
    for rank in range(2):
        assert f"[{rank}] {number.name}" in out + err


def test_nothing_outlives_a_launcher_that_is_killed(tmp_path):
    source = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    with subprocess.Popen(command(tmp_path, source), stdout=subprocess.PIPE, text=True) as process:
        pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
        assert all(map(is_running, pids))
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def environment(rank=0, **options):
    options = {"num_processes": 2, "devices_per_process": 1, "platform": "cuda"} | options
    return member_environment(rank, coordinator="127.0.0.1:1", **options)


def test_each_process_sees_its_own_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-77,0,1,-1,2")
    gpus = visible_gpus()
    assert gpus == ["3", "GPU-77", "0", "1"]
    seen = [environment(rank, gpus=gpus)["CUDA_VISIBLE_DEVICES"] for rank in range(2)]
    assert seen == ["3", "GPU-77"]
    seen = [
        environment(rank, gpus=gpus, devices_per_process=2)["CUDA_VISIBLE_DEVICES"]
        for rank in range(2)
    ]
    assert seen == ["3,GPU-77", "0,1"]
    with pytest.raises(ValueError, match=r"2 processes of 3 GPU\(s\) need 6 GPUs, .* are 4 \(CUDA"):
        environment(gpus=gpus, devices_per_process=3)
    assert "CUDA_VISIBLE_DEVICES" not in environment(platform="cpu", gpus=gpus)


def test_too_few_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = launch(tmp_path, "", "--platform=cuda")
    assert done.returncode == 1
    assert "2 processes of 1 GPU(s) need 2 GPUs, and there are 0" in done.stderr


def test_flags_of_the_environment_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a --xla_force_host_platform_device_count=8 --b")
    flags = environment(platform="cpu", devices_per_process=3)["XLA_FLAGS"].split()
    assert flags == ["--a", "--b", "--xla_force_host_platform_device_count=3"]


@pytest.mark.parametrize("excepted", [None, "example.org", "127.0.0.1"])
def test_the_processes_find_each_other_where_there_is_a_proxy(excepted, tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    if excepted is not None:
        monkeypatch.setenv("no_grpc_proxy", excepted)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody serves there
    done = launch(
        tmp_path,
        """
        import jax
        jax.distributed.initialize(initialization_timeout=30)
        print(len(jax.devices()), "devices")
        """,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] 2 devices", "[1] 2 devices"]


def test_what_is_excepted_from_a_proxy_stays_so():
    assert around_proxies({"no_proxy": "a"}) == {}
    assert around_proxies(
        {"https_proxy": "p", "NO_PROXY": "a,127.0.0.1", "no_grpc_proxy": "b"}
    ) == {
        "no_proxy": "a,127.0.0.1,localhost",
        "NO_PROXY": "a,127.0.0.1,localhost",
        "no_grpc_proxy": "b,127.0.0.1,localhost",
    }
    both = around_proxies({"GRPC_PROXY": "p", "no_proxy": "a", "NO_PROXY": "b"})
    assert both["no_proxy"] == both["no_grpc_proxy"] == "a,127.0.0.1,localhost"
    assert both["NO_PROXY"] == "b,127.0.0.1,localhost"


@pytest.mark.parametrize(
    "options, platform, devices",
    [
        (["--devices-per-process=3"], "cpu", 3),
        ([], "cpu", 5),  # that of the environment
        ([], "cuda", 1),  # it does not count GPUs
        (["--devices-per-process=2"], "cuda", 2),
    ],
)
def test_devices_per_process_go_before_those_of_the_environment(
    options, platform, devices, monkeypatch
):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")
    arguments = parse(["-n", "2", "--platform", platform, *options, __file__])
    assert arguments.devices_per_process == devices
    member = environment(platform="cpu", devices_per_process=devices)
    assert member["JAX_NUM_CPU_DEVICES"] == str(devices)


def test_devices_that_jax_has_are_those_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
    source = "import jax; print(jax.local_device_count())"
    done = launch(tmp_path, source, "--devices-per-process=3", processes=1)
    assert done.stdout == "[0] 3\n", done.stderr


def read_until(stream, text):
    read = b""
    while text not in read:
        more = os.read(stream.fileno(), 1 << 16)
        assert more, read
        read += more
    return read


@pytest.mark.parametrize(
    "written, shown",
    [
        (r"10%\r", rb"[0] 10%\r"),  # a bar that ends in its carriage return
        (r"\r10%", rb"[0] 10%"),  # one that begins with it
        ("what? ", rb"[0] what? "),  # a prompt
    ],
)
def test_unfinished_lines_are_shown(written, shown, tmp_path):
    """While the program goes on."""
    source = f"""
        import sys, time
        sys.stderr.write("{written}")
        time.sleep(100)
        """
    shown = shown.replace(rb"\r", b"\r")
    with subprocess.Popen(
        command(tmp_path, source, processes=1), stderr=subprocess.PIPE
    ) as process:
        try:
            read_until(process.stderr, shown)
        finally:
            process.terminate()


def test_lines_stay_whole(tmp_path):
    done = launch(
        tmp_path,
        r"""
        import sys
        for percent in (10, 20):
            sys.stdout.write(f"\r{percent}%")
        sys.stdout.write("\n windows\r\nend")
        """,
        processes=1,
    )
    assert done.returncode == 0
    # Read as text, every end of a line is a newline here.
    assert done.stdout == "[0] \n[0] 10%\n[0] 20%\n[0]  windows\n[0] end\n"


def test_a_debugger_runs_in_process_0(tmp_path):
    done = launch(
        tmp_path,
        """
        answer = 42
        breakpoint()
        print("went on")
        """,
        stdin="p 'answer', answer\nc\n",
    )
    assert done.returncode == 0, done.stderr
    assert "('answer', 42)" in done.stdout
    assert done.stdout.count("went on\n") == 2
    assert re.search(
        r"\[1\] freeio_jax.launch: breakpoint\(\) of process 1 at .*program.py, line 3 is passed "
        "over: the launcher's input goes to process 0 alone.",
        done.stderr,
    )


def test_wrong_use(tmp_path):
    for arguments in (["-n", "2", "missing.py"], ["-n", "0", __file__], ["-m", "pytest"]):
        done = subprocess.run(
            [sys.executable, "-m", "freeio_jax.launch", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2 and "usage" in done.stderr
