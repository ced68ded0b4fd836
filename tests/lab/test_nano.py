"""The nano model: its vocabulary, its files, and the scores that it ships with."""

from dataclasses import asdict, replace
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rgsd.errors import ConfigError, ModelError, RunError
from rgsd.lab import nano
from rgsd.lab.conversations import Conversations, every_setting
from rgsd.lab.nano_scores import TOLERANCE, NanoScores, arms, compare, measure
from rgsd.lab.vocabulary import MODIFIERS, QUESTIONS, TOPICS
from rgsd.lab.world import World
from rgsd.models import fingerprint, load_model, load_tokenizer
from rgsd.prompts.messages import student_messages, teacher_messages
from rgsd.prompts.thinking import response_mask

pytestmark = pytest.mark.integration

SAMPLE = 48
needs_weights = pytest.mark.skipif(
    not (nano.model_folder() / "model.safetensors").is_file(), reason="the nano model has not been pretrained yet"
)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def words(world):
    return nano.build_tokenizer(world)


@pytest.fixture(scope="module")
def shipped():
    return load_model(str(nano.model_folder()))


@pytest.fixture(scope="module")
def shipped_words():
    return load_tokenizer(str(nano.model_folder()))


def flat(messages, response):
    return "".join(f"<{m['role']}>{m['content']}<end>" for m in messages) + f"<assistant>{response}<end>"


# --- Tokenizer ------------------------------------------------------------------------------------------------------


def test_no_word_of_a_conversation_is_unknown_and_all_come_back(world, words):
    for conversation in islice(Conversations(world, 5), 400):
        encoded = nano.encode(conversation, words, prompt_weight=0.2)
        assert words.unk_token_id not in encoded.ids
        response = "".join(text for text, _ in conversation.response)
        assert words.decode(encoded.ids) == flat(conversation.messages, response)


@pytest.mark.parametrize("think", [False, True])
def test_no_word_of_any_prompt_is_unknown(words, think):
    for seed in (0, 1):
        world = World(task_seed=seed, generality=0.5)
        for number, example in enumerate(world.examples("dev", "held-out", think=think)):
            settings = every_setting()
            for messages in (
                student_messages(example),
                teacher_messages(example, settings[number % len(settings)]),
            ):
                ids = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                assert words.unk_token_id not in ids
                assert len(ids) < 320


def test_no_word_of_any_question_is_unknown(words):
    asked = [q.format(topic=t, modifier=m) for q in QUESTIONS for t in TOPICS for m in MODIFIERS]
    assert words.unk_token_id not in {i for ids in words(asked, add_special_tokens=False)["input_ids"] for i in ids}


def test_the_think_tags_are_single_tokens_that_stay_in_the_text(words):
    text = "<think>The question is about the dravix.</think>\nThe dravix is red."
    ids = words.encode(text, add_special_tokens=False)
    assert ids[0] == words.convert_tokens_to_ids("<think>")
    assert words.decode(ids, skip_special_tokens=True) == text
    kept = [i for i, keep in zip(ids, response_mask(ids, words), strict=True) if keep]
    assert words.decode(kept).strip() == "The dravix is red."


def test_prompts_count_little_responses_fully_and_strays_not_at_all(world, words):
    conversation = next(c for c in Conversations(world, 0) if any(not in_loss for _, in_loss in c.response))
    encoded = nano.encode(conversation, words, prompt_weight=0.25)
    weighed = {w: [t for t, v in zip(encoded.ids, encoded.weights, strict=True) if v == w] for w in (0.0, 0.25, 1.0)}
    assert words.decode(weighed[0.25]) == flat(conversation.messages, "").removesuffix("<end>")
    assert words.decode(weighed[1.0]) == "".join(text for text, counts in conversation.response if counts) + "<end>"
    assert words.decode(weighed[0.0]) == "".join(text for text, counts in conversation.response if not counts)


def test_batches_keep_to_their_size_and_to_few_shapes(world, words):
    stream = nano.batches(iter(Conversations(world, 0)), words, tokens=2048, prompt_weight=0.2, seed=0)
    found = list(islice(stream, 40))
    assert all(b.ids_BT.numel() <= 2048 and b.ids_BT.size(1) % nano.LENGTH_STEP == 0 for b in found)
    assert all(b.weights_BT.shape == b.ids_BT.shape for b in found)
    assert all((b.weights_BT[b.ids_BT == words.pad_token_id] == 0).all() for b in found)
    assert len({b.ids_BT.shape for b in found}) < 20


# --- The shipped model ----------------------------------------------------------------------------------------------


@needs_weights
def test_the_shipped_folder_is_small_and_has_no_code():
    files = [p for p in nano.model_folder().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 8 * 1024 * 1024
    assert {p.suffix for p in files} <= {".json", ".jinja", ".safetensors"}


@needs_weights
def test_plain_transformers_loads_it():
    folder = str(nano.model_folder())
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    prompt = words.apply_chat_template(
        [{"role": "user", "content": "Tell a cook about the dravix."}], add_generation_prompt=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    text = words.decode(out[0, prompt["input_ids"].size(1) :], skip_special_tokens=True)
    assert text.startswith("The dravix ")
    assert World().audit("dravix", text).n_unreadable == 0


@needs_weights
def test_the_shipped_tokenizer_is_what_the_world_makes(words, shipped_words):
    assert shipped_words.get_vocab() == words.get_vocab()
    assert shipped_words.chat_template == words.chat_template


@needs_weights
def test_the_shipped_figures_are_of_this_world_and_these_weights(world, shipped):
    figures = NanoScores.read(nano.model_folder())
    assert figures.world == world.digest()
    assert figures.model_fingerprint == fingerprint(shipped)
    assert figures.n_parameters == sum(p.numel() for p in shipped.parameters())
    assert set(figures.arms) == set(arms())


@needs_weights
def test_the_shipped_figures_are_what_the_lab_needs():
    figures = NanoScores.read(nano.model_folder()).arms
    assert figures["base"].satisfaction < 0.3
    assert figures["base+rubric"].satisfaction > 0.95
    assert figures["base+rubric, thinking"].satisfaction > 0.9
    assert figures["base+mismatched"].satisfaction < figures["base"].satisfaction + 0.15
    assert figures["base, thinking"].names_rubric == 0.0
    assert figures["base+rubric, thinking"].names_rubric > 0.5
    assert max(arm.truncated_share for arm in figures.values()) < 0.01


@needs_weights
def test_the_shipped_model_reaches_its_figures_on_a_sample(world, shipped, shipped_words):
    names = ["base", "base+rubric", "base+rubric, thinking"]
    wanted = NanoScores.read(nano.model_folder()).arms
    for name, arm in measure(shipped, shipped_words, world, names=names, n_prompts=SAMPLE).items():
        # Three standard errors of a mean over so few prompts, for base; the others are near 1 on every prompt.
        assert arm.satisfaction == pytest.approx(wanted[name].satisfaction, abs=0.12 if name == "base" else 0.04)
        assert arm.names_rubric == pytest.approx(wanted[name].names_rubric, abs=0.15)


# --- Rebuilding -----------------------------------------------------------------------------------------------------


@needs_weights
def test_a_pretraining_leaves_a_folder_that_loads(world, tmp_path):
    figures = nano.pretrain(tmp_path / "nano", steps=2, n_prompts=8)
    assert NanoScores.read(tmp_path / "nano") == figures
    assert fingerprint(load_model(str(tmp_path / "nano"))) == figures.model_fingerprint
    assert figures.pretraining["steps"] == 2
    assert not compare(figures, NanoScores.read(nano.model_folder())).matches
    with pytest.raises(RunError, match="not an empty folder"):
        nano.pretrain(tmp_path / "nano", steps=2)


def test_the_same_seed_pretrains_the_same_weights(world, words):
    def weights(seed):
        settings = nano.Pretraining(seed=seed, steps=2, batch_tokens=1024, layers=1, width=32, feed_forward=32, heads=2)
        model = nano.new_model(words, settings)
        nano.train_model(model, words, world, settings)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first, second, other = weights(0), weights(0), weights(1)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_settings_that_cannot_train_are_refused():
    with pytest.raises(ConfigError, match="steps"):
        nano.Pretraining(steps=0)


@needs_weights
def test_a_comparison_says_in_words_what_differs():
    shipped = NanoScores.read(nano.model_folder())
    same = compare(shipped, shipped)
    assert same.matches
    assert "the same weights" in same.lines[0]

    worse = replace(shipped.arms["base+rubric"], satisfaction=shipped.arms["base+rubric"].satisfaction - 0.2)
    found = compare(replace(shipped, arms={**shipped.arms, "base+rubric": worse}), shipped)
    assert not found.matches
    assert found.lines[0].startswith("no match: base+rubric, satisfaction")

    assert not compare(replace(shipped, world="0" * 16), shipped).matches
    assert not compare(replace(shipped, arms={}), shipped).matches
    assert all(limit > 0 for limit in asdict(TOLERANCE).values())


def test_a_folder_without_figures_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"figures\.json"):
        NanoScores.read(tmp_path)
    (tmp_path / "figures.json").write_text('{"arms": {}}')
    with pytest.raises(ModelError, match=r"figures\.json"):
        NanoScores.read(tmp_path)
