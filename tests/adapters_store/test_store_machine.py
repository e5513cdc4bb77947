"""The store against a model of it in plain dictionaries, under any order of what can be done."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from spallm_serve.adapter import adapter_digest
from spallm_serve.adapter_files import read_adapter
from spallm_serve.adapters_store.failures import ConflictError, NotFoundError
from spallm_serve.adapters_store.validate import UploadLimits, check_upload
from tests.adapters_store.stored import (
    ADMIN,
    BASE_NAME,
    MANIFEST,
    blob_count,
    location,
    lora,
    lut,
    opened,
    tenant,
)

TENANTS, NAMES = ("acme", "beta", "gamma"), ("support", "sales")
UPLOADS = [lut(0), lut(1), lora(0), lora(1)]


def _digests() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return [
            check_upload(*upload.write(Path(folder)), MANIFEST, UploadLimits()).digest
            for upload in UPLOADS
        ]


DIGESTS = _digests()
tenants, names = st.sampled_from(TENANTS), st.sampled_from(NAMES)
uploads, digests = st.sampled_from(range(len(UPLOADS))), st.sampled_from(DIGESTS)


@dataclass
class Named:
    """One name of one tenant. ``moves`` are its releases ever: digest, and what a rollback
    restored."""

    versions: set[str] = field(default_factory=set)
    released: str | None = None
    moves: list[tuple[str, int | None]] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)
    public: bool = False

    def release(self, digest: str, restores: int | None = None) -> None:
        if digest != self.released:
            self.moves.append((digest, restores))
            self.released = digest

    def rollback_target(self) -> int | None:
        """Index of the move that a rollback goes back to."""
        restores = self.moves[-1][1]
        start = len(self.moves) - 1 if restores is None else restores
        for index in range(start - 1, -1, -1):
            digest, restored = self.moves[index]
            if restored is None and digest != self.released and digest in self.versions:
                return index
        return None


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.stack = ExitStack()
        self.store = self.stack.enter_context(opened(location(self.folder)))
        self.actors = {name: tenant(self.store, name) for name in TENANTS}
        self.files = [
            upload.write(self.folder / f"upload{number}") for number, upload in enumerate(UPLOADS)
        ]
        self.named = {(owner, name): Named() for owner in TENANTS for name in NAMES}
        self.base: set[str] = set()
        self.suspended: set[str] = set()
        self.digest = DIGESTS[0]
        # Begin where most can happen.
        for owner, grantee in (("acme", "beta"), ("beta", "gamma")):
            self.put(owner, "support", 0, release=True)
            self.share(owner, "support", grantee, granted=True)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.collect()
            self.stack.close()
            shutil.rmtree(self.folder)

    @rule(owner=tenants, name=names, upload=uploads, release=st.booleans())
    def put(self, owner: str, name: str, upload: int, release: bool) -> None:
        model, digest = self.named[owner, name], DIGESTS[upload]
        actor, files = self.actors[owner], self.files[upload]
        result = self.store.put(actor, owner, name, *files, release_it=release)
        assert result.version.digest == digest
        assert result.created == (digest not in model.versions)
        model.versions.add(digest)
        if release:
            model.release(digest)
        assert result.released == (model.released == digest)

    @rule(owner=tenants, name=names, digest=digests, expected=st.none() | digests)
    def move(self, owner: str, name: str, digest: str, expected: str | None) -> None:
        model = self.named[owner, name]

        def attempt() -> None:
            self.store.adapters.move(self.actors[owner], owner, name, digest, expected)

        if model.released != expected:
            with pytest.raises(ConflictError):
                attempt()
        elif digest not in model.versions:
            with pytest.raises(NotFoundError):
                attempt()
        else:
            attempt()
            model.release(digest)

    @rule(owner=tenants, name=names, digest=digests)
    def move_rightly(self, owner: str, name: str, digest: str) -> None:
        self.move(owner, name, digest, self.named[owner, name].released)

    @rule(owner=tenants, name=names)
    def rollback(self, owner: str, name: str) -> None:
        model = self.named[owner, name]

        def attempt() -> str:
            return self.store.adapters.rollback(self.actors[owner], owner, name).digest

        if model.released is None:
            with pytest.raises(NotFoundError):
                attempt()
            return
        target = model.rollback_target()
        if target is None:
            with pytest.raises(ConflictError):
                attempt()
        else:
            digest = model.moves[target][0]
            assert attempt() == digest
            model.release(digest, restores=target)

    @rule(owner=tenants, name=names)
    def delete(self, owner: str, name: str) -> None:
        model = self.named[owner, name]
        if not model.versions:
            with pytest.raises(NotFoundError):
                self.store.adapters.delete(self.actors[owner], owner, name)
            return
        gone = self.store.adapters.delete(self.actors[owner], owner, name)
        assert {version.digest for version in gone} == model.versions
        self.named[owner, name] = Named(moves=model.moves)

    @rule(owner=tenants, name=names, digest=digests)
    def delete_version(self, owner: str, name: str, digest: str) -> None:
        model = self.named[owner, name]
        refusal = (
            NotFoundError
            if digest not in model.versions
            else ConflictError
            if digest == model.released
            else None
        )
        if refusal is not None:
            with pytest.raises(refusal):
                self.store.adapters.delete_version(self.actors[owner], owner, name, digest)
            return
        self.store.adapters.delete_version(self.actors[owner], owner, name, digest)
        model.versions.remove(digest)

    @rule(owner=tenants, name=names, grantee=tenants, granted=st.booleans())
    def share(self, owner: str, name: str, grantee: str, granted: bool) -> None:
        model = self.named[owner, name]
        if grantee == owner:
            return
        change = self.store.adapters.share if granted else self.store.adapters.unshare
        if model.released is None:
            with pytest.raises(NotFoundError):
                change(self.actors[owner], owner, name, grantee)
            return
        change(self.actors[owner], owner, name, grantee)
        (model.shared.add if granted else model.shared.discard)(grantee)

    @rule(owner=tenants, name=names, public=st.booleans())
    def publish(self, owner: str, name: str, public: bool) -> None:
        model = self.named[owner, name]
        if model.released is not None:
            self.store.adapters.publish(self.actors[owner], owner, name, public=public)
            model.public = public

    @rule(who=tenants, granted=st.booleans())
    def grant_base(self, who: str, granted: bool) -> None:
        self.store.tenants.grant_base(ADMIN, who, granted=granted)
        (self.base.add if granted else self.base.discard)(who)

    @rule(who=tenants, suspended=st.booleans())
    def suspend(self, who: str, suspended: bool) -> None:
        self.store.tenants.suspend(ADMIN, who, suspended=suspended)
        (self.suspended.add if suspended else self.suspended.discard)(who)

    @rule(who=tenants, owner=tenants, name=names)
    def meddle(self, who: str, owner: str, name: str) -> None:
        """Others change nothing, whether there is something or not."""
        if who != owner:
            with pytest.raises(NotFoundError):
                self.store.adapters.delete(self.actors[who], owner, name)

    @rule()
    def collect(self) -> None:
        self.store.collect(ADMIN, grace=0)
        there = {digest for model in self.named.values() for digest in model.versions}
        for digest in there:
            assert adapter_digest(read_adapter(self.store.local_folder(digest))) == digest
        # The two LoRAs have one configuration between them, as have the two sets of tables.
        kinds = {DIGESTS.index(digest) // 2 for digest in there}
        assert blob_count(self.folder) == len(there) + len(kinds)
        for digest in set(DIGESTS) - there:
            with pytest.raises(NotFoundError):
                self.store.local_folder(digest)

    @rule(digest=digests)
    def ask_for(self, digest: str) -> None:
        """By the start of this digest, from now on."""
        self.digest = digest

    @invariant()
    def everyone_sees_what_is_theirs(self) -> None:
        for who in TENANTS:
            base = self.store.adapters.resolve(who, BASE_NAME)
            assert (base is not None) == (who in self.base)
            seen = set()
            for (owner, name), model in self.named.items():
                may = who in model.shared or model.public
                usable = owner == who or (may and owner not in self.suspended)
                self._check(who, f"{owner}/{name}", model.released if usable else None)
                if owner == who:
                    self._check(who, name, model.released)
                allowed = model.versions if owner == who else {model.released}
                expected = self.digest if usable and self.digest in allowed else None
                self._check(who, f"{owner}/{name}@{self.digest[:12]}", expected)
                if model.versions if owner == who else usable and model.released:
                    seen.add((owner, name))
            listed = self.store.adapters.list_visible(who)
            assert {(info.owner, info.name) for info in listed} == seen

    def _check(self, who: str, reference: str, digest: str | None) -> None:
        found = self.store.adapters.resolve(who, reference)
        assert (None if found is None else found.digest) == digest, reference


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=16, stateful_step_count=25, deadline=None)
