"""Payment processing: authorise, check for fraud, capture, book, send a receipt; undo what fails.

    python examples/payments.py

Five services have a part in a payment. What can go wrong here goes wrong in every shop: cards are
declined, banks answer late or not at all, a check says no halfway, the books refuse an entry after
the money has moved. The process is one function, `pay`; run orchestrated or choreographed, it must
leave the same money in the same places.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from pavane import App, Retry, Run, RunFailed, Service, saga, step_info

checkout, bank, fraud, ledger, receipts = map(
    Service, ("checkout", "bank", "fraud", "ledger", "receipts")
)


@dataclass(frozen=True)
class Payment:
    """What a customer wants to pay, in cents."""

    customer: str
    card: str
    cents: int


@dataclass(frozen=True)
class Outcome:
    """How a payment ended for the customer: with a receipt, or with the reason why not."""

    status: Literal["paid", "refunded", "declined", "refused"]
    detail: str
    hold: str = ""
    """The bank's number of it, for a refund."""


class CardDeclined(Exception):
    """The bank says no. It will say no again, so nobody should ask twice."""


class Suspicious(Exception):
    """The fraud check says no."""


class BooksClosed(Exception):
    """The ledger takes no entry of this size without a person."""


# -- the outside world -------------------------------------------------------------------------


@dataclass
class Bank:
    """Stands for the bank. It knows each request by its key, and a repeated one moves no money."""

    holds: dict[str, int] = field(default_factory=dict[str, int])
    captured: dict[str, int] = field(default_factory=dict[str, int])
    refunded: set[str] = field(default_factory=set[str])

    def kept_cents(self) -> int:
        """Money that left customers for good."""
        return sum(cents for hold, cents in self.captured.items() if hold not in self.refunded)

    def held_cents(self) -> int:
        """Money that is blocked on cards and neither captured nor let go."""
        return sum(cents for hold, cents in self.holds.items() if hold not in self.captured)


THE_BANK = Bank()
THE_BOOKS: defaultdict[str, int] = defaultdict(int)
"""Cents by entry; a reversed entry stands at zero."""


# -- steps -------------------------------------------------------------------------------------

# A declined card is final, everything else may be a hiccup. A time-out says nothing about whether
# the bank has done it, so each attempt goes out under the same key and the bank does it once.
ASK_THE_BANK = Retry(attempts=4, first="50ms", give_up=(CardDeclined,))


@bank.step(retry=ASK_THE_BANK, timeout="250ms")
async def authorise(card: str, cents: int) -> str:
    """Block the money on the card; return the hold's number."""
    key = step_info().idempotency_key
    if card == "declined":
        raise CardDeclined("insufficient funds")
    THE_BANK.holds.setdefault(key, cents)
    if card == "slow" and step_info().attempt == 1:
        await asyncio.sleep(60)  # the money is blocked, but the answer is lost
    return key


@bank.step(retry=ASK_THE_BANK)
async def void(hold: str) -> None:
    """Let blocked money go; of a captured hold nothing is left to let go."""
    THE_BANK.holds.pop(hold, None)


@bank.step(retry=ASK_THE_BANK, timeout="250ms")
async def capture(hold: str) -> None:
    """Take the blocked money."""
    THE_BANK.captured.setdefault(hold, THE_BANK.holds[hold])


@bank.step(retry=ASK_THE_BANK)
async def refund(hold: str) -> None:
    """Give captured money back; of a hold that was never captured there is nothing to give."""
    THE_BANK.refunded.add(hold)


@fraud.step
async def check(payment: Payment) -> bool:
    """Tell whether the payment looks honest."""
    return payment.customer != "Mr Cagliostro"


@ledger.step
async def book(customer: str, cents: int) -> str:
    """Enter a sum into the books; return the entry's number."""
    if abs(cents) > 1_000_000:
        raise BooksClosed(f"{cents / 100:,.2f} needs a signature")
    entry = step_info().idempotency_key
    THE_BOOKS[entry] = cents
    return entry


@ledger.step
async def reverse(entry: str) -> None:
    THE_BOOKS[entry] = 0


@receipts.step(retry=Retry(attempts=3, first="20ms"))
async def send_receipt(customer: str, cents: int) -> str:
    """Send a receipt; return its number. The printer jams at the first sheet of odd sums."""
    if cents % 2 and step_info().attempt == 1:
        raise OSError("paper jam")
    return f"R{cents:+}"


# -- processes ---------------------------------------------------------------------------------


@checkout.workflow
async def pay(payment: Payment) -> Outcome:
    """Take one payment, wholly or not at all."""
    try:
        # What `undo` is told is called in reverse if anything below it raises, whatever raises.
        async with saga() as undo:
            hold = await authorise(payment.card, payment.cents)
            undo(void, hold)
            if not await check(payment):
                raise Suspicious(payment.customer)
            # Told before, not after: if the capture times out for good, the money may have moved.
            undo(refund, hold)
            await capture(hold)
            entry = await book(payment.customer, payment.cents)
            undo(reverse, entry)
            receipt = await send_receipt(payment.customer, payment.cents)
    # A declined card and a suspicion belong to the business: the run completes and says so. Closed
    # books do not: the run fails with that error, compensated, and somebody should look.
    except CardDeclined as no:
        return Outcome("declined", str(no))
    except Suspicious:
        return Outcome("refused", "please call us")
    return Outcome("paid", receipt, hold)


@checkout.workflow
async def give_back(customer: str, hold: str, cents: int) -> Outcome:
    """Refund a payment on request: the money, the books, a receipt about it."""
    async with saga() as undo:
        entry = await book(customer, -cents)
        undo(reverse, entry)
        await refund(hold)
    return Outcome("refunded", await send_receipt(customer, -cents), hold)


SERVICES = [checkout, bank, fraud, ledger, receipts]
app = App("payments", services=SERVICES)


# -- a few payments, both ways -----------------------------------------------------------------

PAYMENTS = {
    "good": Payment("Ms Arbeau", "good", 4_200),
    "jam": Payment("Mr Caroso", "good", 1_999),
    "slow-bank": Payment("Ms Negri", "slow", 6_000),
    "declined": Payment("Mr Playford", "declined", 900),
    "fraud": Payment("Mr Cagliostro", "good", 50_000),
    "too-big": Payment("Duke of Ferrara", "good", 2_000_000),
}


async def show(app: App, mode: Literal["orchestration", "choreography"]) -> None:
    """Make all payments in one mode, refund one, and print what became of each."""
    print(f"\n{mode}")
    before = THE_BANK.kept_cents()
    for name, payment in PAYMENTS.items():
        run = await app.start(pay, payment, id=f"{name}-{mode}", mode=mode)
        print(f"  {name:<10} {payment.cents / 100:>10,.2f}  {await ended(run)}")
    # The first customer sends the goods back.
    paid = await app.get(f"good-{mode}").result()
    good = PAYMENTS["good"]
    run = await app.start(give_back, good.customer, paid.hold, good.cents, mode=mode)
    print(f"  {'refund':<10} {-good.cents / 100:>10,.2f}  {await ended(run)}")
    kept = THE_BANK.kept_cents() - before
    print(f"  kept {kept / 100:,.2f}, still blocked on cards {THE_BANK.held_cents() / 100:,.2f}")


async def ended(run: Run[Outcome]) -> str:
    """Await the end of a run and put it in words."""
    try:
        outcome = await run.result()
        text = f"{outcome.status}: {outcome.detail}"
    except RunFailed as failure:
        text = f"failed: {failure.__cause__}"
    status = await run.status()
    undone = f", undone: {status.compensated}" if status.compensated else ""
    return f"{text:<44} hops: {status.hops}{undone}"


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="pavane-payments-") as folder:
        async with App("payments", services=SERVICES, store=f"{folder}/payments.db") as app:
            await show(app, "orchestration")
            await show(app, "choreography")


if __name__ == "__main__":
    asyncio.run(main())
