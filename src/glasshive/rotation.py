"""The next root of a swarm: other holders, other thresholds, or a later end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from glasshive.security.trust_root import KeyId, new_root
from glasshive.trust_files import Holder, TrustFolderError
from glasshive.trust_folder import TrustFolder

RoleName = Literal["root", "whitelist"]


def rotated(
    folder: TrustFolder,
    *,
    add: Sequence[Holder],
    remove: Sequence[str],
    roles: Collection[RoleName],
    root_threshold: int | None,
    whitelist_threshold: int | None,
    expires_seconds: int,
) -> bytes:
    """The document of the root after the newest, not signed yet.

    `remove` are names of holders, or the first 8 or more digits of a key's id. The `roles` lose
    and get holders. Raises TrustFolderError, and BadTrustDocument for a threshold that the
    holders can't meet.
    """
    root = folder.root()
    keys: dict[RoleName, list[KeyId]] = {
        "root": list(root.root_keys),
        "whitelist": list(root.whitelist_keys),
    }
    for named in remove:
        found = [one for role in roles for one in keys[role] if _is(folder, one, named)]
        if len(set(found)) != 1:
            names = sorted({folder.name_of(one) for role in roles for one in keys[role]})
            raise TrustFolderError(
                f"{'several holders are' if found else 'no holder of the role is'} called "
                f"{named[:64]!r}; there are {', '.join(names)}"
            )
        for role in roles:
            keys[role] = [one for one in keys[role] if one != found[0]]
    public = {one.key_id: one.public_key for one in add}
    for holder in add:
        for role in roles:
            if holder.key_id in keys[role]:
                raise TrustFolderError(
                    f"{holder.name} ({holder.key_id[:16]}) is a holder of the {role} role already"
                )
            keys[role].append(holder.key_id)

    def bytes_of(role: RoleName) -> list[bytes]:
        return [public.get(one) or root.public_key(one) for one in keys[role]]

    return new_root(
        version=root.version + 1,
        expires_seconds=expires_seconds,
        root_keys=bytes_of("root"),
        root_threshold=root_threshold or root.root_threshold,
        whitelist_keys=bytes_of("whitelist"),
        whitelist_threshold=whitelist_threshold or root.whitelist_threshold,
    )


def _is(folder: TrustFolder, key_id: KeyId, named: str) -> bool:
    holder = folder.holders().get(key_id)
    by_id = len(named) >= 8 and key_id.startswith(named)
    return by_id or (holder is not None and holder.name == named)
