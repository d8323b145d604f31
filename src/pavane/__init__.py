"""Business processes that span services: written once, orchestrated or choreographed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "pavane.app": ("App", "Client", "Run", "RunHistory", "RunStatus"),
    "pavane.contract": ("Contract", "ConversationOverdue"),
    "pavane.core.saga": ("saga",),
    "pavane.engine.config": ("EngineConfig",),
    "pavane.event": ("Event", "event"),
    "pavane.handler": ("Breaker", "Delivery", "Handler", "delete_state", "delivery"),
    "pavane.policy": ("Limit", "Retry"),
    "pavane.service": ("Service", "Step", "StepInfo", "heartbeat", "step_info"),
    "pavane.steering.dead": ("DeadQuery",),
    "pavane.steering.events": ("Replay",),
    "pavane.stores.eventlog": ("EventFilter",),
    "pavane.stores.port": ("RunFilter",),
    "pavane.workflow": (
        "Workflow", "choreographed", "continue_as_new", "now", "orchestrated", "patched", "random",
        "receive", "run_id", "scheduled_time", "set_attributes", "uuid4",
    ),
    "pavane.errors": (
        "BadArguments", "BadDeclaration", "CorruptJournal", "HeartbeatTimeout", "LeaseLost",
        "Mismatch", "NotDecodable", "NotEncodable", "NotInHandler", "NotInWorkflow",
        "OnlyInHandler", "OnlyInWorkflow", "PavaneError", "RunConflict", "RunEnded", "RunFailed",
        "RunTimeout", "StepError", "StepTimeout", "StoreError", "TooLarge", "UndeclaredReceive",
        "UnknownName", "UnknownRun",
    ),
}  # fmt: skip
_MODULES = ("outbox",)
_WHERE = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from pavane import outbox as outbox
    from pavane.app import App as App
    from pavane.app import Client as Client
    from pavane.app import Run as Run
    from pavane.app import RunHistory as RunHistory
    from pavane.app import RunStatus as RunStatus
    from pavane.contract import Contract as Contract
    from pavane.contract import ConversationOverdue as ConversationOverdue
    from pavane.core.saga import saga as saga
    from pavane.engine.config import EngineConfig as EngineConfig
    from pavane.errors import BadArguments as BadArguments
    from pavane.errors import BadDeclaration as BadDeclaration
    from pavane.errors import CorruptJournal as CorruptJournal
    from pavane.errors import HeartbeatTimeout as HeartbeatTimeout
    from pavane.errors import LeaseLost as LeaseLost
    from pavane.errors import Mismatch as Mismatch
    from pavane.errors import NotDecodable as NotDecodable
    from pavane.errors import NotEncodable as NotEncodable
    from pavane.errors import NotInHandler as NotInHandler
    from pavane.errors import NotInWorkflow as NotInWorkflow
    from pavane.errors import OnlyInHandler as OnlyInHandler
    from pavane.errors import OnlyInWorkflow as OnlyInWorkflow
    from pavane.errors import PavaneError as PavaneError
    from pavane.errors import RunConflict as RunConflict
    from pavane.errors import RunEnded as RunEnded
    from pavane.errors import RunFailed as RunFailed
    from pavane.errors import RunTimeout as RunTimeout
    from pavane.errors import StepError as StepError
    from pavane.errors import StepTimeout as StepTimeout
    from pavane.errors import StoreError as StoreError
    from pavane.errors import TooLarge as TooLarge
    from pavane.errors import UndeclaredReceive as UndeclaredReceive
    from pavane.errors import UnknownName as UnknownName
    from pavane.errors import UnknownRun as UnknownRun
    from pavane.event import Event as Event
    from pavane.event import event as event
    from pavane.handler import Breaker as Breaker
    from pavane.handler import Delivery as Delivery
    from pavane.handler import Handler as Handler
    from pavane.handler import delete_state as delete_state
    from pavane.handler import delivery as delivery
    from pavane.policy import Limit as Limit
    from pavane.policy import Retry as Retry
    from pavane.service import Service as Service
    from pavane.service import Step as Step
    from pavane.service import StepInfo as StepInfo
    from pavane.service import heartbeat as heartbeat
    from pavane.service import step_info as step_info
    from pavane.steering.dead import DeadQuery as DeadQuery
    from pavane.steering.events import Replay as Replay
    from pavane.stores.eventlog import EventFilter as EventFilter
    from pavane.stores.port import RunFilter as RunFilter
    from pavane.workflow import Workflow as Workflow
    from pavane.workflow import choreographed as choreographed
    from pavane.workflow import continue_as_new as continue_as_new
    from pavane.workflow import now as now
    from pavane.workflow import orchestrated as orchestrated
    from pavane.workflow import patched as patched
    from pavane.workflow import random as random
    from pavane.workflow import receive as receive
    from pavane.workflow import run_id as run_id
    from pavane.workflow import scheduled_time as scheduled_time
    from pavane.workflow import set_attributes as set_attributes
    from pavane.workflow import uuid4 as uuid4

__all__ = sorted([*_WHERE, *_MODULES])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"pavane.{name}")
    home = _WHERE.get(name)
    if home is None:
        raise AttributeError(f"module 'pavane' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
