"""What an app declares, by name: the engine's view of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pavane.contract import INTERNAL, Contract
from pavane.engine.mailbox import mailbox_of
from pavane.errors import BadDeclaration, UnknownName
from pavane.event import places_of
from pavane.handler import Handler
from pavane.policy import Limit
from pavane.service import Service, Step
from pavane.workflow import KEEPER, Workflow

if TYPE_CHECKING:
    from pavane.schedule import Schedule


class Registry:
    """All services of an app, with their steps and workflows."""

    def __init__(self, services: Sequence[Service]) -> None:
        self.services: dict[str, Service] = {}
        self.workflows: dict[tuple[str, int], Workflow[..., Any]] = {}
        self.events: dict[str, type[Any]] = {}
        self.contracts: dict[str, Contract] = {}
        self.schedules: dict[str, Schedule] = {}
        self.limits: dict[tuple[str, str], Limit] = {}
        """By service and name."""
        self.announced: set[str] = set()
        """Workflows whose runs tell in the log of events that they began."""
        self._handlers: dict[str, list[Handler]] = {}
        self._collected = 0
        """How many declarations were taken in."""
        for service in services:
            if service.name in self.services:
                raise BadDeclaration(
                    f"Two services are called {service.name!r}; names must be unique in an app."
                )
            self.services[service.name] = service
        self.collect()

    def collect(self) -> None:
        """Take in what the services declare by now: an app may be made before they are filled."""
        services = self.services.values()
        declared = sum(len(s.steps) + len(s.workflows) + len(s.handlers) for s in services)
        if declared != self._collected:
            for service in services:
                self._collect_from(service)
            self._collected = declared

    def _collect_from(self, service: Service) -> None:
        for (name, version), workflow in service.workflows.items():
            other = self.workflows.setdefault((name, version), workflow)
            if other is not workflow:
                raise BadDeclaration(
                    f"Workflow {name!r} (version {version}) is declared by services "
                    f"{other.service.name!r} and {service.name!r}. Give one another name: "
                    f'@{service.name}.workflow(name="…").'
                )
            for event in workflow.receives:
                self._add_event(event)
        for step in service.steps.values():
            self._add_limit(service, step.options_.limit, step.limit_name, f"Step {step}")
        for workflow in service.workflows.values():
            self._add_limit(service, workflow.limit, workflow.limit_name, f"Workflow {workflow}")
        for handler in service.handlers.values():
            self._add_limit(
                service, handler.options.limit, handler.limit_name, f"Handler {handler}"
            )
        handlers = list(service.handlers.values())
        mailbox = mailbox_of(service)
        self._handlers[service.name] = [*handlers, mailbox] if mailbox else handlers
        for handler in handlers:
            for event in [*handler.events.values(), *(handler.emits or ())]:
                self._add_event(event)

    def handlers_of(self, service: str) -> list[Handler]:
        """Return the handlers of a service, with the one that keeps events for its runs."""
        return self._handlers.get(service, [])

    def handlers(self) -> list[Handler]:
        return [handler for handlers in self._handlers.values() for handler in handlers]

    def transactions_of(self, services: Iterable[str]) -> list[Step[..., Any] | Handler]:
        """Return what is declared to run inside the store's transaction."""
        chosen = [self.services[name] for name in services if name in self.services]
        steps = [step for service in chosen for step in service.steps.values()]
        handlers = [handler for service in chosen for handler in service.handlers.values()]
        return [
            *(step for step in steps if step.transaction),
            *(handler for handler in handlers if handler.options.transaction),
        ]

    def _add_event(self, event: type[Any]) -> None:
        known = self.events.setdefault(event.event_type, event)
        if known is not event:
            raise BadDeclaration(
                f"Two event classes are called {event.event_type!r}: {places_of(known, event)}. "
                f"Rename one, or give it type_name=."
            )

    def _add_limit(self, service: Service, limit: Limit | None, name: str, whose: str) -> None:
        if limit is None:
            return
        known = self.limits.setdefault((service.name, name), limit)
        if known is not limit and (known != limit or limit.name is None):
            raise BadDeclaration(
                f"{whose} has a limit called {name!r}, and so has something else of service "
                f"{service.name!r}. Give one another name, Limit(…, name=…), or, if they share it, "
                f"use one Limit(…, name={name!r}) for both."
            )

    def add_contract(self, contract: Contract) -> None:
        if contract.name in self.contracts:
            raise BadDeclaration(
                f"Two conversations are called {contract.name!r}. Give one another name: "
                f'app.conversation(…, name="…").'
            )
        known = {name for name, _ in self.workflows}
        if contract.workflow and contract.workflow not in known:
            raise BadDeclaration(
                f"Conversation {contract.name!r} begins with a workflow that no service of this "
                f"app has. {unknown('workflow', contract.workflow, known)}"
            )
        for event in contract.classes:
            self._add_event(event)
        self.contracts[contract.name] = contract
        if contract.workflow:
            self.announced.add(contract.workflow)

    def add_schedule(self, schedule: Schedule) -> None:
        if schedule.name in self.schedules:
            raise BadDeclaration(
                f"Two schedules are called {schedule.name!r}. Give one another name: "
                f'app.schedule(…, name="…").'
            )
        workflow, keeper = schedule.workflow, schedule.keeper
        if self.workflows.get((workflow.name, workflow.version)) is not workflow:
            raise BadDeclaration(
                f"Schedule {schedule.name!r} is to start {workflow!r}, which does not belong to "
                f"this app; list its service in App(services=[…])."
            )
        self.schedules[schedule.name] = schedule
        self.workflows[keeper.name, keeper.version] = keeper

    def contract(self, name: str) -> Contract:
        found = self.contracts.get(name)
        if found is None:
            raise UnknownName(unknown("conversation contract", name, self.contracts))
        return found

    def service(self, name: str) -> Service:
        found = self.services.get(name)
        if found is None:
            raise UnknownName(unknown("service", name, self.services))
        return found

    def step(self, service: str, name: str) -> Step[..., Any]:
        """Return a step, or raise UnknownName."""
        found = self.service(service).steps.get(name)
        if found is None:
            raise UnknownName(
                unknown(f"step of service {service!r}", name, self.service(service).steps)
            )
        return found

    def workflow_names(self) -> set[str]:
        """Return the names of all workflows that users declared."""
        return {name for name, _ in self.workflows if not name.startswith(INTERNAL)}

    def workflow(self, name: str, version: int | None = None) -> Workflow[..., Any]:
        """Return the workflow of this name; without `version`, the newest."""
        if version is not None and (name, version) in self.workflows:
            return self.workflows[name, version]
        versions = sorted(v for n, v in self.workflows if n == name)
        if not versions:
            if name.startswith(KEEPER):
                schedule = name.removeprefix(KEEPER)
                raise UnknownName(
                    f"Schedule {schedule!r} is not declared any more. Declare it again, or end it: "
                    f"`pavane schedules delete {schedule}`."
                )
            raise UnknownName(unknown("workflow", name, self.workflow_names()))
        found = self.workflows.get((name, versions[-1] if version is None else version))
        if found is None:
            listed = ", ".join(map(str, versions))
            raise UnknownName(
                f"Workflow {name!r} has no version {version} here; it has: {listed}. Keep old "
                f"versions declared (version={version}) until their runs have ended."
            )
        return found


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = get_close_matches(name, names, 1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"No {what} is called {name!r}.{hint} Known: {', '.join(names) or 'none'}."
