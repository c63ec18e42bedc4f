"""The command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from freeio_jax import _native
from freeio_jax.plan.__main__ import main

SMALL = ["--tokens", "32", "--hidden", "64", "--top-k", "2", "--experts", "64"]


def test_one_host(capsys):
    assert main(["--gpus", "4", *SMALL, "--per-rank"]) == 0
    told = capsys.readouterr().out
    assert "1 host(s) of 4 GPUs, T=32 K=2 E=64, rows of 128 bytes, uniform routing" in told
    assert "measured, notebook" in told
    assert "Not with this installation's CUDA engine" not in told
    assert "busiest link" not in told
    for op in ("dispatch (in lines)", "combine_transpose", "dispatch_along"):
        assert f"| {op}" in told
    assert "| 3 " in told


def test_several_hosts(capsys, tmp_path):
    path = tmp_path / "plan.json"
    command = ["--hosts", "4", "--gpus", "4", *SMALL, "--routing", "uneven", "--json", str(path)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "the exchange has not been measured between machines" in told
    assert "with even rails" in told
    even = json.loads(path.read_text())
    assert main([*command, "--rails", "same"]) == 0
    same = json.loads(path.read_text())
    assert even["rails"] == same["rails"]
    for plan, busiest in ((even, "busiest_even"), (same, "busiest_same")):
        network = plan["moved"]["dispatch"]
        assert max(network["network_in"] + network["network_out"]) == plan["rails"][busiest]
    assert even["rails"]["busiest_even"] < same["rails"]["busiest_same"]
    assert (even["num_hosts"], even["num_gpus"]) == (4, 4)
    for plan in (even, same):
        assert plan["memory"]["windows"] == 2 * most_that_land(plan)


def most_that_land(plan):
    """Bytes that land on the busiest rail, in dispatch or in combine."""
    return max(max(plan["moved"][op]["network_in"]) for op in ("dispatch", "combine"))


def test_windows_hold_what_combine_brings_back(tmp_path):
    """One host of three has all tokens, and each token an expert on both other hosts."""
    ids = np.full((3, 10, 2), -1)
    ids[0] = [1, 2]
    np.save(tmp_path / "ids.npy", ids)
    pod = ["--hosts", "3", "--gpus", "1", "--experts", "3", "--hidden", "64"]
    files = ["--routing", str(tmp_path / "ids.npy"), "--json", str(tmp_path / "plan.json")]
    assert main([*pod, *files]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    row_bytes = 128
    assert plan["moved"]["dispatch"]["network_in"] == [0, 10 * row_bytes, 10 * row_bytes]
    assert plan["moved"]["combine"]["network_in"] == [20 * row_bytes, 0, 0]
    assert plan["memory"]["windows"] == 2 * 20 * row_bytes


def test_a_file_of_recorded_ids(capsys, tmp_path, rng):
    ids = rng.permuted(np.tile(np.arange(16), (4 * 10, 1)), axis=1)[:, :3]
    np.save(tmp_path / "flat.npy", ids)
    np.save(tmp_path / "ranks.npy", ids.reshape(4, 10, 3).astype(np.int32))
    plans = []
    for name in ("flat.npy", "ranks.npy"):
        command = ["--gpus", "4", "--experts", "16", "--routing", str(tmp_path / name)]
        assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
        assert "T=10 K=3 E=16" in capsys.readouterr().out
        plans.append(json.loads((tmp_path / "plan.json").read_text()))
        assert plans[-1].pop("routing").endswith(name)
    assert plans[0] == plans[1]


def test_limits_of_the_engine(capsys):
    most = _native.cuda_sizes.max_ranks
    command = ["--gpus", str(2 * most), "--tokens", "8", "--experts", str(4 * most)]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"CUDA engine: at most {most} ranks in an NVLink domain, not {2 * most}." in told


def test_given_rates(capsys):
    assert main(["--gpus", "4", *SMALL, "--link", "400", "--memory", "3000"]) == 0
    told = capsys.readouterr().out
    assert "400 GB/s (given)" in told
    assert "3000 GB/s (given)" in told


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["--gpus", "3"], "--experts 256 are not equal parts for 3 ranks"),
        (["--routing", "nowhere.npy"], "neither a file nor one of uniform, zipf"),
        (["--experts", "8", "--top-k", "9"], "--top-k 9 exceeds --experts 8"),
        (["--routing", "one-host", "--hosts", "8", "--experts", "64", "--top-k", "9"], "fewer"),
        (["--routing", "group-limited", "--experts", "8"], "8 groups of two or more"),
        (["--routing", "group-limited", "--experts", "8", "--top-k", "4"], "from 16 on"),
        (["--routing", "group-limited", "--experts", "32", "--top-k", "20"], "from 40 on"),
        (["--measure"], "The memory of a CPU says nothing of a GPU's"),
    ],
)
def test_what_does_not_fit_together(command, error, capsys):
    assert main(command) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "error"),
    [
        *((["--capacity-factor", x], f"0, got {x}") for x in ("nan", "inf", "-3")),
        (["--capacity-factor", "much"], "invalid float value: 'much'"),
        *((["--network", x], f"a positive number of GB/s, got {x}") for x in ("0", "nan", "inf")),
        (["--link", "-5"], "a positive number of GB/s, got -5"),
        (["--memory", "0"], "a positive number of GB/s, got 0"),
        (["--dtype", "nothing"], "JAX has no dtype nothing"),
        *((["--dtype", x], f"JAX has no dtype {x}") for x in ("U5", "O", "longdouble", "M8[s]")),
        (["--dtype", "int4"], "elements of int4 are not whole bytes"),
        (["--tokens", "0"], "must be at least 1, got 0"),
        (["--seed", "-1"], "must be at least 0, got -1"),
        (["--json", "."], ". is a folder"),
    ],
)
def test_values_that_make_no_sense(command, error, capsys):
    # Two hosts, so that the network has a part in the figures.
    with pytest.raises(SystemExit):
        main(["--hosts", "2", "--gpus", "2", *SMALL, *command])
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bool", "float8_e4m3fn", "bfloat16", "int32", "complex128"])
def test_dtypes_of_rows(dtype, capsys):
    assert main(["--gpus", "2", *SMALL, "--dtype", dtype]) == 0
    assert f"rows of {64 * jnp.dtype(dtype).itemsize} bytes" in capsys.readouterr().out


def test_a_large_capacity_factor_is_the_dropless_bound(capsys):
    told = []
    for factor in ("1e308", "0"):
        assert main(["--gpus", "4", *SMALL, "--capacity-factor", factor]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert "256 packed rows" in told[0]  # 4 ranks of 32 tokens of 2 experts


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint64])
def test_ids_of_any_integers(dtype, capsys, tmp_path):
    ids = np.arange(2 * 10 * 3).reshape(2, 10, 3)
    told = []
    for name, array in (("narrow", ids.astype(dtype)), ("usual", ids.astype(np.int32))):
        path = tmp_path / "ids.npy"
        np.save(path, array)
        assert main(["--gpus", "2", "--experts", "1024", "--routing", str(path)]) == 0, name
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_files_that_hold_no_array(capsys, tmp_path):
    for name, content in (("empty.npy", b""), ("words.npy", b"1 2 3\n"), ("PK.npy", b"PK\3\4")):
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "two.npz", ids=np.zeros((8, 10, 2), int))
    np.save(tmp_path / "objects.npy", np.array([None, "x"]), allow_pickle=True)
    for path in sorted(tmp_path.iterdir()):
        assert main(["--routing", str(path)]) == 2
        error = capsys.readouterr().err
        assert f"{path}: this is no .npy file of ids" in error
        assert "numpy.save" in error


def test_files_that_do_not_fit(capsys, tmp_path):
    path = tmp_path / "ids.npy"
    for array, more, error in (
        (np.zeros((3, 10, 2), int), [], "got shape (3, 10, 2)"),
        (np.zeros((8, 10, 2)), [], "ids must be integers"),
        (np.zeros((8, 0, 2), int), [], "ids of shape (8, 0, 2) are none"),
        (np.zeros((8, 10, 2), int), ["--tokens", "11"], "--tokens 11"),
        (np.zeros((8, 10, 2), int), ["--top-k", "3"], "--top-k 3"),
    ):
        np.save(path, array)
        assert main(["--routing", str(path), *more]) == 2
        assert error in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--json", str(tmp_path / "nowhere" / "plan.json")])


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    assert main(["--hosts", "2", "--gpus", "2", *SMALL, "--png", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
