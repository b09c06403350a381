"""pytest tests/serve/test_keys.py"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.errors import UserError
from minga.serve.keys import Key, Keys
from minga.serve.store import Store


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    store = Store(tmp_path / "minga.db")
    yield Keys(store)
    store.close()


def test_a_key_opens_and_has_its_limits(keys: Keys) -> None:
    secret = keys.add("ana", requests_per_minute=5, max_output_tokens=100)
    assert re.fullmatch("mk-[0-9a-f]{64}", secret)
    assert keys.find(secret) == Key("ana", requests_per_minute=5, max_output_tokens=100)
    assert keys.add("ben") != secret


def test_keys_are_listed_without_their_secrets(keys: Keys) -> None:
    first, second = keys.add("ana", tokens_per_minute=7, max_concurrent=2), keys.add("ben")
    keys.revoke("ana")
    ana, ben = keys.list()
    assert (ana.key, ben.key) == (Key("ana", tokens_per_minute=7, max_concurrent=2), Key("ben"))
    assert (ana.id, ben.id) == (first[3:15], second[3:15])
    assert ana.revoked is not None and ana.created <= ana.revoked and ben.revoked is None


def test_a_secret_is_not_in_the_file(keys: Keys, tmp_path: Path) -> None:
    secret = keys.add("ana")
    data = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret[3:15].encode() in data  # its id
    assert secret[15:].encode() not in data
    assert bytes.fromhex(secret[3:]) not in data


def test_a_running_server_sees_new_and_revoked_keys(keys: Keys, tmp_path: Path) -> None:
    """The command line writes through a connection of its own."""
    store = Store(tmp_path / "minga.db")
    server = Keys(store)
    secret = keys.add("ana")
    assert server.find(secret) == Key("ana")
    keys.revoke("ana")
    assert server.find(secret) is None
    store.close()


def test_a_name_is_free_again_after_its_key_is_revoked(keys: Keys) -> None:
    old = keys.add("ana")
    with pytest.raises(UserError, match=r"a key named ana already .*revoke it"):
        keys.add("ana")
    keys.revoke("ana")
    new = keys.add("ana", max_concurrent=1)
    assert keys.find(old) is None
    assert keys.find(new) == Key("ana", max_concurrent=1)
    keys.revoke("ana")
    with pytest.raises(UserError, match=r"no key named ana .*minga keys list"):
        keys.revoke("ana")


@pytest.mark.parametrize("change", [lambda key: key[:-1] + "g", lambda key: key[:-1], lambda key: key + "0", str.upper])
def test_a_key_that_is_almost_right(keys: Keys, change) -> None:
    secret = keys.add("ana")
    assert keys.find(change(secret)) is None
    other_end = secret[:-1] + ("0" if secret[-1] != "0" else "1")
    assert keys.find(other_end) is None


@given(st.text())
def test_what_strangers_present(presented: str) -> None:
    assert Keys(static="s3cret").find(presented) is None


def test_the_static_key_needs_no_store(keys: Keys, tmp_path: Path) -> None:
    assert Keys(static="s3cret").find("s3cret") == Key("default")
    assert Keys().find("s3cret") is None
    store = Store(tmp_path / "minga.db")
    both = Keys(store, static="s3cret")
    assert both.find("s3cret") == Key("default")
    assert both.find(keys.add("ana")) == Key("ana")
    store.close()


@pytest.mark.parametrize("name", ["", "a b", "-a", "_a", "a\nb", "../a", "a" * 65, "'; DROP TABLE keys; --"])
def test_names_that_are_none(keys: Keys, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a key"):
        keys.add(name)
    assert keys.list() == []


def test_names_of_people(keys: Keys) -> None:
    for name in ("Añil", "ana@example.org", "team.a_b-c+d", "7"):
        keys.add(name)
    assert [record.key.name for record in keys.list()] == ["Añil", "ana@example.org", "team.a_b-c+d", "7"]
    with pytest.raises(UserError, match="is the name of the key of --api-key"):
        keys.add("default")


@pytest.mark.parametrize("value", [0, -1, 2**63])
def test_limits_that_are_none(keys: Keys, value: int) -> None:
    with pytest.raises(UserError, match=f"tokens_per_minute is {value}"):
        keys.add("ana", tokens_per_minute=value)
