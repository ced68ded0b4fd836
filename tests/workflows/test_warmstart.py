from rgsd.data import bundled
from rgsd.prompts.messages import PromptSettings
from rgsd.rubrics import Criterion
from rgsd.rubrics.checks import holds
from rgsd.workflows.warmstart import pairs, without

EXAMPLE = Criterion("Gives an example.", 1, check={"any": ["for example"]})
BULLETS = Criterion("Uses bullets.", 1, check={"count": {"of": "bullets", "min": 2}})
REST = Criterion("Advises rest.", 1, check={"any": ["rest"]})
TEXT = "In short, wait.\n- Rest well.\n- Drink. For example, tea.\nSee."


def test_sentences_of_a_criterion_are_left_out():
    assert without(TEXT, [EXAMPLE]) == "In short, wait.\n- Rest well.\n- Drink. See."
    assert without(TEXT, [BULLETS]) == "In short, wait.\nRest well.\nDrink. For example, tea.\nSee."
    assert without("Rest. For example, rest on a sofa.", [EXAMPLE], kept=[REST]) == "Rest. For example, rest on a sofa."


def test_an_opening_is_cut_off_a_sentence_that_meets_a_kept_criterion():
    opening = Criterion("Opens with In short.", 1, check={"starts": {"regex": "^\\W*in short\\b"}})
    assert without("In short, rest. See.", [opening], kept=[REST]) == "Rest. See."
    assert without("In short, no: rest. See.", [opening], kept=[REST]) == "No: rest. See."
    assert without("In short, wait. Rest.", [opening], kept=[REST]) == "Rest."
    assert without("Rest. In short, wait.", [opening], kept=[REST]) == "Rest. In short, wait."


def test_pairs_of_the_bundled_data_show_what_the_target_meets():
    examples = [e for e in bundled().examples if "split:train" in e.tags]
    rows = pairs(examples, PromptSettings(template="cover"), per_example=3, seed=0)
    assert rows == pairs(examples, PromptSettings(template="cover"), per_example=3, seed=0)
    assert len(rows) > 3 * len(examples)
    forms = {c.text: c for e in examples for c in e.rubric if c.tags[0] in ("form", "safety") and "own" not in c.tags}
    hidden: dict[str, list[bool]] = {}
    for row in rows:
        prompt, target = row["prompt"][-1]["content"], row["completion"][0]["content"]
        for text, criterion in forms.items():
            if text in prompt:
                assert holds(criterion.check, target), (text, target)
            else:
                hidden.setdefault(criterion.tags[1], []).append(holds(criterion.check, target))
    share = {form: sum(met) / len(met) for form, met in hidden.items()}
    assert share.pop("number") < 0.15  # a figure is often the fact itself
    assert max(share.values()) < 0.1, share
    assert share["opening"] < 0.02
