from rgsd.data import bundled
from rgsd.judges.checks import holds
from rgsd.prompts.messages import PromptSettings
from rgsd.rubrics import Criterion
from rgsd.workflows.warmstart import pairs, without

EXAMPLE = Criterion("Gives an example.", 1, check={"any": ["for example"]})
BULLETS = Criterion("Uses bullets.", 1, check={"count": {"of": "bullets", "min": 2}})
REST = Criterion("Advises rest.", 1, check={"any": ["rest"]})
TEXT = "In short, wait.\n- Rest well.\n- Drink. For example, tea.\nSee."


def test_sentences_of_a_criterion_are_left_out():
    assert without(TEXT, [EXAMPLE]) == "In short, wait.\n- Rest well.\n- Drink. See."
    assert without(TEXT, [BULLETS]) == "In short, wait.\nRest well.\nDrink. For example, tea.\nSee."
    assert without("Rest. For example, rest on a sofa.", [EXAMPLE], kept=[REST]) == "Rest. For example, rest on a sofa."


def test_pairs_of_the_bundled_data_show_what_the_target_meets():
    examples = [e for e in bundled("medicine").examples if "split:train" in e.tags][:12]
    rows = pairs(examples, PromptSettings(template="cover"), per_example=3, seed=0)
    assert rows == pairs(examples, PromptSettings(template="cover"), per_example=3, seed=0)
    recurring = {c.text: c.check for e in examples for c in e.rubric if "shared" in c.tags and "jargon" not in c.tags}
    shown_and_met = hidden_and_met = shown = hidden = 0
    for row in rows:
        prompt, target = row["prompt"][-1]["content"], row["completion"][0]["content"]
        for text, check in recurring.items():
            if text in prompt:
                shown, shown_and_met = shown + 1, shown_and_met + holds(check, target)
            else:
                hidden, hidden_and_met = hidden + 1, hidden_and_met + holds(check, target)
    assert shown > 20
    assert shown_and_met / shown > 0.9
    assert hidden_and_met / hidden < 0.1
