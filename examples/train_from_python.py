"""Trains the embedded model on bundled rubrics with a custom teacher prompt, and scores it before and after.

    python examples/train_from_python.py --steps 4

Runs on a laptop CPU in about three minutes. `--model nano` (a two-million-parameter test model) takes seconds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from peft import LoraConfig

from rgsd import RGSDConfig, RGSDTrainer, load
from rgsd.inference import SamplingConfig, TransformersGenerator
from rgsd.judges import ChecksJudge
from rgsd.models import load_model, load_tokenizer
from rgsd.prompts.messages import student_messages
from rgsd.rubrics import score

# A Jinja template. It can show `question`, `criteria` and `reference`, and must show the rubric.
TEACHER_PROMPT = """{# place: user #}
{{ question }}

A careful expert would make sure that the answer does the following:
{% for criterion in criteria %}
- {{ criterion.text }}
{% endfor %}

Answer the question as that expert. Do not mention this list.
"""


def mean_score(model, tokenizer, examples, max_new_tokens: int) -> float:
    """Mean rubric satisfaction of greedy responses, in [0, 1], judged by each criterion's own check."""
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    responses = TransformersGenerator(model, tokenizer, sampling).generate([student_messages(e) for e in examples])
    judgements = ChecksJudge().judge_all([(e, r.text) for e, r in zip(examples, responses, strict=True)])
    scores = [
        score(e.rubric, j.verdicts, e.scoring, r.text).value
        for e, r, j in zip(examples, responses, judgements, strict=True)
    ]
    scored = [s for s in scores if s is not None]
    return sum(scored) / len(scored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded-warm")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=80)
    args = parser.parse_args()

    examples = load("bundled:medicine").examples
    train_set = [e for e in examples if "split:train" in e.tags]
    development = [e for e in examples if "split:dev" in e.tags][:8]

    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "expert.jinja"
        template.write_text(TEACHER_PROMPT, encoding="utf-8")
        tokenizer = load_tokenizer(args.model)
        trainer = RGSDTrainer(
            load_model(args.model),
            args=RGSDConfig(
                output_dir=folder,
                template=str(template),
                max_steps=args.steps,
                per_device_train_batch_size=4,
                max_completion_length=args.max_new_tokens,
                learning_rate=1e-3,
                beta=0.0,
                clip="none",
                report_to="none",
                save_strategy="no",
                use_cpu=True,
            ),
            train_dataset=train_set,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        )
        before = mean_score(trainer.model, tokenizer, development, args.max_new_tokens)
        trainer.train()
        after = mean_score(trainer.model, tokenizer, development, args.max_new_tokens)
    print(f"score on {len(development)} development prompts: {before:.3f} before, {after:.3f} after {args.steps} steps")


if __name__ == "__main__":
    main()
