"""The tests of a registry."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from bulkhead.backends.base import Backend, Registry
from bulkhead.testing.conformance.contract import LONG, ODD_NAMES, SHORT, TICK, Again, Contract, until

__all__ = ["RegistryContract"]


class RegistryContract(Contract):
    """The tests of a registry."""

    def test_a_value_comes_back_with_its_version(self, backend: Backend, again: Again) -> None:
        version = backend.registry.put("a", b"value")
        assert version is not None
        assert version > 0
        entry = again().registry.get("a")
        assert entry is not None
        assert (entry.key, entry.value, entry.version) == ("a", b"value", version)

    def test_what_was_never_put_is_not_there(self, backend: Backend) -> None:
        assert backend.registry.get("a") is None
        assert backend.registry.delete("a") is False
        assert backend.registry.delete("a", expected=1) is False
        assert backend.registry.entries("") == []

    def test_each_put_changes_the_version_even_of_the_same_value(self, backend: Backend) -> None:
        versions = [backend.registry.put("a", b"same") for _ in range(5)]
        assert None not in versions
        assert len(set(versions)) == 5

    def test_a_version_does_not_come_back_after_a_removal(self, backend: Backend) -> None:
        first = backend.registry.put("a", b"1")
        assert backend.registry.delete("a") is True
        second = backend.registry.put("a", b"2")
        assert second != first
        assert backend.registry.put("a", b"3", expected=first) is None
        assert backend.registry.delete("a", expected=first) is False

    def test_a_value_is_replaced_only_in_its_expected_version(self, backend: Backend) -> None:
        registry = backend.registry
        first = registry.put("a", b"1", expected=0)
        assert first is not None
        assert registry.put("a", b"x", expected=0) is None
        second = registry.put("a", b"2", expected=first)
        assert second is not None
        assert registry.put("a", b"x", expected=first) is None
        assert registry.put("b", b"x", expected=first) is None
        assert registry.get("b") is None
        entry = registry.get("a")
        assert entry is not None
        assert (entry.value, entry.version) == (b"2", second)
        assert registry.put("a", b"3") is not None

    def test_a_value_is_removed_only_in_its_expected_version(self, backend: Backend) -> None:
        registry = backend.registry
        first = registry.put("a", b"1")
        second = registry.put("a", b"2")
        assert registry.delete("a", expected=first) is False
        assert registry.get("a") is not None
        assert registry.delete("a", expected=second) is True
        assert registry.get("a") is None
        assert registry.put("a", b"3", expected=0) is not None

    def test_of_8_threads_that_replace_a_value_one_at_a_time_wins(
        self, backend: Backend, again: Again
    ) -> None:
        def count(registry: Registry) -> None:
            for _ in range(10):
                while True:
                    entry = registry.get("n")
                    assert entry is not None
                    more = b"%d" % (int(entry.value) + 1)
                    if registry.put("n", more, expected=entry.version) is not None:
                        break

        assert backend.registry.put("n", b"0", expected=0) is not None
        registries = [backend.registry] * 4 + [again().registry for _ in range(4)]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(count, registries))
        entry = backend.registry.get("n")
        assert entry is not None
        assert entry.value == b"80"

    def test_of_8_threads_that_make_a_value_one_wins(self, backend: Backend, again: Again) -> None:
        registries = [backend.registry] * 4 + [again().registry for _ in range(4)]
        with ThreadPoolExecutor(8) as threads:
            made = list(threads.map(lambda registry: registry.put("a", b"", expected=0), registries))
        assert sum(version is not None for version in made) == 1

    def test_a_value_is_kept_for_its_time_and_no_longer(self, backend: Backend) -> None:
        registry = backend.registry
        start = time.monotonic()
        first = registry.put("a", b"1", keep=SHORT)
        registry.put("b", b"1", keep=LONG)
        seen = registry.get("a") is not None
        assert seen or time.monotonic() - start > SHORT - TICK
        until(lambda: registry.get("a") is None)
        assert time.monotonic() - start > SHORT - TICK
        assert [entry.key for entry in registry.entries("")] == ["b"]
        assert registry.delete("a") is False
        assert registry.put("a", b"2", expected=first) is None
        second = registry.put("a", b"2", expected=0)
        assert second is not None
        assert second != first

    def test_putting_a_value_again_says_anew_how_long_it_is_kept(self, backend: Backend) -> None:
        registry = backend.registry
        registry.put("stays", b"1", keep=SHORT)
        registry.put("goes", b"1")
        registry.put("marker", b"1", keep=SHORT + 0.05)
        registry.put("stays", b"2")
        registry.put("goes", b"2", keep=SHORT)
        until(lambda: registry.get("goes") is None and registry.get("marker") is None)
        entry = registry.get("stays")
        assert entry is not None
        assert entry.value == b"2"

    def test_a_refused_put_does_not_change_how_long_the_value_is_kept(self, backend: Backend) -> None:
        registry = backend.registry
        registry.put("a", b"1")
        assert registry.put("a", b"2", expected=0, keep=0.05) is None
        registry.put("marker", b"1", keep=0.1)
        until(lambda: registry.get("marker") is None)
        assert registry.get("a") is not None

    def test_values_are_listed_by_prefix_in_order_of_their_keys(self, backend: Backend) -> None:
        registry = backend.registry
        keys = ["b/2", "b/10", "b", "a/1", "b%", "B/1", "b*", "b_", "bü", "b\U0001d11e", "c", "b/"]
        for key in keys:
            registry.put(key, key.encode())
        assert [entry.key for entry in registry.entries("")] == sorted(keys)
        for prefix in ("b", "b/", "b%", "b*", "b_", "bü", "a", "d", "b/2", "b/22"):
            found = registry.entries(prefix)
            assert [entry.key for entry in found] == sorted(key for key in keys if key.startswith(prefix))
            assert [entry.value for entry in found] == [entry.key.encode() for entry in found]
            assert all(registry.get(entry.key) == entry for entry in found)

    def test_keys_are_any_text_and_each_is_another(self, backend: Backend) -> None:
        for key in ODD_NAMES:
            assert backend.registry.put(key, key.encode(), expected=0) is not None
        for key in ODD_NAMES:
            entry = backend.registry.get(key)
            assert entry is not None
            assert (entry.key, entry.value) == (key, key.encode())
        assert [entry.key for entry in backend.registry.entries("")] == sorted(ODD_NAMES)
        assert all(backend.registry.delete(key) for key in ODD_NAMES)

    def test_values_are_any_bytes(self, backend: Backend) -> None:
        for value in (b"", b"\0", bytes(range(256)), bytes(range(256)) * 400):
            assert backend.registry.put("a", value) is not None
            entry = backend.registry.get("a")
            assert entry is not None
            assert entry.value == value

    def test_500_values_are_listed(self, backend: Backend) -> None:
        keys = [f"k/{i:03}" for i in range(500)]
        for key in keys:
            backend.registry.put(key, b"")
        assert [entry.key for entry in backend.registry.entries("k/")] == keys

    def test_namespaces_do_not_see_each_others_values(self, backend: Backend, again: Again) -> None:
        other = again("other").registry
        version = backend.registry.put("a", b"one")
        assert other.get("a") is None
        assert other.entries("") == []
        assert other.put("a", b"other", expected=0) is not None
        assert other.delete("a") is True
        entry = backend.registry.get("a")
        assert entry is not None
        assert (entry.value, entry.version) == (b"one", version)

    def test_a_forked_copy_puts_over_a_connection_of_its_own(self, backend: Backend) -> None:
        first = backend.registry.put("a", b"1")
        shared = self.shares_with_fork(lambda: backend.registry.put("a", b"2", expected=first))
        entry = backend.registry.get("a")
        assert entry is not None
        assert entry.value == (b"2" if shared else b"1")
