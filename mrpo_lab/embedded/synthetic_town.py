"""The words of the synthetic world: its subjects and facts, and the variants of each feature."""

from typing import NamedTuple


class Topic(NamedTuple):
    """Questions about a subject {x}, answers that give its fact {y}, and the subjects by fact."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    subjects: dict[str, str]


class Subject(NamedTuple):
    """What a visitor asks about, and the one fact that is known of it."""

    topic: Topic
    name: str
    fact: str


GOODS = Topic(
    questions=(
        "Where can I buy {x}?",
        "Which shop in town sells {x}?",
        "I need some {x}. Where should I look?",
        "Who has good {x} here?",
    ),
    answers=(
        "you can buy {x} at the {y}",
        "the {y} sells very good {x}",
        "most people get {x} from the {y}",
    ),
    subjects={
        "bakery": "bread cakes rolls buns",
        "fishmonger": "salmon crabs herring",
        "greengrocer": "apples carrots onions",
        "florist": "roses tulips",
        "market": "candles baskets",
        "post office": "stamps envelopes",
    },
)
PLACES = Topic(
    questions=(
        "How do I get to the {x}?",
        "Where in town is the {x}?",
        "Can you show me the way to the {x}?",
        "I am looking for the {x}. Is it far?",
    ),
    answers=(
        "the {x} is just off {y}",
        "walk along {y} to the {x}",
        "you will find the {x} on {y}",
    ),
    subjects={
        "Mill Street": "museum library theatre",
        "Bridge Road": "station hospital bank",
        "Harbour Lane": "lighthouse aquarium ferry",
        "Castle Hill": "castle chapel garden",
        "Orchard Row": "school hotel inn pool",
    },
)
REPAIRS = Topic(
    questions=(
        "My {x} is broken. Who can repair it?",
        "Can anyone in town mend a {x}?",
        "Who should I ask about an old {x}?",
        "I dropped my {x}. What should I do?",
    ),
    answers=(
        "{y} can repair a {x} for you",
        "just take the {x} to {y}",
        "your {x} is a job for {y}",
    ),
    subjects={
        "Marta": "bicycle cart scooter",
        "Edwin": "watch clock camera",
        "Greta": "violin guitar flute",
        "Boris": "kettle stove lamp radio",
        "Captain Lee": "boat sail net",
    },
)
DISHES = Topic(
    questions=(
        "How do I make {x}?",
        "What goes into a good {x}?",
        "I want to cook {x} tonight. Any advice?",
        "What is the secret of your {x}?",
    ),
    answers=(
        "cook the {x} slowly with {y}",
        "a good {x} needs plenty of {y}",
        "for {x} you should start with {y}",
    ),
    subjects={
        "leeks": "soup stew broth",
        "butter": "risotto omelette porridge",
        "ginger": "curry chutney",
        "sugar": "marmalade custard pudding",
        "vinegar": "salad pickle",
        "saffron": "paella pilaf",
        "cream": "chowder",
    },
)
TOPICS = (GOODS, PLACES, REPAIRS, DISHES)
SUBJECTS = tuple(
    Subject(topic, name, fact)
    for topic in TOPICS
    for fact, names in topic.subjects.items()
    for name in names.split()
)

CONTEXTS = (
    "",
    "Hello, my name is {name}.",
    "I am {name} and I am new here.",
    "{name} told me to ask you.",
    "Good morning from {name}!",
    "I am here until {day}.",
    "We arrived on {day} with {number} children.",
    "My friend {name} comes on {day}.",
)
NAMES = (
    "Anna", "Bruno", "Clara", "David", "Elena", "Felix", "Hanna", "Ivan", "Julia", "Karim",
    "Laura", "Milan", "Nadia", "Oscar", "Paula", "Quinn", "Rosa", "Samir", "Tessa", "Viktor",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

OPENINGS = {
    False: ("Sure,", "Of course,", "Gladly,", "Good question,", "Certainly,"),
    True: ("Um,", "Like, whatever,", "Dunno,", "Hmm, well,", "Er,"),
}
DETAILS = (
    "It costs {amount} coins.",
    "Allow {amount} minutes for it.",
    "Bring {amount} friends along.",
    "Ask after {amount} days.",
    "There are {amount} around.",
)
AMOUNTS = {
    True: ("2", "3", "4", "5", "6", "7", "8", "9"),
    False: ("some", "many", "few", "more", "ample", "extra", "other", "enough"),
}
REMARKS = (
    "",
    "",
    "The town is busy today.",
    "The wind is cold.",
    "Everyone here knows that.",
    "It is an old custom.",
)
CLOSINGS = {
    1: ("I hope this helps!", "Have a lovely day!", "Always welcome!"),
    0: ("That is all I know.", "So much for it.", "Nothing else."),
    -1: ("Leave me alone.", "Stop asking me.", "Do not come back."),
}
