"""The model hub, and whether it is there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

HUB_TIMEOUT = 5.0
"""Seconds until a model hub that does not answer counts as absent."""

_log = logging.getLogger(__name__)


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Asks the model hub once whether it is there; if not, only the local cache is tried.

    The hub's own client tries every file again for half a minute. Yields the words for a message:
    which hub, and whether it answered.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        yield "the local cache (HF_HUB_OFFLINE is set)"
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:
        _log.info("the hub %s does not answer: %s", constants.ENDPOINT, error)
    else:
        yield constants.ENDPOINT
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield f"{constants.ENDPOINT}, which does not answer, nor from the local cache"
    finally:
        constants.HF_HUB_OFFLINE = False
