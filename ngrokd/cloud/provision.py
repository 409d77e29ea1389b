"""Carrying out what `identity.next_step` decided: key, request, certificate, disk, in the order that leaves no orphan.

The disk is asked first and told last. An operator that could not be kept is deleted again at ngrok, because nobody
else ever would.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from ngrokd.cloud.api import NgrokApi, Operator
from ngrokd.cloud.identity import BadPair, IdentityStore, Step, StoredIdentity, credentials_of, new_key_and_csr
from ngrokd.endpoints import Credentials
from ngrokd.errors import ApiError, StateError

_ROLL_BACK_S = 5.0


async def obtain(
    api: NgrokApi, store: IdentityStore, step: Step, stored: StoredIdentity, *, selectors: Sequence[str] = ("true",)
) -> tuple[StoredIdentity, Operator]:
    """Register or renew, and keep the result.

    Cancelled, ngrok may have registered an operator or issued a certificate that we never learn of; what is on the disk
    is the old identity or the new one.

    Args:
        step: REGISTER or RENEW.
        stored: what there is now; its operator is the one renewed.
        selectors: which endpoints a new operator is bound to.

    Returns:
        The identity that is on the disk now, and the operator as ngrok described it (its ingress).

    Raises:
        StateError: it cannot be kept; nothing is registered.
        OperatorGoneError: RENEW, and ngrok does not know the operator any more: REGISTER is the next step.
        ApiError: ngrok refused, could not be reached, or issued something unusable.
    """
    assert step is not Step.USE
    store.check_writable()
    key_pem, csr_pem = new_key_and_csr()
    if step is Step.RENEW:
        operator = await api.renew(stored.operator_id, csr_pem)
        _keep(store, operator, key_pem)
    else:
        operator = await api.register(csr_pem, selectors)
        try:
            _keep(store, operator, key_pem)
        except (ApiError, StateError):
            await _roll_back(api, operator.id)
            raise
    return StoredIdentity(operator.id, _credentials(operator, key_pem)), operator


def _keep(store: IdentityStore, operator: Operator, key_pem: bytes) -> None:
    store.save(operator.id, _credentials(operator, key_pem))


def _credentials(operator: Operator, key_pem: bytes) -> Credentials:
    try:
        return credentials_of(key_pem, operator.certificate_pem)
    except BadPair as error:
        raise ApiError(f"ngrok issued a certificate for operator {operator.id} that cannot be used: {error}") from error


async def _roll_back(api: NgrokApi, operator_id: str) -> None:
    # Even when we are being cancelled: nobody will delete it later.
    with trio.move_on_after(_ROLL_BACK_S, shield=True):
        try:
            await api.delete_operator(operator_id)
        except ApiError:
            return  # the error on the way is the one to tell
