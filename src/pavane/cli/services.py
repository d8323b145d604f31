"""`pavane services`: what an app declares, and which nodes work for it."""

from __future__ import annotations

import asyncio

import click
import msgspec

from pavane.app import App, Client
from pavane.cli.connection import Where, connected, where_options
from pavane.cli.output import Format, is_unicode, output_option, print_json, say
from pavane.cli.text import counted, printable
from pavane.engine.process import is_gone, this_host
from pavane.errors import StoreError
from pavane.handler import Handler
from pavane.policy import ONCE
from pavane.service import Service, Step
from pavane.workflow import Workflow


class StepLine(msgspec.Struct):
    name: str
    attempts: int
    """How often it is tried; 0: without limit."""
    timeout_s: float | None
    heartbeat_s: float | None
    undo: str


class WorkflowLine(msgspec.Struct):
    name: str
    version: int
    mode: str
    receives: list[str]
    timeout_s: float | None


class HandlerLine(msgspec.Struct):
    name: str
    events: list[str]
    emits: list[str] | None
    """What it publishes; None where the code does not say."""
    attempts: int
    starts: str
    """The workflow that it starts runs of."""
    facts: list[str]
    """What else is declared, in words."""


class HostLine(msgspec.Struct):
    node: str
    pid: int
    alive: bool
    partitions: int


class ServiceLine(msgspec.Struct):
    """One service; `hosts` is empty and `free` None when there is no store to look at yet."""

    name: str
    workflows: list[WorkflowLine]
    steps: list[StepLine]
    handlers: list[HandlerLine]
    hosts: list[HostLine]
    partitions: int
    free: int | None


@click.command(
    epilog="""\b
Examples:
  pavane services --app shop.py
  pavane services --app shop:app --store /var/lib/shop/shop.db -o json
"""
)
@where_options
@output_option
def services(where: Where, output: Format) -> None:
    """Show an app's services: workflows, steps, handlers, and the nodes that host them."""
    app = where.app()
    lines = [_declared(service) for service in app.registry.services.values()]
    note = asyncio.run(_look(app, where.store, lines))
    if output != "table":
        print_json(lines, output)
        return
    for line in lines:
        _print_service(line)
    if note:
        say(note)


def _declared(service: Service) -> ServiceLine:
    return ServiceLine(
        service.name,
        [_workflow(workflow) for workflow in service.workflows.values()],
        [_step(step) for step in service.steps.values()],
        [_handler(handler) for handler in service.handlers.values()],
        [], 0, None,
    )  # fmt: skip


def _workflow(workflow: Workflow[..., object]) -> WorkflowLine:
    received = [event.event_type for event in workflow.receives]
    return WorkflowLine(
        workflow.name, workflow.version, workflow.mode, received, workflow.timeout_s
    )


def _step(step: Step[..., object]) -> StepLine:
    options = step.options_
    undo = "" if options.undo is None else repr(options.undo)
    return StepLine(
        step.name, (options.retry or ONCE).attempts, options.timeout_s, options.heartbeat_s, undo
    )


def _handler(handler: Handler) -> HandlerLine:
    options = handler.options
    facts: list[str] = []
    if options.shadow:
        facts.append(f"shadow of {handler.instead_of}")
    if options.share is not None:
        facts.append(f"takes {options.share:.1%} of {handler.instead_of}")
    facts += [f"keeps {options.state.__name__} per key"] if options.state is not None else []
    facts += [f"batches of {options.batch}"] if options.batch > 1 else []
    facts += [f"at most {options.rate_per_s:g}/s"] if options.rate_per_s else []
    facts += ["in a transaction"] if options.transaction else []
    facts += ["a dead letter stops its key"] if options.on_dead == "stop" else []
    emits = None if handler.emits is None else [event.event_type for event in handler.emits]
    starts = "" if handler.starts is None else handler.starts.name
    return HandlerLine(
        handler.name, list(handler.events), emits, options.retry.attempts, starts, facts
    )


async def _look(app: App, store: str | None, lines: list[ServiceLine]) -> str:
    """Fill in who hosts what; return a sentence if that cannot be told."""
    try:
        async with connected(app, store) as client:
            await _fill_hosts(client, lines)
    except StoreError as error:
        if store is not None:
            raise
        return f"No nodes: {error}"
    return ""


async def _fill_hosts(client: Client, lines: list[ServiceLine]) -> None:
    now_us, host = client.store.now_us(), this_host()
    nodes = await client.store.nodes()
    partitions = await client.store.partition_rows([line.name for line in lines])
    for line in lines:
        mine = [row for row in partitions if row.service == line.name]
        line.partitions = len(mine)
        line.free = sum(row.owner is None for row in mine)
        line.hosts = [
            HostLine(
                node.name, node.pid, not is_gone(node, now_us, host),
                sum(row.owner == node.no for row in mine),
            )
            for node in nodes if line.name in node.services
        ]  # fmt: skip


def _print_service(line: ServiceLine) -> None:
    dot = " · " if is_unicode() else " - "
    click.echo(click.style(printable(line.name), bold=True) + "  " + _hosts_text(line))
    for workflow in line.workflows:
        facts = [workflow.mode]
        facts += [f"receives {', '.join(workflow.receives)}"] if workflow.receives else []
        facts += [f"timeout {workflow.timeout_s:g} s"] if workflow.timeout_s else []
        name = f"{workflow.name} v{workflow.version}"
        click.echo(f"  workflow  {name.ljust(24)} {click.style(dot.join(facts), dim=True)}")
    for step in line.steps:
        facts: list[str] = []
        if step.attempts != ONCE.attempts:
            facts.append(f"{step.attempts} attempts" if step.attempts else "retried without limit")
        facts += [f"timeout {step.timeout_s:g} s"] if step.timeout_s else []
        facts += [f"heartbeat {step.heartbeat_s:g} s"] if step.heartbeat_s else []
        facts += [f"undone by {step.undo}"] if step.undo else []
        text = f"  step      {step.name.ljust(24)} {click.style(dot.join(facts), dim=True)}"
        click.echo(text.rstrip())
    for handler in line.handlers:
        _print_handler(handler, dot)


def _print_handler(line: HandlerLine, dot: str) -> None:
    facts = [f"on {', '.join(line.events)}"]
    if line.starts:
        facts.append(f"starts {line.starts}")
    elif line.emits:
        facts.append(f"publishes {', '.join(line.emits)}")
    facts += line.facts
    click.echo(f"  handler   {line.name.ljust(24)} {click.style(dot.join(facts), dim=True)}")


def _hosts_text(line: ServiceLine) -> str:
    if line.free is None:
        return ""
    hosts = [
        f"{host.node} ({host.partitions} of {counted(line.partitions, 'partition')})"
        if host.alive else f"{host.node} (gone)"
        for host in line.hosts
    ]  # fmt: skip
    if not any(host.alive for host in line.hosts):
        return click.style(", ".join([*hosts, "no node hosts it"]), fg="yellow")
    free = [f"{line.free} free"] if line.free else []
    return click.style(", ".join(hosts + free), fg="green")
