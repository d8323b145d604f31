"""A shop by events alone, for tests of what the command line shows and steers."""

from __future__ import annotations

from pathlib import Path

from pavane import App, EngineConfig, Event, Retry, Service, receive

SHUT = Path("bank-is-shut")
"""While this file exists, no charge succeeds."""


class OrderPlaced(Event, key="order_id", version=2):
    order_id: str
    cents: int = 0


@OrderPlaced.upcast(1)
def in_cents(old: dict[str, object]) -> dict[str, object]:
    return {"order_id": old["order_id"], "cents": int(str(old["euros"])) * 100}


class Charged(Event, key="order_id"):
    order_id: str
    cents: int


class Thanked(Event, key="order_id"):
    order_id: str
    text: str


payments, mail, audit = Service("payments"), Service("mail"), Service("audit")


@payments.on(OrderPlaced, retry=Retry(attempts=2, first="1ms", jitter=0), breaker=None)
async def charge(event: OrderPlaced) -> Charged:
    if SHUT.exists():
        raise ConnectionError(f"no line for {event.order_id}, tried {event.cents} cents")
    if event.cents <= 0:
        raise ValueError(f"nothing to charge for {event.order_id}")
    return Charged(order_id=event.order_id, cents=event.cents)


@mail.on(Charged)
async def thank(event: Charged) -> Thanked:
    return Thanked(order_id=event.order_id, text=f"thanks for {event.cents}")


@mail.on(Charged, shadow=True)
async def thank_warmly(event: Charged) -> Thanked | None:
    if event.cents == 13:
        raise ValueError("unlucky")
    warm = "many " if event.cents > 500 else ""
    return Thanked(order_id=event.order_id, text=f"{warm}thanks for {event.cents}")


@mail.on(Charged, share=0.5, instead_of=thank)
async def thank_briefly(event: Charged) -> Thanked:
    return Thanked(order_id=event.order_id, text=f"thanks for {event.cents}")


@audit.workflow(starts_on=OrderPlaced, receives=[Thanked])
async def follow(order: OrderPlaced) -> str:
    thanked = await receive(Thanked, key=order.order_id)
    return thanked.text


app = App(
    "event_shop", services=[payments, mail, audit], store="event_shop.db",
    config=EngineConfig(lease_s=5.0),
)  # fmt: skip
