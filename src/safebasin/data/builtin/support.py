"""A customer's task, made here: route a message to one of eight departments.

Every message is an opening, a problem with its slots filled, and a closing. The test messages use one problem a
department that training never shows, so that a model has to read and not to match.
"""

import random

QUESTION = "Which department should handle this customer message? Answer with one of: {labels}.\n\nMessage: {message}"
SLOTS = {
    "item": (
        "kettle",
        "desk lamp",
        "backpack",
        "keyboard",
        "rain jacket",
        "blender",
        "headset",
        "bookshelf",
        "watch",
        "air fryer",
    ),
    "amount": ("12 euros", "$40", "79.90", "a hundred dollars", "£15", "the full price"),
    "when": ("yesterday", "last week", "on Monday", "two days ago", "this morning", "in March"),
    "place": ("Leeds", "Porto", "our new office", "my sister's flat", "Denver", "the old address"),
    "number": ("A-4471", "20993", "#778", "C102", "55-81"),
    "device": ("phone", "laptop", "tablet", "old computer", "work machine"),
}
OPENINGS = (
    "",
    "Hello, ",
    "Hi there, ",
    "Good morning. ",
    "To whom it may concern: ",
    "Hey, ",
    "Dear team, ",
    "Please help: ",
)
CLOSINGS = (
    "",
    " Thanks!",
    " Please let me know.",
    " I look forward to your answer.",
    " Can someone look into this?",
    " Best, Sam",
    " It is rather urgent.",
)
DEPARTMENTS = {
    "billing": (
        "I was charged {amount} twice for order {number}",
        "the invoice from {when} shows {amount} but I agreed to less",
        "my card was debited {when} although the payment page showed an error",
        "could you send the receipt for {number} with our tax number on it",
        "a fee of {amount} appeared on my statement and I do not know why",
        "the discount code was accepted but the total did not change",
        "I would like to pay {number} by bank transfer and not by card",
        "the price on the bill for the {item} differs from the price in the shop",
    ),
    "shipping": (
        "the parcel with my {item} has been stuck in transit since {when}",
        "tracking for {number} says delivered but nothing arrived in {place}",
        "can the courier bring {number} to {place} and not to my home",
        "how long does delivery to {place} take at the moment",
        "the driver left my {item} in the rain {when}",
        "half of order {number} came {when}, where is the other box",
        "I need the {item} before the weekend, is there express delivery",
        "customs is holding the package and asks for a paper from the sender",
    ),
    "returns": (
        "the {item} does not fit and I want to send it back",
        "how do I get a return label for {number}",
        "I changed my mind about the {item} that I bought {when}",
        "you sent me the wrong colour, please exchange the {item}",
        "I posted the {item} back {when} and wonder when I get my money",
        "is it possible to swap the {item} for a larger one",
        "the gift was a double, may I bring the {item} back without the box",
        "what is the last day on which {number} can be given back",
    ),
    "technical": (
        "the app crashes on my {device} whenever I open the settings",
        "the {item} does not connect to the wireless network since {when}",
        "after the update {when} the screen stays black",
        "error {number} shows up when I try to install the driver",
        "the website does not load on my {device}, only a white page",
        "sound from the headset is distorted after ten minutes",
        "the firmware of the {item} cannot be upgraded on my {device}",
        "notifications stopped coming through on my {device}",
    ),
    "account": (
        "I forgot my password and the reset mail never comes",
        "please change the e-mail address of my profile",
        "I cannot log in on my {device} since {when}",
        "my user name has a typing error, how do I correct it",
        "please delete my profile and all personal data",
        "I got a new phone number and cannot receive the sign-in code",
        "two profiles exist under my name, can you merge them",
        "someone changed the language of my profile and I cannot find the option",
    ),
    "sales": (
        "do you offer a volume price for fifty pieces of the {item}",
        "will the {item} be in stock again soon",
        "which {item} would you recommend for a small office",
        "I would like a quotation for ten units to {place}",
        "is there a newer model of the {item} coming this year",
        "can I see the {item} somewhere before I buy it",
        "what is the difference between the basic and the premium plan",
        "do students get a lower price on the {item}",
    ),
    "careers": (
        "are there open positions in {place}",
        "I sent my application {when} and have not heard back",
        "do you take interns for the summer",
        "whom do I ask about the engineer job with reference {number}",
        "is it possible to work from home in the support team",
        "my interview was moved, could you confirm the new time",
        "I attach my resume for the warehouse job",
        "which qualifications do you expect from a junior designer",
    ),
    "press": (
        "I write for a local newspaper and would like an interview with your director",
        "may we use your logo in a magazine article about {place}",
        "please send the media kit for the launch {when}",
        "our podcast would like a statement on the new factory",
        "who can comment on the merger that was announced {when}",
        "I need high-resolution pictures of the {item} for a review",
        "is there an embargo on the announcement about {place}",
        "our television crew would like to film in your shop",
    ),
}
LABELS = tuple(DEPARTMENTS)
SHOWN = 7  # problems a department that training shows; the rest occur in the test only


def support(seed: int, count: int) -> list[dict[str, str]]:
    """``count`` rows, balanced over the departments. Seed 0 is training; every other seed draws from all problems."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = LABELS[i % len(LABELS)]
        problems = DEPARTMENTS[label][: SHOWN if seed == 0 else None]
        problem = draw.choice(problems).format(**{name: draw.choice(values) for name, values in SLOTS.items()})
        opening = draw.choice(OPENINGS)
        text = opening + (problem if opening.endswith((", ", ": ")) else problem[0].upper() + problem[1:])
        mark = (
            "?"
            if problem.split()[0]
            in {"how", "can", "could", "do", "is", "may", "which", "what", "who", "whom", "are", "will"}
            else "."
        )
        message = text + mark + draw.choice(CLOSINGS)
        rows.append(
            {
                "prompt": QUESTION.format(labels=", ".join(LABELS), message=message),
                "completion": label,
                "category": label,
            }
        )
    draw.shuffle(rows)
    return rows
