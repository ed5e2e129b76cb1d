"""The way to the server: whom to ask, what to believe, where to go next."""

from __future__ import annotations

import pytest
from redis.crc import key_slot
from redis.exceptions import AskError, MovedError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_mlcache.keys import RedisNames
from celery_mlcache.route import ClusterGuide, Fixed, Guided, Route, SentinelGuide, Told

A, B, C, D = ("a", 1), ("b", 2), ("c", 3), ("d", 4)


class Guides:
    """What each guide says; one that is not told to say anything does not answer, and takes a second for it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.says: dict = {}
        self.asked: list = []

    def ask(self, connection, guide) -> Told:
        assert connection == ("to", guide)
        self.asked.append(guide)
        if guide not in self.says:
            self.now += 1.0
            raise RedisConnectionError(f"{guide[0]} is silent")
        return self.says[guide]

    def route(self, *guides, budget: float = 5.0, recheck: float = 10.0) -> Route:
        return Route(
            lambda guide: ("to", guide), self.ask, guides, budget=budget, clock=lambda: self.now, recheck=recheck
        )


@pytest.fixture
def guides() -> Guides:
    """Nobody answers yet."""
    return Guides()


class TestRoute:
    def test_the_first_that_answers_is_believed(self, guides):
        """One answer is enough, and is what is current then."""
        guides.says = {A: Told(D), B: Told(C)}
        route = guides.route(A, B)
        assert route.find() == route.current == D
        assert guides.asked == [A]

    def test_a_silent_guide_is_asked_last_from_then_on(self, guides):
        """A guide that is gone costs its time once, not with each connection."""
        guides.says = {C: Told(D)}
        route = guides.route(A, B, C)
        assert [route.find(), route.find()] == [D, D]
        assert guides.asked == [A, B, C, C]

    def test_the_budget_ends_the_asking(self, guides):
        """No call waits for all guides one after the other; the next call begins where this one ended."""
        guides.says = {C: Told(D)}
        route = guides.route(A, B, C, budget=0.5)
        with pytest.raises(RedisConnectionError, match="a is silent"):
            route.find()
        with pytest.raises(RedisConnectionError, match="b is silent"):
            route.find()
        assert route.find() == D
        assert guides.asked == [A, B, C]

    def test_an_answer_of_an_older_epoch_is_not_believed(self, guides):
        """A sentinel that has not heard of the failover does not lead back to the old master."""
        guides.says = {A: Told(D, epoch=2), B: Told(C, epoch=1)}
        route = guides.route(A, B)
        assert route.find() == D
        del guides.says[A]
        with pytest.raises(RedisConnectionError, match="a is silent"):
            route.find()
        guides.says[A] = Told(D, epoch=2)
        assert route.find() == D

    def test_old_news_are_not_believed_for_want_of_time_to_ask_the_others(self, guides):
        """Slow sentinels that have not heard of the failover do not lead back; the next call asks the others first."""
        guides.says = {A: Told(D, epoch=2)}
        route = guides.route(A, B, budget=0.5)
        assert route.find() == D
        guides.says = {B: Told(C, epoch=1), A: Told(D, epoch=2)}
        ask, route._guides = route._ask, (B, A)

        def slowly(connection, guide):
            guides.now += 1.0
            return ask(connection, guide)

        route._ask = slowly
        with pytest.raises(RedisConnectionError, match="old news"):
            route.find()
        assert route.find() == D

    def test_a_redirection_leads_all_threads(self, guides):
        """Each that was sent away goes there, whatever guides that have not heard of it would say, for a while."""
        guides.says = {A: Told(B)}
        route = guides.route(A, budget=0.5)
        route.find()
        route.follow(C)
        assert route.current == C  # an idle connection to where all were sent away must not be taken
        assert [route.find(), route.find()] == [C, C]
        guides.now += 0.6
        assert route.find() == B

    def test_guides_that_were_set_up_anew_are_believed(self, guides):
        """Where all answer and none knows the epoch that was seen, the newest they know counts."""
        guides.says = {A: Told(D, epoch=9)}
        route = guides.route(A, B)
        assert route.find() == D
        guides.says = {A: Told(B, epoch=0), B: Told(C, epoch=1)}
        assert route.find() == C
        guides.says = {A: Told(D, epoch=1)}
        assert route.find() == D

    def test_new_nodes_are_asked_when_the_seeds_are_gone(self, guides):
        """A process outlives the nodes that it was told of at its start."""
        guides.says = {A: Told(B, guides=[A, B, C])}
        route = guides.route(A)
        assert route.find() == B
        guides.says = {C: Told(D, guides=[C, D])}
        assert route.find() == D
        guides.says = {D: Told(D, guides=[D])}
        assert route.find() == D

    def test_refreshing_asks_each_guide_in_turn(self, guides):
        """From time to time one guide is asked, each in turn; silence and older epochs change nothing."""
        guides.says = {A: Told(D, epoch=1), B: Told(C, epoch=0), C: Told(C, epoch=2)}
        route = guides.route(A, B, C)
        route.find()
        route.refresh()
        assert guides.asked == [A]
        known = []
        for _ in range(3):
            guides.now += 10
            route.refresh()
            route.refresh()
            known.append(route.current)
        assert guides.asked[1:] == [B, C, A]
        assert known == [D, C, C]
        guides.says = {}
        guides.now += 10
        route.refresh()
        assert route.current == C


class Link:
    """A connection that leads somewhere."""

    def __init__(self, address) -> None:
        self.host, self.port = address


class TestConnectors:
    def test_a_fixed_address_is_never_left(self):
        """Without sentinels and cluster nothing is redirected."""
        connector = Fixed(lambda: Link(A))
        connection = connector()
        connector.verify(connection)
        assert connector.is_current(connection)
        assert not connector.is_moved(MovedError("1 b:2"))
        assert connector.detour(AskError("1 b:2")) is None

    def test_connections_to_elsewhere_are_not_used(self, guides):
        """What one connector learns holds for all on the route."""
        guides.says = {A: Told(A)}
        route = guides.route(A)
        commands, pushes = Guided(Link, route), Guided(Link, route)
        old = commands()
        pushes.verify(old)
        guides.says = {A: Told(B)}
        assert pushes().host == "b"
        assert not commands.is_current(old)
        with pytest.raises(RedisConnectionError, match="another server"):
            pushes.verify(old)

    @pytest.mark.parametrize(
        "refusal",
        [MovedError("12182 ::1:7"), ResponseError("MOVED 12182 ::1:7")],
    )
    def test_moved(self, guides, refusal):
        """MOVED, as any release of redis-py says it, is followed."""
        route = guides.route(A)
        connector = Guided(Link, route)
        assert connector.detour(refusal) is None
        assert connector.is_moved(refusal)
        assert route.find() == ("::1", 7)

    @pytest.mark.parametrize("refusal", [AskError("12182 h:7"), ResponseError("ASK 12182 h:7")])
    def test_ask(self, guides, refusal):
        """ASK leads one command elsewhere, and changes nothing else."""
        guides.says = {A: Told(D)}
        route = guides.route(A)
        connector = Guided(Link, route)
        detour = connector.detour(refusal)
        assert (detour.host, detour.port) == ("h", 7)
        assert not connector.is_moved(refusal)
        assert route.find() == D

    def test_a_node_that_does_not_know_its_host(self, guides):
        """A redirection without a host means the host that was asked."""
        guides.says = {A: Told(("here", 1))}
        route = guides.route(A)
        route.find()
        assert Guided(Link, route).is_moved(MovedError("5 :7"))
        assert route.find() == ("here", 7)

    @pytest.mark.parametrize("refusal", [ResponseError("ERR no"), ResponseError("NOSCRIPT no"), ResponseError("")])
    def test_other_refusals(self, guides, refusal):
        """Whatever else a server refuses is no redirection."""
        connector = Guided(Link, guides.route(A))
        assert connector.detour(refusal) is None
        assert not connector.is_moved(refusal)

    def test_a_redirection_to_nowhere(self, guides):
        """A redirection that cannot be read is an outage, not a crash."""
        connector = Guided(Link, guides.route(A))
        with pytest.raises(RedisConnectionError, match="nowhere"):
            connector.is_moved(ResponseError("MOVED to the left"))


class Answering:
    """A connection to a guide that answers one command."""

    def __init__(self, command, reply) -> None:
        self._command, self._reply = command, reply
        self.is_closed = False

    def connect(self) -> None:
        pass

    def send_command(self, *command, **_options) -> None:
        assert command == self._command

    def read_response(self):
        return self._reply

    def disconnect(self) -> None:
        self.is_closed = True


class TestGuides:
    def sentinel(self, **facts):
        facts = {"ip": "h", "port": "7", "flags": "master", "config-epoch": "3", **facts}
        return Answering(
            ("SENTINEL", "MASTER", "m"), [part.encode() for fact in facts.items() for part in (str(fact[0]), fact[1])]
        )

    def test_a_sentinel(self):
        """A sentinel says where the master is and how new its knowledge is; the connection is closed."""
        connection = self.sentinel()
        assert SentinelGuide("m")(connection, A) == Told(("h", 7), 3)
        assert connection.is_closed

    @pytest.mark.parametrize("flags", ["master,s_down", "master,o_down,s_down", "slave"])
    def test_a_master_that_is_down_is_not_named(self, flags):
        """Nobody is sent to a master that the sentinel itself cannot reach."""
        with pytest.raises(RedisConnectionError, match="sees the master down"):
            SentinelGuide("m")(self.sentinel(flags=flags), A)

    def test_a_node_of_a_cluster(self):
        """A node says who is the master of the slot, and who else there is."""
        name = "shop"
        slot = key_slot(name.encode())
        reply = [
            [0, slot - 1, [b"h1", 1, b"id"], [b"h2", 2, b"id"]],
            [slot, slot, [b"h3", 3, b"id", []], [None, 4, b"id"], [b"?", 5, b"id"]],
        ]
        told = ClusterGuide(RedisNames(name).counter)(Answering(("CLUSTER", "SLOTS"), reply), ("asked", 9))
        assert told == Told(("h3", 3), 0, [("h1", 1), ("h2", 2), ("h3", 3), ("asked", 4)])

    @pytest.mark.parametrize("reply", [[], [[0, 16383, [b"?", 1, b"id"]]]])
    def test_a_slot_that_nobody_serves(self, reply):
        """A cluster with a hole in it is an outage."""
        with pytest.raises(RedisConnectionError, match="nobody serves slot"):
            ClusterGuide("{x}")(Answering(("CLUSTER", "SLOTS"), reply), A)
