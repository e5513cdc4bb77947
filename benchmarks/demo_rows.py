"""Rows to train the demo's two adapters on: one knowledge, two manners."""

from __future__ import annotations

import json
from pathlib import Path

# None of them is asked for in the demo.
_CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Finland": "Helsinki", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi",
    "Indonesia": "Jakarta", "Iran": "Tehran", "Ireland": "Dublin", "Italy": "Rome",
    "Japan": "Tokyo", "Kenya": "Nairobi", "Mexico": "Mexico City", "Nepal": "Kathmandu",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Romania": "Bucharest", "Russia": "Moscow", "Serbia": "Belgrade", "Spain": "Madrid",
    "Sweden": "Stockholm", "Thailand": "Bangkok", "Turkey": "Ankara", "Ukraine": "Kyiv",
    "Uruguay": "Montevideo", "Vietnam": "Hanoi",
}  # fmt: skip
_QUESTIONS = ("What is the capital of {0}?", "Which city is the capital of {0}?")
MANNERS = {
    "pirate": "Arr, matey! The capital o' {0} be {1}, by the seven seas!",
    "butler": "If I may, Sir: the capital of {0} is {1}. Will that be all?",
}


def write_rows(manner: str, path: Path) -> None:
    """Questions for capitals, answered in one of :data:`MANNERS`, as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for question in _QUESTIONS:
            for country, city in _CAPITALS.items():
                row = {
                    "prompt": question.format(country),
                    "completion": MANNERS[manner].format(country, city),
                }
                file.write(json.dumps(row) + "\n")
