"""What a worker's settings keep it from, logged at its start."""

from __future__ import annotations

from .. import log
from ..config import WorkerConfig
from ..registry import Registry
from ..rules import rules_of

logger = log.logger("notifyq.worker")


def log_unreachable(registry: Registry, config: WorkerConfig) -> None:
    """Log which batch handlers never get as many tasks as they take, and which queues of tasks aren't served."""
    for handler in registry.handlers:
        if handler.batch is not None and handler.batch > config.concurrency:
            logger.warning(
                "a batch counts as that many of the worker's concurrency, so it gets no larger than that",
                extra={"fields": {"handler": handler.name, "batch": handler.batch, "concurrency": config.concurrency}},
            )
    named: set[str] = {rules["queue"] for each in registry.handlers if "queue" in (rules := rules_of(each.task))}
    if unserved := sorted(named - config.queues.keys()):
        logger.info(
            "this worker doesn't serve these queues, which classes of its tasks name (notifyq worker -q)",
            extra={"fields": {"queues": unserved}},
        )
