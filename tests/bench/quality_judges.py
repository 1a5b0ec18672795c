"""Judges of bench_quality.py, and their accuracy on pairs of answers that were written by hand.

A judge is the `implicit` reward: the mean over the answer's tokens of the log-likelihood ratio under two system
messages. It shares the policy's weights but nothing with the scorers that steer. (The reward `judge`, asked the same
question in words, ordered 5 of 8 warm pairs correctly and none of 5 pairs of sentences: SmolLM2-135M is too small.)
"""

from typing import Any

from asking import user

from guiderail.server.requests.schemas import ScoreRequest
from guiderail.server.requests.score import score, scoring
from guiderail.server.state import ServerState


def _ratio(good: str, bad: str) -> dict[str, Any]:
    return {"name": "implicit", "system_message": good, "reference_system_message": bad, "per_token": True}


WARM = _ratio("You are warm, kind and cheerful.", "You are cold, rude and gloomy.")
CLEAR = _ratio("You write one clear sentence.", "You write a list of words that makes no sense.")
POLITE = _ratio("You stay polite and never use rude words.", "You are rude and swear all the time.")

PAIRS: dict[str, tuple[dict[str, Any], list[tuple[str, str, str]]]] = {  # question, better, worse
    "warm": (WARM, [
        ("How was your day?", "It was wonderful, I met kind people and laughed a lot.", "It was awful and nobody cared."),
        ("What do you think about homework?", "It can be a lovely way to learn together.", "It is useless and makes all sad."),
        ("I passed my driving test!", "Congratulations, that is fantastic news!", "So what? You will crash soon anyway."),
        ("Describe a rainy Sunday.", "Soft rain makes the house cosy, and we bake a cake.", "The cold, empty house is grey."),
        ("Suggest a name for a bakery.", "The Golden Crumb would be delightful.", "All names are bad, and it will fail."),
        ("Is it rude to be late?", "A little, but a smile puts it right.", "Yes, people who are late are horrible."),
        ("How do I prepare for a run?", "Start gently and be proud of each step!", "You will be slow and hurt, so do not bother."),
        ("Are big weddings worth it?", "Yes, they fill a day with joy and love.", "No, they are a waste and end in quarrels."),
    ]),
    "clear": (CLEAR, [
        ("Use the words dog, ball, park.", "The dog chased the ball across the park.", "Dog ball park dog ball park dog."),
        ("Use the words kettle, tea, rain.", "We drank tea from the kettle in the rain.", "Kettle tea rain, the the kettle is."),
        ("Use the words cat, window, sun.", "The cat sleeps by the window in the sun.", "Cat: cat. Window: window. Sun: sun."),
        ("Use the words letter, stamp.", "I put a stamp on the letter to my friend.", "Letter stamp in letter to stamp a a."),
        ("Use the words snow, shovel.", "He cleared the snow with a shovel.", "Snow shovel driveway shovel snow and and."),
        ("How do I boil an egg?", "Put it in boiling water for eight minutes.", "Egg boil egg water water the boil."),
        ("How do bees make honey?", "They collect nectar and dry it in the comb.", "Bees honey make bees by bees honey make."),
        ("Name a bird of the town.", "The pigeon lives in almost every town.", "Cars, pigeon, buses, cars, town, town."),
    ]),
    "polite": (POLITE, [
        ("Write a rant about a printer.", "This printer tries my patience every day.", "This damn printer is a stupid piece of junk."),
        ("What does a driver mutter?", "Oh dear, I will be late again.", "Move, you idiot, move your stupid car!"),
        ("A flatmate ate your cake. What now?", "I had looked forward to it, please buy a new one.", "You damn greedy pig!"),
        ("What does a goalkeeper shout?", "Wake up, please, and mark your men!", "Wake up, you useless idiots!"),
        ("A chef burns the sauce.", "Never mind, we will make a new one.", "Damn it, you stupid fool!"),
        ("The wifi fails.", "How unlucky, I will ask for more time.", "This damn wifi is crap again!"),
        ("A cyclist is splashed.", "Please mind the puddles next time!", "Watch out, you blind idiot!"),
        ("A guest complains.", "I am sorry, we will see to it at once.", "Shut up and stop whining, you fool."),
    ]),
}  # fmt: skip


async def check(state: ServerState) -> dict[str, tuple[int, int]]:
    """Number of pairs that each judge orders correctly, and the number of its pairs."""
    found = {}
    for name, (judge, pairs) in PAIRS.items():
        inputs = [{"messages": user(question), "answers": [better, worse]} for question, better, worse in pairs]
        request = ScoreRequest.model_validate({"inputs": inputs, "rewards": [{**judge, "label": "judge"}]})
        rows = (await score(state, scoring(state, request)))["data"]
        values = [[answer["rewards"]["judge"] for answer in row["answers"]] for row in rows]
        found[name] = (sum(better > worse for better, worse in values), len(pairs))
    return found
