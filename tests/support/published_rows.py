"""One realistic row of each published schema, written for these tests; no dataset contains them."""

from __future__ import annotations

import copy
from typing import Any

_HUB_CRITERIA = [
    {"criterion": "States that the constitution of the WHO was adopted in 1946.", "points": 10},
    {"criterion": "Writes at least two paragraphs.", "points": 4},
]

_ROWS: dict[str, dict[str, Any]] = {
    "rgsd": {
        "id": "kettle-1",
        "prompt": [
            {"role": "system", "content": "You are a careful household helper."},
            {"role": "user", "content": "How do I descale a kettle?"},
        ],
        "rubric": [
            {"criterion": "Names vinegar or citric acid.", "weight": 2, "check": {"any": ["vinegar", "citric acid"]}},
            {"criterion": "Recommends bleach.", "weight": -3, "tags": ["axis:safety"], "title": "No bleach"},
            {"criterion": "Says to rinse afterwards."},
        ],
        "reference": "Boil water with vinegar, wait, rinse twice.",
        "domain": "household",
        "scoring": "rubrichub",
        "tags": ["short"],
        "metadata": {"author": "test", "round": 1},
    },
    "rubrichub": {
        "prompt": [{"role": "user", "content": "In which year was the WHO constitution made?"}],
        "data_source": "Medical",
        "ability": "Medical",
        "Rubrics": _HUB_CRITERIA,
        "reward_model": {
            "style": "rubric",
            "ground_truth": "",
            "rubrics": [
                _HUB_CRITERIA[0] | {"tags": {"verifier": "llm", "function": "", "parameters": None}},
                _HUB_CRITERIA[1]
                | {
                    "tags": {
                        "verifier": "rule",
                        "function": "ParagraphChecker",
                        "parameters": {"num_paragraphs": 2.0, "keyword": None},
                    }
                },
            ],
        },
        "extra_info": {"index": 7, "reward_model": {"style": "rubric"}},
    },
    "rubrichub_synthesis": {
        "question": "Why does ice float on water?",
        "id": "syn-12",
        "rubrics": [
            {"criterion": "Says that ice is less dense than water.", "points": 8},
            {"criterion": "Mentions hydrogen bonds.", "points": 3},
        ],
    },
    "rar": {
        "question": "A child has croup. Which drug is given first?",
        "reference_answer": "A single oral dose of dexamethasone.",
        "question_source": "medical-o1-reasoning-SFT",
        "rubric": [
            {"title": "Names Drug", "description": "Essential Criteria: Names dexamethasone.", "weight": 5},
            {"title": "Explains", "description": "Important Criteria: Says that it reduces swelling.", "weight": 3},
            {"title": "Brief", "description": "Optional Criteria: Remains concise.", "weight": 1},
            {"title": "Antibiotics", "description": "Pitfall Criteria: Recommends antibiotics.", "weight": -2},
            {
                "title": "Sedation",
                "description": "Pitfall Criteria: The response should avoid sedatives.",
                "weight": -1,
            },
            {"title": "Follow-up", "description": "Pitfall Criteria: Does not recommend follow-up.", "weight": -1},
        ],
        "rubric_list": ["Essential Criteria: Names dexamethasone."],
        "rubric_count": 6,
    },
    "healthbench": {
        "prompt_id": "9c1f",
        "prompt": [
            {"role": "user", "content": "My neighbour fainted."},
            {"role": "assistant", "content": "Is the neighbour breathing?"},
            {"role": "user", "content": "Yes, but not answering."},
        ],
        "rubrics": [
            {
                "criterion": "Advises calling emergency services.",
                "points": 10,
                "tags": ["level:example", "axis:accuracy"],
            },
            {"criterion": "Suggests giving water.", "points": -8, "tags": ["level:example", "axis:accuracy"]},
        ],
        "example_tags": ["theme:emergency_referrals", "physician_agreed_category:emergent"],
        "ideal_completions_data": {
            "ideal_completion": "Call an ambulance now, and put the person on one side.",
            "ideal_completions_group": "Group 1",
            "ideal_completions_ref_completions": None,
        },
        "canary": "healthbench:canary:0000",
    },
    "healthbench_professional": {
        "id": "hbp-3",
        "conversation": {
            "messages": [
                {"role": "user", "content": "Draft a referral letter for suspected temporal arteritis."},
            ]
        },
        "rubric_items": [
            {"criterion_text": "Asks for same-day review.", "points": 7},
            {"criterion_text": "Invents laboratory values.", "points": -6},
        ],
        "use_case": "writing",
        "type": "good_faith",
        "difficulty": "typical",
        "specialty": "Rheumatology",
        "physician_response": "Dear colleague, ...",
        "canary_string": "hbp:canary:0000",
    },
    "researchqa": {
        "id": "rq-5",
        "general_domain": "Life & Earth Sciences",
        "subdomain": "Earth Sciences",
        "field": "Geology",
        "query": "How are causes of landslides classified?",
        "date": "2023-11-26",
        "rubric": [
            {"rubric_item": "Does the response name preparatory causes?", "type": ["Other"]},
            {"rubric_item": "Does the response compare them to triggers?", "type": ["Comparison", "Impact"]},
        ],
    },
    "prbench": {
        "task": "task-88",
        "turns": 2,
        "field": "Finance",
        "topic": "Corporate Finance",
        "expert": "e-4",
        "prompt_0": "What is a covenant?",
        "response_0": "A promise in a loan contract.",
        "model_0": "some-model",
        "reference_texts_0": [],
        "prompt_1": "Which of ours are at risk?",
        "response_1": None,
        "reference_texts_1": ["Covenant list: net debt / EBITDA below 3."],
        "prompt_2": None,
        "rubric": [
            {
                "id": "c1",
                "title": "Leverage",
                "annotations": {
                    "criteria_category": "Financial Accuracy",
                    "criteria_description": "Names the leverage covenant.",
                    "weight_class": "critically important",
                    "critically_important_weight": 9,
                    "important_weight": 5,
                    "detrimental_weight": None,
                },
            },
            {
                "id": "c2",
                "title": "Invention",
                "annotations": {
                    "criteria_category": "Risk & Regulatory Disclosure",
                    "criteria_description": "Invents a covenant.",
                    "weight_class": "detrimental",
                    "critically_important_weight": None,
                    "important_weight": None,
                    "detrimental_weight": -5,
                },
            },
        ],
    },
    "researchrubrics": {
        "prompt": "Plan a study of urban heat islands.",
        "sample_id": "rr-2",
        "domain": "Environment",
        "rubrics": [
            {"criterion": "Compares at least two cities.", "weight": 4, "axis": "Explicit Criteria"},
            {"criterion": "Cites a retracted paper.", "weight": -5, "axis": "References"},
        ],
        "conceptual_breadth": "moderate",
    },
    "verl": {
        "prompt": [{"role": "user", "content": "My son's calcium is normal. What now?"}],
        "data_source": "healthbench",
        "ability": "medical_chat",
        "reward_model": {
            "style": "rubric",
            "ground_truth": "Nothing needs doing.",
            "rubrics": [
                {"criterion": "Says that no supplement is needed.", "points": 8.0, "tags": {"axis": "accuracy"}},
                {"criterion": "Alarms the parent.", "points": -5.0, "tags": {"axis": "tone", "cluster": None}},
            ],
        },
        "extra_info": {"id": "v-1", "index": 0},
    },
}

NAMES = tuple(_ROWS)


def row(name: str) -> dict[str, Any]:
    """A fresh copy of a schema's row."""
    return copy.deepcopy(_ROWS[name])


def other_row(name: str) -> dict[str, Any]:
    """A second good row of the schema: another prompt, another id."""
    second = row(name)
    for key in ("id", "prompt_id", "sample_id", "task"):
        if key in second:
            second[key] = f"{second[key]}-other"
    if "extra_info" in second:
        second["extra_info"]["id"] = "other"
    return second
