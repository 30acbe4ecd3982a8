"""Processes find each other or are told why not; here they are threads."""

import json
import queue
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from processes import free_port

from vit_jax.parallel import multihost, peers
from vit_jax.parallel.cluster import find_cluster


def roll_call(monkeypatch, *told, patience=20):
    """Runs the roll call of each (process, of); returns "" or the error for each."""
    monkeypatch.setattr(multihost, "_LINGER_SECONDS", 0.3)
    address = f"localhost:{free_port()}"

    def join(told):
        try:
            multihost._roll_call(address, told[1], told[0], patience)
        except (ValueError, OSError) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(told)) as pool:
        return list(pool.map(join, told))


def test_all_here(monkeypatch):
    assert roll_call(monkeypatch, (0, 3), (2, 3), (1, 3)) == ["", "", ""]
    assert roll_call(monkeypatch, (0, 1)) == [""]


@pytest.mark.parametrize(
    "told",
    [
        [(0, 2), (2, 3)],
        [(0, 3), (1, 2)],
        [(0, 3), (1, 3), (1, 3)],
        [(0, 2), (5, 2)],
    ],
)
def test_each_is_told_what_all_were_told(monkeypatch, told):
    errors = roll_call(monkeypatch, *told)
    assert "the processes don't fit together; there are:" in errors[0]
    assert len(set(errors[: len(told)])) == 1
    for process, of in told:
        assert f"  process {process} of {of} on {socket.gethostname()}, jax " in errors[0]


def test_those_that_do_not_come_are_named(monkeypatch):
    errors = roll_call(monkeypatch, (0, 4), (2, 4), patience=0.6)
    assert (
        errors[0] == errors[1] and "processes [1, 3] of 4 did not connect; there are:" in errors[0]
    )
    (error,) = roll_call(monkeypatch, (1, 2), patience=0.3)
    assert "process 0 does not answer at localhost" in error
    assert "'process': 1, 'of': 2" in error


def test_versions_that_differ(monkeypatch):
    version = jax.__version__
    answer = multihost._answer_roll_call

    def older(address, me, deadline):
        return answer(address, {**me, "jax": "0.0.1"}, deadline)

    monkeypatch.setattr(multihost, "_answer_roll_call", older)
    errors = roll_call(monkeypatch, (0, 2), (1, 2))
    assert f"jax {version}\n" in errors[1] and errors[1].endswith("jax 0.0.1")


def test_something_else_at_the_address(monkeypatch):
    """An older run's server closes the connection; the roll call waits for it to end."""
    monkeypatch.setattr(multihost, "HEARTBEAT_SECONDS", 0.4)
    with socket.create_server(("localhost", 0)) as server, ThreadPoolExecutor(1) as pool:

        def hang_up():
            while True:
                connection, _ = server.accept()
                connection.recv(1000)
                connection.close()

        pool.submit(hang_up)
        with pytest.raises(TimeoutError, match="all its processes have connected, or an older run"):
            multihost._roll_call(f"localhost:{server.getsockname()[1]}", 2, 1)
        server.shutdown(socket.SHUT_RDWR)  # ends the wait for another


def test_strangers_are_left_alone(monkeypatch):
    """A port scan or a health check is ignored."""
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        main = pool.submit(multihost._roll_call, f"localhost:{port}", 2, 0)
        for said in (b"GET / HTTP/1.1\r\n", b"7\n", b'{"process": 1}\n', b""):
            while True:
                try:
                    connection = socket.create_connection(("localhost", port))
                    break
                except ConnectionRefusedError:
                    pass
            with connection:
                connection.sendall(said)
        multihost._roll_call(f"localhost:{port}", 2, 1)
        assert list(main.result().values()) == [f"process 1 on {socket.gethostname()}"]


def test_a_process_that_leaves_is_missing(monkeypatch):
    """And may come again, as one that its launcher has started again."""
    port = free_port()

    me = {"process": 1, "of": 3, "host": "here", "jax": jax.__version__}

    def come_and_go():
        while True:
            try:
                with socket.create_connection(("localhost", port)) as connection:
                    connection.sendall((json.dumps(me) + "\n").encode())
                    return
            except ConnectionRefusedError:
                pass

    with ThreadPoolExecutor(3) as pool:
        main = pool.submit(multihost._roll_call, f"localhost:{port}", 3, 0, 0.6)
        come_and_go()
        with pytest.raises(ValueError, match=r"processes \[1, 2\] of 3 did not connect"):
            main.result()
        port = free_port()
        main = pool.submit(multihost._roll_call, f"localhost:{port}", 3, 0, 20)
        come_and_go()
        others = [pool.submit(multihost._roll_call, f"localhost:{port}", 3, i) for i in (1, 2)]
        names = [f"process {i} on {socket.gethostname()}" for i in range(3)]
        assert sorted(main.result().values()) == names[1:]
        assert [list(other.result().values()) for other in others] == [names[:1]] * 2


def test_a_port_in_use(monkeypatch):
    """By a stranger, or by another process 0, which then is told as well."""
    monkeypatch.setattr(multihost, "_LINGER_SECONDS", 0.5)
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(OSError, match=r"process 0 can't listen at .* choose a free one"):
            multihost._roll_call(address, 2, 0, 5)
    errors = roll_call(monkeypatch, (0, 2), (0, 2))
    assert errors[0] == errors[1] and "don't fit together" in errors[0]


@pytest.fixture
def three(monkeypatch):
    """Process 0's connections to 1 and 2, both watched, and theirs; the ends that it would have."""
    ends = queue.Queue()
    monkeypatch.setattr(peers, "end", lambda code, message: ends.put((code, message)))
    monkeypatch.setattr(peers, "_LINGER_SECONDS", 0.2)
    monkeypatch.setattr(peers, "before_exit", [])
    monkeypatch.setattr(peers.atexit, "register", lambda function: None)
    with socket.create_server(("localhost", 0)) as server:
        others = [socket.create_connection(server.getsockname()) for _ in range(2)]
        names = {server.accept()[0]: f"process {i} on host{i}" for i in (1, 2)}
    peers.watch(names, "process 0 on host0", 3)
    yield others, ends
    peers.before_exit[0](0)  # hears no more
    for other in others:
        other.close()


def test_a_process_that_is_killed_is_named_to_all(three):
    """It says nothing: its connection closes, and a launcher starts all again."""
    (one, two), ends = three
    two.close()
    code, message = ends.get(timeout=10)
    assert code == multihost.PREEMPTED and "process 2 on host2. It was killed" in message
    assert json.loads(one.makefile().readline()) == ["process 2 on host2", None]


def test_a_process_that_fails_leaves_time_for_the_same_error(three):
    (one, two), ends = three
    began = time.monotonic()
    one.sendall(b'["process 1 on host1", 1]\n')
    assert json.loads(two.makefile().readline()) == ["process 1 on host1", 1]
    code, message = ends.get(timeout=10)
    assert time.monotonic() - began >= 0.2
    assert code == 1 and "process 1 on host1. Its exit code is 1, and its log says" in message


def test_a_process_that_ends_ends_no_other(three):
    (one, two), ends = three
    one.sendall(b'["process 1 on host1", 0]\n')
    one.close()
    with pytest.raises(queue.Empty):
        ends.get(timeout=0.3)
    peers.before_exit[0](1)  # and one that ends itself says so, and hears no more
    assert json.loads(two.makefile().readline()) == ["process 0 on host0", 1]
    two.close()
    with pytest.raises(queue.Empty):
        ends.get(timeout=0.3)


STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[03-04]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def test_tasks_of_slurm(monkeypatch):
    """They have a roll call, too; each alone is refused. A shell of salloc is one process."""
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert find_cluster(1) == ("node03:61517", 2, 1)
    with pytest.raises(ValueError, match="task 1 of 2 of srun, and each would train for itself"):
        multihost.initialize(False)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --pty
        multihost.initialize(False)
    with monkeypatch.context() as patch:  # the script of a batch job
        patch.delenv("SLURM_STEP_NODELIST")
        patch.setenv("SLURM_PROCID", "0")
        multihost.initialize(False)
        patch.delenv("SLURM_PROCID")  # a shell
        multihost.initialize(False)
    for name, value in (("SLURM_NTASKS", "0"), ("SLURM_NTASKS", "x"), ("SLURM_PROCID", "2")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValueError, match=r"--distributed: .*variables"):
                multihost.initialize(True)


@pytest.mark.parametrize(
    "variables",
    [
        {"JAX_PROCESS_ID": "1"},
        {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2"},
        {
            "JAX_COORDINATOR_ADDRESS": "host:1234",
            "JAX_NUM_PROCESSES": "two",
            "JAX_PROCESS_ID": "0",
        },
        {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "host:0", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "host:70000", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
    ],
)
def test_variables_that_do_not_say_it(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"found .*: expected all of JAX_COORDINATOR_ADDRESS"):
        multihost.initialize(True)


@pytest.mark.parametrize(
    ("count", "process"),
    [
        ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_one_of_several_without_the_flag(monkeypatch, count, process):
    monkeypatch.setenv(process, "1")
    multihost.initialize(False)
    monkeypatch.setenv(count, "1")
    multihost.initialize(False)
    monkeypatch.setenv(count, "2")
    with pytest.raises(ValueError, match=f"{count}=2: this is process 1 of several, and each"):
        multihost.initialize(False)


@pytest.mark.parametrize("wrong", [-1, 0, 2.9, float("nan"), float("inf")])
def test_seconds_that_are_none(wrong):
    with pytest.raises(ValueError, match=r"silent host counts as gone: expected 3 or more"):
        multihost.initialize(True, heartbeat=wrong)


def test_no_cluster_at_all(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="jax finds no cluster"):
        multihost.initialize(True)
    multihost.initialize(False)
