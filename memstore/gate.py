"""Gate: what every call passes before the service sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memstore import access
from memstore.errors import MemstoreError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from memstore.access import Identity
    from memstore.auth import Authenticator, Credentials
    from memstore.quotas import Quotas


class Gate:
    """Lets calls through: a credential that is good now, and reaches as far as the method; no more than the quota.

    Used by one thread.
    """

    def __init__(self, authenticator: Authenticator, quotas: Quotas) -> None:
        self.authenticator = authenticator
        self._quotas = quotas

    def meet(self, path: str, credentials: Credentials) -> None:
        """Lets a call through of which no message is read yet; a stream's steps are counted one by one, by `admit`.

        Raises what `enter` would, and Overloaded, as far as that is known before names in certificates are; nothing for
        public methods.
        """
        access.check_row(path)
        if access.SCOPES[path] and not self.authenticator.wants_names:
            identity = self.enter(path, credentials)
            if path not in access.STREAMS:
                self._quotas.call(identity.tenant)

    def enter(self, path: str, credentials: Credentials) -> Identity:
        """Who calls the method of this path. Raises NotAuthenticated, NotAllowed."""
        identity = self.authenticator.identify(credentials)
        access.check(path, identity)
        return identity

    def is_open(self, path: str, credentials: Credentials) -> bool:
        """True while the caller may enter."""
        try:
            self.enter(path, credentials)
        except MemstoreError:
            return False
        return True

    def admit(self, path: str, identity: Identity, request: Message) -> None:
        """Lets one request of an identity that has entered through. Raises NotAllowed, Overloaded."""
        access.check_request(path, identity, request)
        if path in access.STREAMS or self.authenticator.wants_names:  # others were counted when they were met
            self._quotas.call(identity.tenant)
