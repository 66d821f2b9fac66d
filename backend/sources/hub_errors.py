"""What went wrong between us and the Hub, as a sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator

from backend.errors import DataError, ModelError, QuantdeckError
from backend.schema import DEMO

TOKEN_ADVICE = "enter a token on the page New job, or with `python -m backend token set`"
WORKS_OFFLINE = "The built-in model, local folders and models in the cache need no network"


class HubUnreachable(ModelError):
    """The Hub gave no usable answer; what is on this machine can still be used."""


def hub_error(error: BaseException, name: str = "", revision: str | None = None) -> QuantdeckError:
    """The error to show for one that huggingface_hub or its HTTP client raised.

    Args:
        error: What was raised.
        name: The model that was asked for; empty for a search.
        revision: The branch, tag or commit that was asked for.
    """
    from huggingface_hub import errors

    if isinstance(error, QuantdeckError):
        return error
    chain = list(_causes(error))
    what = name or "the search"
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return HubUnreachable(f"MODEL: {what}: the Hub is not asked, since HF_HUB_OFFLINE is set. {WORKS_OFFLINE}")
    if any(isinstance(one, errors.GatedRepoError) for one in chain):
        return ModelError(f"MODEL: {name} is gated: accept its licence on its Hub page, then {TOKEN_ADVICE}")
    if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain):
        return ModelError(f"MODEL: the Hub has no model {name}, or it is private; check the name, or {TOKEN_ADVICE}")
    if any(isinstance(one, errors.RevisionNotFoundError) for one in chain):
        return ModelError(
            f"REVISION: {name} has no branch, tag or commit {revision!r}; leave it empty "
            "for the newest of its main branch"
        )
    if any(isinstance(one, errors.DisabledRepoError) for one in chain):
        return ModelError(f"MODEL: the Hub has disabled access to {name}; choose another model")
    status = next((code for one in chain if (code := _status(one))), 0)
    if status == 401:
        return ModelError(f"MODEL: {what}: the Hub does not accept the token; {TOKEN_ADVICE}")
    if status == 403:
        return ModelError(f"MODEL: {what}: the Hub forbids access (403); the token may lack the right to read it")
    if status == 404:
        return ModelError(f"MODEL: {what}: the Hub does not have that (404); check the name and the revision")
    if status == 429:
        return HubUnreachable(f"MODEL: {what}: the Hub is busy (429, too many requests); try again in a minute")
    if status >= 500:
        return HubUnreachable(f"MODEL: {what}: the Hub is ill (it answers {status}); try again later. {WORKS_OFFLINE}")
    if any(isinstance(one, (ValueError, KeyError, TypeError, AttributeError)) for one in chain[:1]):
        return HubUnreachable(
            f"MODEL: {what}: the answer is not one of the Hub; check the network, or HF_ENDPOINT. {WORKS_OFFLINE}"
        )
    # The deepest reason is the one that tells: "Connection refused" below "cannot find the file on the Hub".
    lines = [str(one).strip().partition("\n")[0] for one in reversed(chain)]
    reason = next(filter(None, lines), type(error).__name__)
    return HubUnreachable(f"MODEL: {what}: the Hub cannot be reached ({reason}); check the network. {WORKS_OFFLINE}")


def dataset_error(error: BaseException, name: str) -> DataError | None:
    """The same for a dataset; None for what is not about the Hub, e.g. a split that does not exist.

    Args:
        error: What `datasets` raised: its own errors hide those of huggingface_hub.
        name: The dataset that was asked for.
    """
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    chain = list(_causes(error))
    instead = f"DATA_PATH and '{DEMO}', the built-in text, need no network"
    status = next((code for one in chain if (code := _status(one))), 0)
    offline = errors.OfflineModeIsEnabled
    if any(isinstance(one, offline) or offline.__name__ in str(one) for one in chain):
        told = f"{name} is not on this machine, and the Hub is not asked, since HF_HUB_OFFLINE is set. {instead}"
    elif any(isinstance(one, errors.GatedRepoError) or "is a gated dataset" in str(one) for one in chain):
        told = f"{name} is gated: accept its conditions on its Hub page, then {TOKEN_ADVICE}"
    elif any(isinstance(one, (errors.RepositoryNotFoundError, DatasetNotFoundError)) for one in chain):
        told = f"the Hub has no dataset {name}, or it is private; check the name, or {TOKEN_ADVICE}"
    elif status == 401:
        told = f"{name}: the Hub does not accept the token; {TOKEN_ADVICE}"
    elif status == 403:
        told = f"{name}: the Hub forbids access (403); the token may lack the right to read it"
    elif status == 429:
        told = f"{name}: the Hub is busy (429, too many requests); try again in a minute"
    elif status >= 500:
        told = f"{name}: the Hub is ill (it answers {status}); try again later. {instead}"
    elif reason := next((str(one).strip().partition("\n")[0] for one in chain if _is_network(one)), ""):
        told = f"{name}: the connection to the Hub failed ({reason}); check the network. {instead}"
    else:
        return None
    return DataError(f"DATASET_NAME: {told}")


def _is_network(error: BaseException) -> bool:
    import httpx

    return isinstance(error, (httpx.TransportError, ConnectionError, TimeoutError))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or now.__context__


def _status(error: BaseException) -> int:
    code = getattr(getattr(error, "response", None), "status_code", 0)
    return code if isinstance(code, int) else 0
