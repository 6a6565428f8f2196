"""Write the e-mail of the use case ``mail`` from the texts in ``mail.txt``.

    python benchmarks/mail_rows.py

A block of ``mail.txt`` has a sender, a subject and a body, and becomes four messages: ``{a|b}`` is
one of the alternatives, ``<amount>`` a random value. The senders of the test messages write no
training message. Names, companies and addresses are invented; domains end in ``.example``.
"""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path

from pages.bench import PACKAGE

MESSAGES, TEST_SENDERS = 4, 7
"""Messages of each sender, and test senders of each mailbox."""
FIRST_DAY = datetime(2026, 3, 2, 8, tzinfo=UTC)
DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|{3|11|18|24} {April|May|June}|the {2|14|30}th"
FIRST_NAMES = (
    "Anna|Bilal|Carys|Dmitri|Esther|Farid|Gwen|Hugo|Ioana|Jakub|Kirsten|Leon|Moira|Nadia|Omar"
)
LAST_NAMES = (
    "Abbott|Bianchi|Costa|Dunne|Eriksen|Fischer|Gallo|Hughes|Ito|Jansen|Kaya|Lowe|Mensah|Novak"
)
SIGNED = "{Kind regards|Best|Many thanks|Cheers|Regards|Thanks|}"


def choose(text: str, chance: random.Random) -> str:
    """Return ``text`` with one alternative of each group, and values of the placeholders."""
    values = {
        "amount": lambda: (
            f"{chance.choice('£€')}{chance.randint(18, 940)}.{chance.randint(0, 99):02}"
        ),
        "no": lambda: f"{chance.choice(['', 'R-', '26-', 'FC'])}{chance.randint(1200, 98000)}",
        "day": lambda: choose(f"{{{DAYS}}}", chance),
        "week": lambda: str(chance.randint(11, 49)),
        "few": lambda: str(chance.randint(2, 8)),
    }
    while group := re.search(r"\{([^{}]*)\}", text):
        text = text[: group.start()] + chance.choice(group[1].split("|")) + text[group.end() :]
    return re.sub(r"<(\w+)>", lambda found: values[found[1]](), text)


def message_of(block: str, label: str, chance: random.Random, writer: str) -> EmailMessage:
    """Return a message of a block of ``mail.txt``."""
    sender, subject, *body = block.strip().split("\n")
    message = EmailMessage()
    message["From"] = writer if "<customer>" in sender else choose(sender, chance)
    to = "accounts" if label == "invoice" else "hello"
    message["To"] = f"{to}@fernspoke.example"
    message["Subject"] = choose(subject, chance)
    moment = FIRST_DAY + timedelta(minutes=chance.randint(0, 150_000))
    message["Date"] = format_datetime(moment)
    text = re.sub(r" +", " ", choose("\n".join(body), chance)).strip()
    name = str(message["From"]).partition(" <")[0]
    if label != "spam" or chance.random() < 0.5:
        text += "\n" + choose(SIGNED, chance) + f"\n{name}" * (name not in text[-30:])
    text = re.sub(r"\n{2,}", "\n", text) + "\n"
    kind = chance.random()
    html = "<html><body><p>" + "</p>\n<p>".join(text.strip().split("\n")) + "</p></body></html>\n"
    if kind < 0.15:
        message.set_content(html, subtype="html")
    else:
        message.set_content(text)
        if kind < 0.3:
            message.add_alternative(html, subtype="html")
    if re.search(r"attach|enclos|pdf", text) and chance.random() < 0.8:
        stem = choose("{scan|document|<no>|Invoice_<no>|doc<no>|details}", chance)
        message.add_attachment(
            b"%PDF-1.4\n", maintype="application", subtype="pdf", filename=f"{stem}.pdf"
        )
    return message


def main() -> None:
    """Write an mbox file for each mailbox, for training and for the test."""
    texts = Path(__file__).with_name("mail.txt").read_text()
    chance = random.Random(0)
    for part in re.split(r"^# ", texts, flags=re.M)[1:]:
        label, _, blocks = part.partition("\n")
        senders = re.split(r"^%\n", blocks, flags=re.M)
        chance.shuffle(senders)
        names = [
            f"{first} {last} <{first}.{last}@mail.example>"
            for first, last in zip(
                chance.sample(FIRST_NAMES.split("|") * 2, len(senders)),
                chance.sample(LAST_NAMES.split("|") * 2, len(senders)),
                strict=True,
            )
        ]
        for split, own in (
            ("test", range(TEST_SENDERS)), ("train", range(TEST_SENDERS, len(senders)))
        ):  # fmt: skip
            made = [
                message_of(senders[place], label, chance, names[place])
                for place in own for _ in range(MESSAGES)
            ]  # fmt: skip
            chance.shuffle(made)
            folder = PACKAGE / "examples" / "mail" / split
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{label}.mbox").open("wb") as file:
                for message in made:
                    for number, each in enumerate(message.walk()):
                        if each.is_multipart():
                            each.set_boundary(f"part-{number}")
                    content = re.sub(rb"^(>*From )", rb">\1", message.as_bytes(), flags=re.M)
                    file.write(b"From hello@fernspoke.example Mon Mar  2 08:00:00 2026\n")
                    file.write(content.rstrip(b"\n") + b"\n\n")


if __name__ == "__main__":
    main()
