"""`glasshive invite`, `join`, `members`, `revoke`, on an issuer's folder and a joiner's machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from glasshive import cli, new_member, trust_words
from glasshive.dht.errors import StreamRefused
from glasshive.dht.transport import PeerAddress
from glasshive.graph.errors import GlasshiveError
from glasshive.security.errors import (
    BadInvite,
    BadInviteBook,
    KeyFileError,
    MembershipFileError,
    MembershipRevoked,
    NotAMember,
    SecurityError,
)
from glasshive.security.invite_book import InviteBook
from glasshive.security.invites import Invite
from glasshive.security.keys import Identity
from glasshive.security.membership import Act, Role
from glasshive.settings import ConfigError, load_settings
from glasshive.swarm_members import book_path, member_files, open_book, open_gate
from glasshive.trust_folder import TrustFolderError

PASSPHRASE = "correct horse battery staple"
DAY = 86_400
LAB = Path("lab")
KEY = Path("some.key")


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [one for one in os.environ if one.startswith("GLASSHIVE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLASSHIVE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GLASSHIVE_CONFIG", str(tmp_path / "own/hive.toml"))
    monkeypatch.setenv("COLUMNS", "400")
    passphrase = tmp_path / "passphrase"
    passphrase.write_text(PASSPHRASE + "\n")
    passphrase.chmod(0o600)
    monkeypatch.setenv("GLASSHIVE_PASSPHRASE_FILE", str(passphrase))
    monkeypatch.chdir(tmp_path)
    root, ours = logging.getLogger(), logging.getLogger("glasshive")
    before = list(root.handlers), root.level, ours.level
    assert CliRunner().invoke(cli.app, ["swarm", "init", "lab"]).exit_code == 0
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> InviteBook:
    """The issuer's book; who joins asks it without a network between."""
    settings, key = load_settings("lab/hive.toml"), LAB / "keys/bootstrap.key"
    book = InviteBook(book_path(key), Identity.load_or_create(key), "lab")
    assert settings.root is not None
    root = settings.root.read_bytes()

    @contextlib.asynccontextmanager
    async def asking(identity: Identity, swarm: str) -> AsyncIterator[None]:
        yield

    def answer(judge: Callable[[bytes, float], bytes], request: bytes) -> bytes:
        try:
            return judge(request, time.time())
        except SecurityError as error:
            raise StreamRefused(str(error)) from None

    async def joined(
        transport: None, issuer: PeerAddress, request: bytes, seconds: float
    ) -> tuple[bytes, bytes]:
        assert issuer == PeerAddress(book.issuer, settings.bootstraps)
        return answer(book.join, request), root

    async def renewed(
        transport: None, issuer: PeerAddress, request: bytes, seconds: float
    ) -> bytes:
        return answer(book.renew, request)

    monkeypatch.setattr(new_member, "_asking", asking)
    monkeypatch.setattr(new_member, "ask_to_join", joined)
    monkeypatch.setattr(new_member, "ask_to_renew", renewed)
    return book


def invoke(*arguments: object, answer: str = "") -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], input=answer)


def run(*arguments: object, answer: str = "") -> str:
    done = invoke(*arguments, answer=answer)
    if done.exception is not None:
        raise AssertionError(done.output) from done.exception
    return done.stdout


def refused(kind: type[GlasshiveError], *arguments: object, answer: str = "") -> str:
    done = invoke(*arguments, answer=answer)
    assert type(done.exception) is kind, done.output
    return str(done.exception)


def wrong_usage(*arguments: object) -> str:
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


def invited(*arguments: object) -> str:
    return run("invite", "--folder=lab", *arguments).strip()


# Inviting ---------------------------------------------------------------------------------------


def test_an_invite_is_one_word_with_all_that_a_joiner_needs() -> None:
    done = invoke("invite", "client", "--uses=20", "--days=3", "--folder=lab")
    found = Invite.parse(done.stdout, time.time())
    assert done.stdout.split() == [done.stdout.strip()]
    settings = load_settings("lab/hive.toml")
    assert (found.swarm, found.role, found.addresses) == ("lab", Role.CLIENT, settings.bootstraps)
    assert found.issuers == settings.issuers
    assert found.expires_at_seconds == pytest.approx(time.time() + 3 * DAY, abs=60)
    assert "an invite for 20 keys to join 'lab' as a client, until " in done.stderr
    assert f"glasshive revoke --invite {found.invite_id.hex()[:16]} --folder lab" in done.stderr


def test_only_an_issuer_invites() -> None:
    assert "wanted host, client, admin" in wrong_usage("invite", "king", "--folder=lab")
    other = Path("other.key")
    Identity.load_or_create(other)
    text = refused(ConfigError, "invite", "host", "--folder=lab", "--key", other)
    assert "who is no issuer by lab/hive.toml" in text
    text = refused(KeyFileError, "invite", "host", "--folder=lab", "--key=none.key")
    assert text.startswith("there is no key none.key; members are made on the machine that has")
    assert not Path("none.key").exists()
    config = LAB / "hive.toml"
    whole = config.read_text()
    lines = whole.splitlines()
    config.write_text("\n".join(one for one in lines if not one.startswith("issuers")))
    text = refused(ConfigError, "members", "--folder=lab")
    assert "the swarm 'lab' of lab/hive.toml is not private: it names no issuers" in text
    config.write_text("\n".join(one for one in lines if not one.startswith("bootstraps")))
    assert "names no address of the issuer" in refused(
        ConfigError, "invite", "host", "--folder=lab"
    )


# Joining ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "key", "act", "next_line"),
    [
        ("host", "host.key", Act.SERVE, "  glasshive serve MODEL"),
        ("client", "client.key", Act.TRACE, "  python: swarm = glasshive.connect()"),
        ("admin", "client.key", Act.TRACE, "  glasshive status"),
    ],
)
def test_joining_makes_all_that_a_member_needs(
    desk: InviteBook, role: str, key: str, act: Act, next_line: str, tmp_path: Path
) -> None:
    said = run("join", invited(role))
    settings = load_settings()
    assert (settings.swarm, settings.issuers) == ("lab", (desk.issuer,))
    assert settings.bootstraps == load_settings("lab/hive.toml").bootstraps
    assert settings.root is not None
    assert settings.root.parent == tmp_path / "own"
    assert settings.root.read_bytes() == (LAB / "trust/1.root.json").read_bytes()
    identity = Identity.load_or_create(tmp_path / "data" / key)
    gate = open_gate(settings, identity, act, KEY)
    assert gate is not None
    gate.admit(identity.peer_id, gate.certificate, act)
    assert f"joined the private swarm 'lab' as a {role}, until " in said
    assert identity.peer_id in said
    assert next_line in said.splitlines()
    assert [one.peer_id for one in desk.members()] == [identity.peer_id]


def test_a_token_may_be_pasted_and_the_config_be_elsewhere(desk: InviteBook) -> None:
    token = invited("host")
    cut = token[:300] + "\n  " + token[300:]  # as mail breaks it
    said = run("join", "--config=there/hive.toml", "--key=mine.key", answer=cut)
    assert "glasshive serve MODEL --config there/hive.toml --key mine.key" in said
    assert not Path("own").exists()
    assert Path("mine.key").exists()
    again = run("join", invited("client"), "--config=there/hive.toml")
    assert "config  there/hive.toml (as it was)" in again


def test_nothing_is_written_for_an_invite_that_does_not_hold(
    desk: InviteBook, tmp_path: Path
) -> None:
    token = invited("client")
    assert "is cut off" in refused(BadInvite, "join", token[:-9])
    assert "this is no invite" in refused(BadInvite, "join", answer="hello")
    run(
        "revoke",
        "--yes",
        "--folder=lab",
        "--invite",
        Invite.parse(token, time.time()).invite_id.hex()[:8],
    )
    assert "was revoked; ask for a new one" in refused(StreamRefused, "join", token)
    used = invited("client")
    run("join", used, "--key=first.key", "--config=first.toml")
    assert "is used up" in refused(StreamRefused, "join", used, "--key=second.key")
    assert not (tmp_path / "own").exists()


def test_a_key_that_is_a_member_spends_no_invite(desk: InviteBook, tmp_path: Path) -> None:
    run("join", invited("host"))
    (first,) = desk.members()
    second = invited("host")
    data = tmp_path / "data"
    files = member_files(load_settings())
    assert files is not None
    certificate = files.folder / f"{first.peer_id}.certificate"
    for elsewhere in ((), ("--config=other.toml",)):
        assert refused(ConfigError, "join", second, *elsewhere) == (
            f"the key {data}/host.key, {first.peer_id}, is a member of the private swarm 'lab' "
            "already, as host, so the invite was not used; another peer on this machine joins "
            f"with a key of its own: `glasshive join TOKEN --key {data}/host-2.key`. To join anew "
            f"with this one, as when its config is lost, first remove {certificate}"
        )
    assert [one.used for one in desk.invites()][-1] == 0
    run("join", second, "--key", data / "host-2.key")
    key = Identity.load_or_create(data / "host-2.key")
    assert open_gate(load_settings(), key, Act.SERVE, KEY) is not None
    # In another role, and anew without what was kept, it joins.
    run("join", invited("admin"), "--key", data / "host.key")
    certificate.unlink()
    run("join", invited("host"))


def test_whose_certificate_does_not_hold_joins_again(desk: InviteBook) -> None:
    run("join", invited("host"))
    settings = load_settings()
    files = member_files(settings)
    assert files is not None
    identity = Identity.load_or_create(settings.host_key_path)
    ended = desk.enrol(identity.peer_id, Role.HOST, time.time() - 30 * DAY)
    files.keep_certificate(identity.peer_id, ended)
    run("join", invited("host"))
    gate = open_gate(settings, identity, Act.SERVE, KEY)
    assert gate is not None
    by = gate.membership.admit(identity.peer_id, gate.certificate, Act.SERVE, time.time()).invite
    gate.learn(desk.revoke(time.time(), invites=[by]))
    with pytest.raises(MembershipRevoked):
        open_gate(settings, identity, Act.SERVE, KEY)
    run("join", invited("host"))
    assert open_gate(settings, identity, Act.SERVE, KEY) is not None


def test_a_config_of_another_swarm_is_left_alone(desk: InviteBook, tmp_path: Path) -> None:
    own = tmp_path / "own/hive.toml"
    own.parent.mkdir()
    own.write_text('swarm = "public"\n')
    text = refused(ConfigError, "join", invited("client"))
    assert "is of the swarm 'public', the invite of 'lab'" in text
    assert text.endswith("name another file: `glasshive join TOKEN --config lab.toml`")
    assert own.read_text() == 'swarm = "public"\n'
    assert not desk.members()


def test_two_swarms_of_one_name_keep_their_roots(desk: InviteBook, tmp_path: Path) -> None:
    run("join", invited("client"))
    first = load_settings()
    assert first.root is not None
    root = first.root.read_bytes()
    # The same name and issuer, and another root: as after `swarm init` anew with the old key.
    other = run("swarm", "init", "other", "--name=lab")
    assert "made the private swarm 'lab'" in other
    config = tmp_path / "own/hive.toml"
    text = config.read_text().replace(first.root.name, "x.json")
    (tmp_path / "own/x.json").write_bytes(Path("other/trust/1.root.json").read_bytes())
    config.write_text(text)
    assert "its own issuers and root" in refused(ConfigError, "join", invited("client"))
    run("join", invited("client"), "--config=own/second.toml", "--key=second.key")
    assert first.root.read_bytes() == root
    assert (tmp_path / "own/x.json").read_bytes() != root


def test_another_root_than_the_invites_is_not_taken(
    desk: InviteBook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("swarm", "init", "other")
    other = Path("other/trust/1.root.json").read_bytes()
    asked = new_member.ask_to_join

    async def lie(*args: Any) -> tuple[bytes, bytes]:
        certificate, _ = await asked(*args)
        return certificate, other

    monkeypatch.setattr(new_member, "ask_to_join", lie)
    text = refused(BadInvite, "join", invited("client"))
    assert text.startswith("the issuer sent another root than its invite names")

    async def junk(*args: Any) -> tuple[bytes, bytes]:
        certificate, _ = await asked(*args)
        return certificate, b"{}"

    monkeypatch.setattr(new_member, "ask_to_join", junk)
    assert "what the issuer sent is no root" in refused(BadInvite, "join", invited("client"))
    assert not (tmp_path / "own").exists()


# Members ----------------------------------------------------------------------------------------


def test_members_and_invites_are_listed(desk: InviteBook) -> None:
    assert "nobody has joined 'lab' yet" in run("members", "--folder=lab")
    token = invited("host", "--uses=3")
    run("join", token)
    (member,) = desk.members()
    found = json.loads(run("members", "--folder=lab", "--json"))
    assert found["swarm"] == "lab"
    assert [(one["peer"], one["role"], one["revoked"]) for one in found["members"]] == [
        (member.peer_id, "host", False)
    ]
    assert [(one["uses"], one["used"]) for one in found["invites"]] == [(3, 1)]
    table = run("members", "--folder=lab")
    assert f"…{member.peer_id[-8:]}" in table
    assert "1 of 3" in table
    run("revoke", member.peer_id, "--yes", "--folder=lab")
    assert "revoked" in run("members", "--folder=lab")


def test_the_issuer_is_listed_as_what_it_is(desk: InviteBook) -> None:
    desk.enrol(desk.issuer, Role.HOST, time.time())
    run("join", invited("host"))
    rows = run("members", "--folder=lab").splitlines()
    roles = {one.peer_id: one.role for one in desk.members()}
    assert set(roles.values()) == {Role.HOST}
    for peer_id in roles:
        (row,) = [one for one in rows if peer_id[-8:] in one]
        assert row.split("│")[2].strip() == ("issuer" if peer_id == desk.issuer else "host")


def test_a_folder_without_a_swarm_is_named(desk: InviteBook) -> None:
    for command in (["invite", "host"], ["members"], ["revoke", desk.issuer]):
        assert refused(TrustFolderError, *command, "--folder=none") == (
            "there is no swarm in none: none/hive.toml is missing; name a swarm's folder with "
            "--folder, or make one with `glasshive swarm init`"
        )
    assert refused(TrustFolderError, "invite", "host").startswith("there is no swarm in .: hive")


def test_nobody_is_revoked_unasked(desk: InviteBook) -> None:
    run("join", invited("host"))
    (member,) = desk.members()
    text = wrong_usage("revoke", member.peer_id, "--folder=lab")
    assert (
        "nothing was revoked: there is no terminal to ask whether to throw them out of 'lab' for "
        "good; look at what is shown above, and pass --yes"
    ) in text
    assert f"{member.peer_id}, host" in text
    assert not desk.members()[0].revoked


def test_who_is_revoked_is_named_first_and_only_with_consent(
    desk: InviteBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(trust_words, "sys", at_terminal)
    run("join", invited("host"))
    run("join", invited("client"))
    host, client = desk.members()
    said = invoke("revoke", host.peer_id[-8:], "--folder=lab", answer="n\n")
    assert said.exit_code == 1
    assert f"{host.peer_id}, host" in said.output
    assert not any(one.revoked for one in desk.members())
    run("revoke", host.peer_id[-8:], "--folder=lab", answer="y\n")
    assert [one.revoked for one in desk.members()] == [True, False]
    run("revoke", "--invite", client.invite.hex()[:8], "--folder=lab", "--yes")
    assert all(one.revoked for one in desk.members())
    # Whoever came by it and has another invite is out, too.
    with pytest.raises(MembershipRevoked):
        desk.enrol(client.peer_id, Role.CLIENT, time.time())
    assert "is the issuer itself" in refused(
        BadInviteBook, "revoke", desk.issuer, "--folder=lab", "--yes"
    )
    stranger = Identity.generate().peer_id
    assert "not in the book of members" in run("revoke", stranger, "--folder=lab", "--yes")


def test_what_is_nobody_is_not_revoked(desk: InviteBook) -> None:
    assert "name members by peer id, or invites" in wrong_usage("revoke", "--folder=lab")
    text = wrong_usage("revoke", "nobody", "--folder=lab")
    assert "nobody is not the id of an Ed25519 key" in text
    assert "`glasshive members` lists those who joined" in text
    assert "no invite is called 'abcd'" in wrong_usage("revoke", "--invite=abcd", "--folder=lab")


# What is kept -----------------------------------------------------------------------------------


def test_a_key_without_a_certificate_is_no_member(desk: InviteBook) -> None:
    run("join", invited("host"))
    settings = load_settings()
    for act, role in ((Act.SERVE, "host"), (Act.TRACE, "client")):
        stranger = Identity.generate()
        with pytest.raises(NotAMember) as caught:
            open_gate(settings, stranger, act, Path("my keys/host-2.key"))
        assert str(caught.value) == (
            f"the key my keys/host-2.key, {stranger.peer_id}, is no member of the private swarm "
            f"'lab' yet; ask who runs it for an invite as a {role}, and run "
            "`glasshive join TOKEN --key 'my keys/host-2.key'`"
        )
    host = Identity.load_or_create(settings.host_key_path)
    with pytest.raises(NotAMember, match="is a host of swarm 'lab' and may not run traces"):
        open_gate(settings, host, Act.TRACE, KEY)


@pytest.mark.asyncio
async def test_who_was_away_for_long_is_back_without_an_invite(desk: InviteBook) -> None:
    settings = load_settings("lab/hive.toml")
    files = member_files(settings)
    assert files is not None
    identity = Identity.generate()
    began = time.time() - 5 * DAY
    files.keep_certificate(identity.peer_id, desk.enrol(identity.peer_id, Role.CLIENT, began))
    with pytest.raises(NotAMember, match="expired"):
        open_gate(settings, identity, Act.TRACE, KEY)
    await new_member.renew_ended(settings, identity)
    assert open_gate(settings, identity, Act.TRACE, KEY) is not None
    held = files.certificate(identity.peer_id)
    await new_member.renew_ended(settings, identity)
    assert files.certificate(identity.peer_id) == held  # it holds: nobody is asked

    files.keep_certificate(identity.peer_id, desk.enrol(identity.peer_id, Role.CLIENT, began))
    desk.revoke(time.time(), peers=[identity.peer_id])
    with pytest.raises(
        NotAMember, match=r"has ended, and its issuer does not renew it: .* revoked"
    ):
        await new_member.renew_ended(settings, identity)


def test_what_was_revoked_is_kept_across_restarts(desk: InviteBook) -> None:
    settings = load_settings("lab/hive.toml")
    files = member_files(settings)
    assert files is not None
    ann, ben = Identity.generate(), Identity.generate()
    for one in (ann, ben):
        certificate = desk.enrol(one.peer_id, Role.HOST, time.time())
        files.keep_certificate(one.peer_id, certificate)
    gate = open_gate(settings, ann, Act.SERVE, KEY)
    assert gate is not None
    gate.learn(desk.revoke(time.time(), peers=[ben.peer_id]))
    with pytest.raises(MembershipRevoked):
        open_gate(settings, ben, Act.SERVE, KEY)


def test_processes_of_one_machine_forget_nothing_of_each_other(desk: InviteBook) -> None:
    settings = load_settings("lab/hive.toml")
    files = member_files(settings)
    assert files is not None
    ann, ben = Identity.generate(), Identity.generate()
    for one in (ann, ben):
        files.keep_certificate(one.peer_id, desk.enrol(one.peer_id, Role.HOST, time.time()))
    gates = [open_gate(settings, one, Act.SERVE, KEY) for one in (ann, ben)]
    old = desk.revoke(time.time(), peers=[Identity.generate().peer_id])
    new = desk.revoke(time.time(), peers=[Identity.generate().peer_id])
    for gate, signed in zip(gates, (new, old), strict=True):
        assert gate is not None
        gate.learn(signed)  # the one that began earlier hears of the older list later
    again = open_gate(settings, ann, Act.SERVE, KEY)
    assert again is not None
    assert again.membership.lists == (new,)
    (files.folder / "revocations").write_bytes(b"damaged")
    with pytest.raises(MembershipFileError, match="revocations: the kept revocations of swarm"):
        open_gate(settings, ann, Act.SERVE, KEY)


def test_who_is_no_member_publishes_here_alone(desk: InviteBook, tmp_path: Path) -> None:
    def bump() -> str:
        run("whitelist", "bump", "--folder=lab")
        return run("whitelist", "sign", "--folder=lab", "--yes", "--key=lab/keys/owner.key")

    command = "bring it to the hosts: glasshive whitelist publish --folder lab"
    key = tmp_path / "data/client.key"
    assert bump().splitlines()[-1] == f"{command} --only-here"
    assert not key.exists()
    done = invoke("whitelist", "publish", "--folder=lab")
    assert type(done.exception) is NotAMember
    peer_id = Identity.load_or_create(key).peer_id
    assert str(done.exception) == (
        f"no bootstrap peer was told: the key {key}, {peer_id}, is no member of the private swarm "
        f"'lab' yet; ask who runs it for an invite as a client, and run `glasshive join TOKEN "
        f"--key {key}`; or publish with --only-here, on the machine of a bootstrap peer or host, "
        "who take it up there and tell the others"
    )
    assert bump().splitlines()[-1] == f"{command} --only-here"  # the key is there, and no member
    run("join", invited("client"))
    assert bump().splitlines()[-1] == command


def test_the_issuer_is_a_member_by_its_own_word() -> None:
    settings, key = load_settings("lab/hive.toml"), LAB / "keys/bootstrap.key"
    issuer = Identity.load_or_create(key)
    assert open_book(settings, key, Identity.generate()) is None
    book = open_book(settings, key, issuer)
    assert book is not None
    assert open_gate(settings, issuer, Act.SERVE, KEY) is not None
    assert [one.peer_id for one in book.members()] == [issuer.peer_id]


def test_a_private_swarm_has_a_root() -> None:
    config = LAB / "hive.toml"
    lines = [one for one in config.read_text().splitlines() if not one.startswith("root")]
    config.write_text("\n".join(lines))
    with pytest.raises(
        ConfigError, match="names `issuers`, so its swarm is private, and no `root`"
    ):
        member_files(load_settings(config))
    config.write_text('issuers = ["somebody"]')
    with pytest.raises(
        ConfigError, match=r"setting issuers in lab/hive.toml: wanted a list of peer"
    ):
        load_settings(config)


def test_a_public_swarm_asks_for_no_certificate() -> None:
    settings = load_settings(may_be_missing=True)
    assert member_files(settings) is None
    assert open_gate(settings, Identity.generate(), Act.TRACE, KEY) is None
    assert open_book(settings, Path("some.key"), Identity.generate()) is None
