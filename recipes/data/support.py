"""Customer-service dialogues that keep their state: the order, the item and the reason go through every turn.

A case is drawn first (who, what, which order, what went wrong, what is promised); the turns are then
worded from it, so that a number given by the customer comes back from the assistant, and a promise is the
one the case fixes.
"""

import random
from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ITEMS = words(
    "kettle lamp jacket backpack blender keyboard headphones mirror blanket camera desk chair tent "
    "teapot watch suitcase heater monitor carpet toaster"
)
COLOURS = ("black", "white", "red", "blue", "green", "grey")
NAMES = words("Anna Ben Clara David Emma Felix Grace Henry Irene Jack Laura Martin Nora Oscar Paula Simon")
CITIES = words("Bristol Leeds York Oxford Dublin Boston Denver Austin Perth Toronto")
PAYMENTS = ("card", "bank account", "gift card")


@dataclass(frozen=True)
class Case:
    item: str
    order: str
    name: str
    days: int
    city: str
    payment: str
    amount: int
    other: str


@dataclass(frozen=True)
class Topic:
    """Ways to word each turn. `reason` is asked for only where it is not empty."""

    opening: tuple[str, ...]
    reason: tuple[str, ...]
    outcome: tuple[str, ...]
    question: tuple[str, ...]
    answer: tuple[str, ...]


WHEN = ("How long will it take?", "When will that be?", "How many days is that?")
TOPICS = (
    Topic(
        opening=("My {item} has not arrived.", "I am still waiting for my {item}.", "Where is my {item}?"),
        reason=(),
        outcome=(
            "Order {order} with the {item} was held up in {city}. It is on its way again.",
            "I see that order {order} is in {city} now. Your {item} will leave there today.",
        ),
        question=("When will it be here?", "When can I expect it?", "How long will it take?"),
        answer=("Your {item} should arrive in {days} days.", "It will be with you in {days} days."),
    ),
    Topic(
        opening=("My {item} arrived broken.", "The {item} you sent me is damaged.", "I got a broken {item}."),
        reason=("The box was crushed.", "It has a crack.", "It does not turn on.", "One part is missing."),
        outcome=(
            "Thank you. I will send a new {item} for order {order} at no cost.",
            "I have ordered a new {item} for you under order {order}.",
        ),
        question=WHEN,
        answer=("The new {item} will arrive in {days} days.", "{days} days. You may keep the broken one."),
    ),
    Topic(
        opening=(
            "I want my money back for the {item}.",
            "I would like a refund for my {item}.",
            "Can I return my {item}?",
        ),
        reason=(
            "It is too small.",
            "It is not as described.",
            "I found a better one.",
            "I do not need it any more.",
        ),
        outcome=(
            "Your refund of {amount} dollars for the {item} is approved. It goes to your {payment}.",
            "I have refunded {amount} dollars for order {order} to your {payment}.",
        ),
        question=WHEN,
        answer=(
            "The {amount} dollars will reach your {payment} in {days} days.",
            "Please allow {days} days.",
        ),
    ),
    Topic(
        opening=(
            "You sent me the wrong {kind}.",
            "I ordered a {item} but got a {other}.",
            "I got a {other} by mistake.",
        ),
        reason=(),
        outcome=(
            "I am sorry. I will send the {item} of order {order}, and we will collect the {other}.",
            "That was our mistake. The {item} for order {order} will be sent today.",
        ),
        question=("When will you collect the {other}?", "What do I do with the {other}?"),
        answer=(
            "Our driver will collect the {other} in {days} days.",
            "Keep the {other} packed. We come in {days} days.",
        ),
    ),
    Topic(
        opening=("Please cancel my order.", "I want to cancel the {item}.", "Can I still cancel my {item}?"),
        reason=(
            "I ordered it twice.",
            "I changed my mind.",
            "It costs too much.",
            "I chose the wrong colour.",
        ),
        outcome=(
            "Order {order} is cancelled. You will not be charged for the {item}.",
            "Done. I have cancelled the {item} in order {order}.",
        ),
        question=("Will I get my {amount} dollars back?", "And my payment of {amount} dollars?"),
        answer=(
            "Yes, {amount} dollars go back to your {payment} in {days} days.",
            "Yes, within {days} days, to your {payment}.",
        ),
    ),
    Topic(
        opening=(
            "I have moved to {city}.",
            "Please change my address to {city}.",
            "Can you send my {item} to {city}?",
        ),
        reason=(),
        outcome=(
            "The address of order {order} is now in {city}.",
            "I have changed order {order}. Your {item} will go to {city}.",
        ),
        question=("Will it be late now?", "Does that delay it?"),
        answer=(
            "Only a little. It will reach {city} in {days} days.",
            "No, it will be in {city} in {days} days.",
        ),
    ),
    Topic(
        opening=(
            "I was charged twice for my {item}.",
            "You took {amount} dollars twice.",
            "There are two charges for my {item}.",
        ),
        reason=(),
        outcome=(
            "You are right, order {order} was charged twice. I returned {amount} dollars to your {payment}.",
            "I found the second charge of {amount} dollars for order {order} and cancelled it.",
        ),
        question=WHEN,
        answer=(
            "You will see the {amount} dollars in {days} days.",
            "It takes {days} days to reach your {payment}.",
        ),
    ),
)
GREETINGS = ("Hello. ", "Hi. ", "Good morning. ", "", "", "Hi, this is {name}. ")
ASK_ORDER = (
    "I am sorry to hear that. What is your order number?",
    "I can help. May I have your order number?",
)
GIVE_ORDER = ("It is {order}.", "My order number is {order}.", "{order}.", "Sure, it is {order}.")
ASK_REASON = (
    "Thank you. What is the reason?",
    "I found order {order}. May I ask why?",
    "Can you tell me more?",
)
THANKS = ("Thank you.", "Great, thanks.", "That is all, thank you.", "Thanks for your help.")
CLOSING = ("You are welcome. Have a nice day!", "Glad to help. Goodbye!", "You are welcome, goodbye!")


def row(rng: random.Random) -> dict:
    """One dialogue: `{"messages"}`, the customer as user, the service as assistant, in turns."""
    case, topic = new_case(rng), rng.choice(TOPICS)
    turns = [rng.choice(GREETINGS) + rng.choice(topic.opening), rng.choice(ASK_ORDER), rng.choice(GIVE_ORDER)]
    if topic.reason:
        turns += [rng.choice(ASK_REASON), rng.choice(topic.reason)]
    turns.append(rng.choice(topic.outcome))
    if rng.random() < 0.8:
        turns += [rng.choice(topic.question), rng.choice(topic.answer)]
    if rng.random() < 0.6:
        turns += [rng.choice(THANKS), rng.choice(CLOSING)]
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": fill(turn, case)} for i, turn in enumerate(turns)]}


def new_case(rng: random.Random) -> Case:
    item, other = rng.sample(ITEMS, 2)
    return Case(
        item=f"{rng.choice(COLOURS)} {item}",
        order=f"{rng.choice('ABCDEFGH')}{rng.randint(1000, 9999)}",
        name=rng.choice(NAMES),
        days=rng.randint(2, 9),
        city=rng.choice(CITIES),
        payment=rng.choice(PAYMENTS),
        amount=rng.randint(12, 95),
        other=other,
    )


def fill(turn: str, case: Case) -> str:
    """The wording with the case's facts in it; `{kind}` is the item without its colour."""
    return turn.format(kind=case.item.split(" ", 1)[1], **vars(case))
