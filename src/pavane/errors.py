"""Every error a user can meet: one tree, each with a stable code and a sentence that teaches.

Control flow of the engine inside workflow code (`Discarded`, `ContinueAsNew`) derives from
`BaseException`, so that a bare `except Exception` in a workflow cannot swallow it.
"""

from __future__ import annotations


class PavaneError(Exception):
    """The root of all errors that Pavane raises on purpose. `code` is stable across releases."""

    code = "pavane"


class BadDeclaration(PavaneError):
    """A service, step, workflow or event is declared in a way that cannot work."""

    code = "bad-declaration"


class BadArguments(PavaneError):
    """Arguments do not fit the signature of a step or workflow."""

    code = "bad-arguments"


class NotEncodable(PavaneError):
    """A value cannot be written as JSON."""

    code = "not-encodable"


class NotDecodable(PavaneError):
    """Stored data does not fit the declared type."""

    code = "not-decodable"


class TooLarge(PavaneError):
    """A payload is above the limit; nothing was written."""

    code = "too-large"


class NotInWorkflow(PavaneError):
    """Workflow code tried to do I/O, use a thread or start a process."""

    code = "not-in-workflow"


class NotInHandler(PavaneError):
    """A handler tried to do through its app what must be written with its commit."""

    code = "not-in-handler"


class NotInSimulation(PavaneError):
    """A step or handler that is simulated tried to leave the simulation."""

    code = "not-in-simulation"


class OnlyInWorkflow(PavaneError):
    """A call that needs a running workflow (or step) was made outside of one."""

    code = "only-in-workflow"


class UndeclaredReceive(PavaneError):
    """A workflow waits for an event type that it did not declare."""

    code = "undeclared-receive"


class StepError(PavaneError):
    """Stands in for an exception whose class cannot be found in this process.

    `type_name` is the original class as `module:QualName`, `message` its text.
    """

    code = "step-error"

    def __init__(self, type_name: str, message: str) -> None:
        super().__init__(type_name, message)
        self.type_name = type_name
        self.message = message

    def __str__(self) -> str:
        return f"{self.type_name.rpartition(':')[2]}: {self.message}"


class StepTimeout(PavaneError, TimeoutError):
    """An attempt of a step took longer than its `timeout`; whether it took effect is unknown."""

    code = "step-timeout"


class HeartbeatTimeout(StepTimeout):
    """A step with `heartbeat=` was silent for longer than that."""

    code = "heartbeat-timeout"


class RunFailed(PavaneError):
    """`result()` of a run that did not complete; `__cause__` is the workflow's own error."""

    code = "run-failed"

    def __init__(self, message: str, *, status: str = "failed") -> None:
        super().__init__(message)
        self.status = status


class RunTimeout(PavaneError, TimeoutError):
    """A run reached its `timeout` and was ended (with clean-up, as when cancelled)."""

    code = "run-timeout"


class UnknownRun(PavaneError):
    """No run has this id in this store."""

    code = "unknown-run"


class RunConflict(PavaneError):
    """A run of this id exists already, with another workflow or other arguments."""

    code = "run-conflict"


class RunEnded(PavaneError):
    """The run has ended; it takes no more events or requests."""

    code = "run-ended"


class UnknownName(PavaneError):
    """A workflow, step, service, event or version of this name is not declared."""

    code = "unknown-name"


class StoreError(PavaneError):
    """The store cannot be used; the text says why and what to do."""

    code = "store"


class NoStore(StoreError):
    """Whoever only looks finds none at the address, or one that lives inside another process."""


class LeaseLost(PavaneError):
    """This node's lease was taken over; nothing of the refused batch was written."""

    code = "lease-lost"


class Mismatch(PavaneError):
    """The journal does not fit the code: replay did something else than was recorded."""

    code = "mismatch"


class NotUndone(PavaneError):
    """A compensation cannot be carried out; its run is stuck with all that is left to be undone."""

    code = "not-undone"


class CorruptJournal(PavaneError):
    """A journal row cannot be read; its run is stuck, all others go on."""

    code = "corrupt-journal"


class OnlyInHandler(PavaneError):
    """A call that needs a running handler was made outside of one."""

    code = "only-in-handler"


class BadEvent(PavaneError):
    """Data of an event does not fit its class, in its version or through its upcasts."""

    code = "bad-event"


class NotDeclared(PavaneError):
    """A handler returned or published something that it does not declare to emit."""

    code = "not-declared"


class WorkFailed(PavaneError):
    """What ran inside the store's transaction raised; `error` is what. Nothing was written."""

    code = "work-failed"

    def __init__(self, error: BaseException) -> None:
        super().__init__(repr(error))
        self.error = error


class Locked(PavaneError):
    """A transaction waited in vain for a lock of another one; it is tried again, uncounted."""

    code = "locked"
    pause_s = 1.0
    """How long others are written, before it is tried again."""


class Discarded(BaseException):
    """Raised in code of an execution that is being put away; never seen by callers."""


class ContinueAsNew(BaseException):
    """Ends a run and continues it as a new one with a fresh journal."""

    def __init__(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        super().__init__()
        self.new_args = args
        self.new_kwargs = kwargs
